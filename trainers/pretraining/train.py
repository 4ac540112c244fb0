"""The phases of the embedded frozen VLMs: the tower under dense supervision, then the language model, in stages.

For `pages` the language model's stages on made tokens need no tower, so the two can be trained side by side.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, Dataset, default_collate
from transformers import LlavaForConditionalGeneration

from prunezoo.core.errors import PruneZooError
from trainers.cli.lock import hold
from trainers.data.loading import ResumableLoader
from trainers.data.pages_dense import DensePages
from trainers.data.scenes_dense import DenseScenes
from trainers.data.several_dense import KINDS, DenseSeveral
from trainers.training.callbacks import Checkpoints, GracefulStop, Progress, SeedSteps, WholeCheckpoints
from trainers.training.precision import usable_precision
from trainers.training.resume import find_checkpoint
from trainers.training.resume import train as run

from .build import PAGES, SCENES, WORD_IDS, Sizes, new_vlm, save_vlm
from .language import LanguageModule
from .pages_language import PagesLanguage, Stage
from .pages_said import PatchWords, prepare_look_up
from .pages_tower import PagesTower, start_tower
from .several import SEVERAL, BankSizes, SeveralLanguage, SeveralStage, make_bank, start_from
from .tower import TowerModule

_VALIDATION_START = 90_000_000  # scenes and pages that no training reaches
_STAGE_APART = 1_000_000  # pages from the first of one stage to the first of the next


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


@dataclass(frozen=True)
class Part:
    """One of the phases: what it trains, on what, and which weights of the VLM are its own."""

    name: str
    phase: Phase | Stage | SeveralStage
    module: Callable[[LlavaForConditionalGeneration], L.LightningModule]
    data: Dataset
    held_out: Dataset
    own: tuple[str, ...] = ("",)  # how their names begin
    in_batches: bool = False  # whether an item of the data is a whole batch

    def load(self, vlm: LlavaForConditionalGeneration, done: Path) -> None:
        """Take over what this phase has trained."""
        state = LlavaForConditionalGeneration.from_pretrained(done, dtype=torch.float32).state_dict()
        vlm.load_state_dict({name: weight for name, weight in state.items() if name.startswith(self.own)}, strict=False)


def train(
    tower: Phase | None = None,
    language: Phase | None = None,
    stages: list[Stage] | None = None,
    several: list[SeveralStage] | None = None,
    bank: BankSizes = BankSizes(),  # noqa: B008
    suite: Literal["scenes", "pages", "several"] = "scenes",
    start: str | None = None,
    part: Literal["all", "tower", "made"] = "all",
    out: str = "checkpoints/tiny-llava",
    work: str = "runs/tiny_llava",
    sizes: Sizes = Sizes(),  # noqa: B008
    machine: Machine = Machine(),
    seed: int = 0,
) -> None:
    """Train tower and language model, or what is left of it.

    Args:
        tower: the first phase, for scenes and pages.
        language: the second phase, for scenes.
        stages: the language model's curriculum, for pages.
        several: the language model's curriculum, for several pictures.
        bank: scenes for several pictures.
        suite: what the model is to answer; several: scenes-icl, scenes-video and scenes-steps.
        start: folder of a frozen model: whose tower that of pages begins as, and which a model for several pictures
            begins as; None: at random.
        part: of pages only the tower, or only the stages on made tokens; these two can run side by side.
        out: folder of the finished VLM: bf16 safetensors, processor, chat template.
        work: folder of checkpoints and logs.
        sizes: of the model.
        machine: what it trains on.
        seed: of weights and pictures.

    Raises:
        PruneZooError: what the suite needs is not there, or a phase was stopped before its end.
    """
    L.seed_everything(seed)
    world = {"scenes": SCENES, "pages": PAGES, "several": SEVERAL}[suite]
    vlm = new_vlm(sizes, world)
    folder = Path(work)
    if suite == "several":
        if not start or not several or tower or language or stages:
            raise PruneZooError("suite several is trained by several, from start; tower, language, stages are not its")
        parts = _several(vlm, several, bank, start, folder)
    elif tower is None or several:
        raise PruneZooError(f"suite {suite} needs tower; several is for suite several")
    elif suite == "pages":
        parts = _pages(vlm, tower, stages or [], start, part)
    elif language is None or stages or start or part != "all":
        raise PruneZooError("suite scenes is trained by tower and language; stages, start and part are for pages")
    else:
        parts = _scenes(tower, language)
    for each in parts:
        done = folder / each.name / "vlm"
        if not (done / "model.safetensors").exists():  # written last
            trainer = _fit(each, vlm, machine, folder / each.name, seed)
            if trainer.global_step < each.phase.steps:
                raise PruneZooError(
                    f"{each.name} stopped at step {trainer.global_step}; give the command again to go on"
                )
            if trainer.is_global_zero:
                vlm.float().save_pretrained(done)
            trainer.strategy.barrier()
        each.load(vlm, done)
    if part == "all" and int(os.environ.get("LOCAL_RANK", 0)) == 0:
        save_vlm(vlm, Path(out), world)
        print(f"frozen VLM: {out}")


def _scenes(tower: Phase, language: Phase) -> list[Part]:
    pictures = [DenseScenes(words, pictures=phase.steps * phase.batch_size) for words, phase in
                ((None, tower), (WORD_IDS, language))]  # fmt: skip
    held_out = [DenseScenes(words, start=_VALIDATION_START, pictures=128, split="validation") for words in
                (None, WORD_IDS)]  # fmt: skip
    return [
        Part("tower", tower, lambda vlm: TowerModule(vlm, tower.steps, tower.lr), pictures[0], held_out[0]),
        Part("language", language, lambda vlm: LanguageModule(vlm, language.steps, language.lr), pictures[1],
             held_out[1]),
    ]  # fmt: skip


def _pages(
    vlm: LlavaForConditionalGeneration, tower: Phase, stages: list[Stage], start: str | None, part: str
) -> list[Part]:
    """The phases of a part, and the VLM as they begin."""
    vlm.set_attn_implementation("plain")
    prepare_look_up(vlm, PatchWords(vlm))
    if start:
        start_tower(vlm, start)
    parts = []
    if part != "made":
        kinds = ("form", "table", "chart", "chart")  # the names of bars are learnt last
        pages = DensePages(pages=tower.steps * tower.batch_size, kinds=kinds)
        held_out: Dataset = DensePages(start=_VALIDATION_START, pages=128, split="validation")
        own = ("model.vision_tower", "model.multi_modal_projector")
        parts.append(Part("tower", tower, lambda vlm: PagesTower(vlm, tower.steps, tower.lr), pages, held_out, own))
    for number, stage in enumerate(stages, 1):
        if part != "all" and (part == "tower" or stage.drawn):
            continue
        made = partial(
            DensePages, PAGES.word_ids, stage.shares, stage.drawn, stage.questions, stage.length, kinds=stage.kinds
        )
        pages = made(start=number * _STAGE_APART, pages=stage.steps * stage.batch_size)
        held_out = made(start=_VALIDATION_START, pages=96, split="validation")
        parts.append(Part(stage.name, stage, partial(PagesLanguage, stage=stage), pages, held_out,
                          ("model.language_model",)))  # fmt: skip
    return parts


def _several(
    vlm: LlavaForConditionalGeneration, stages: list[SeveralStage], sizes: BankSizes, start: str, folder: Path
) -> list[Part]:
    """The stages, and the VLM as the first begins."""
    vlm.set_attn_implementation("plain")
    start_from(vlm, start)
    ids = SEVERAL.word_ids
    train_bank = make_bank(vlm, vars(sizes), "train", folder / "bank", 0)
    held_out = make_bank(vlm, dict.fromkeys(vars(sizes), 60), "validation", folder / "bank", 1)
    asked = DenseSeveral(*held_out, ids, 20, 8, dict.fromkeys(KINDS, 1.0), {9: 1.0}, _VALIDATION_START, 0.0)
    parts = []
    for number, stage in enumerate(stages, 1):
        start_at, drawn = number * _STAGE_APART, (stage.shares, stage.keep)
        data = DenseSeveral(*train_bank, ids, stage.steps, stage.batch_size, *drawn, start_at, stage.hidden)
        parts.append(Part(stage.name, stage, partial(SeveralLanguage, stage=stage), data, asked,
                          ("model.language_model",), in_batches=True))  # fmt: skip
    return parts


def _whole(items: list[dict[str, Any]]) -> dict[str, Any]:
    """The batch that an item is."""
    return {name: torch.as_tensor(values) for name, values in items[0].items()}


def _fit(part: Part, vlm: LlavaForConditionalGeneration, machine: Machine, folder: Path, seed: int) -> L.Trainer:
    phase = part.phase
    every = min(200, phase.steps)  # steps from one validation, and checkpoint, to the next
    trainer = L.Trainer(
        accelerator=machine.accelerator, devices=machine.devices, strategy=machine.strategy,
        precision=usable_precision(machine.precision, machine.accelerator),
        max_steps=phase.steps, max_epochs=-1, gradient_clip_val=1.0,
        val_check_interval=every, check_val_every_n_epoch=None, num_sanity_val_steps=0,
        log_every_n_steps=20, logger=CSVLogger(folder, name="logs"), use_distributed_sampler=False,
        plugins=[WholeCheckpoints()],
        callbacks=[SeedSteps(seed), Progress(), GracefulStop(), Checkpoints(str(folder), every_n_train_steps=every)],
    )  # fmt: skip
    training = ResumableLoader(
        part.data, 1 if part.in_batches else phase.batch_size // trainer.world_size,
        _whole if part.in_batches else default_collate, machine.workers,
        world_size=trainer.world_size, rank=trainer.global_rank, seed=seed,
    )  # fmt: skip
    hold("work", folder, folder=True)
    validation = DataLoader(part.held_out, 1, collate_fn=_whole) if part.in_batches else DataLoader(part.held_out, 64)
    module, checkpoint = part.module(vlm), find_checkpoint("last", folder)
    run(trainer, module, checkpoint, train_dataloaders=training, val_dataloaders=validation)
    return trainer
