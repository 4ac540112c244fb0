"""The two phases of the embedded frozen VLM: the tower under dense supervision, then the language model."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, default_collate
from transformers import LlavaForConditionalGeneration

from prunezoo.core.errors import PruneZooError
from trainers.cli.lock import hold
from trainers.data.loading import ResumableLoader
from trainers.data.scenes_dense import DenseScenes
from trainers.training.callbacks import Checkpoints, GracefulStop, Progress, SeedSteps, WholeCheckpoints
from trainers.training.resume import find_checkpoint
from trainers.training.resume import train as run

from .build import WORD_IDS, Sizes, new_vlm, save_vlm
from .language import LanguageModule
from .tower import TowerModule

_VALIDATION_START = 90_000_000  # scenes that no training reaches


@dataclass(frozen=True)
class Phase:
    """How long and how fast a phase trains; the batch is that of all processes together."""

    steps: int
    batch_size: int
    lr: float = 1.5e-3

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise PruneZooError(f"{name}={getattr(self, name)} of a phase: at least 1")


@dataclass(frozen=True)
class Machine:
    """What it trains on, in Lightning's words."""

    accelerator: str = "auto"
    devices: int = 1
    strategy: str = "auto"
    precision: Literal["32-true", "bf16-mixed"] = "bf16-mixed"
    workers: int = 1


def train(
    tower: Phase,
    language: Phase,
    out: str = "checkpoints/tiny-llava",
    work: str = "runs/tiny_llava",
    sizes: Sizes = Sizes(),  # noqa: B008
    machine: Machine = Machine(),
    seed: int = 0,
) -> None:
    """Train tower and language model, or what is left of it.

    Args:
        tower: the first phase.
        language: the second phase.
        out: folder of the finished VLM: bf16 safetensors, processor, chat template.
        work: folder of checkpoints and logs.
        sizes: of the model.
        machine: what it trains on.
        seed: of weights and pictures.
    """
    L.seed_everything(seed)
    vlm = new_vlm(sizes)
    folder = Path(work)
    phases = {"tower": (tower, TowerModule), "language": (language, LanguageModule)}
    for name, (phase, kind) in phases.items():
        done = folder / name / "vlm"
        if not (done / "model.safetensors").exists():  # written last
            trainer = _fit(name, kind(vlm, phase.steps, phase.lr), phase, machine, folder / name, seed)
            if trainer.global_step < phase.steps:
                raise PruneZooError(f"{name} stopped at step {trainer.global_step}; give the command again to go on")
            if trainer.is_global_zero:
                vlm.float().save_pretrained(done)
            trainer.strategy.barrier()
        vlm.load_state_dict(LlavaForConditionalGeneration.from_pretrained(done, dtype=torch.float32).state_dict())
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        save_vlm(vlm, Path(out))
        print(f"frozen VLM: {out}")


def _fit(name: str, module: L.LightningModule, phase: Phase, machine: Machine, folder: Path, seed: int) -> L.Trainer:
    every = min(200, phase.steps)  # steps from one validation, and checkpoint, to the next
    trainer = L.Trainer(
        accelerator=machine.accelerator, devices=machine.devices, strategy=machine.strategy,
        precision=machine.precision, max_steps=phase.steps, max_epochs=-1, gradient_clip_val=1.0,
        val_check_interval=every, check_val_every_n_epoch=None, num_sanity_val_steps=0,
        log_every_n_steps=20, logger=CSVLogger(folder, name="logs"), use_distributed_sampler=False,
        plugins=[WholeCheckpoints()],
        callbacks=[SeedSteps(seed), Progress(), GracefulStop(), Checkpoints(str(folder), every_n_train_steps=every)],
    )  # fmt: skip
    words = WORD_IDS if name == "language" else None
    batch = phase.batch_size // trainer.world_size
    training = ResumableLoader(
        DenseScenes(words, pictures=phase.steps * phase.batch_size), batch, default_collate, machine.workers,
        world_size=trainer.world_size, rank=trainer.global_rank, seed=seed,
    )  # fmt: skip
    held_out = DenseScenes(words, start=_VALIDATION_START, pictures=128, split="validation")
    hold("work", folder, folder=True)
    validation = DataLoader(held_out, batch_size=64)
    run(trainer, module, find_checkpoint("last", folder), train_dataloaders=training, val_dataloaders=validation)
    return trainer
