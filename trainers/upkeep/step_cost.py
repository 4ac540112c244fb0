"""Measure what a step of distillation costs beside its floor, and with the cache of the frozen model's answers.

    python -m trainers.upkeep.step_cost --vlm random:llava-120m [--batch 1] [--repeats 5] [--json F]

The floor is what no distillation through a frozen model can do without: the model on all tokens as the teacher, and
once more as the student, with the backward pass from its answer to its input; both are bare calls, without any
code of this package. A step is all that happens between two batches of a real training: pictures encoded, pruner,
teacher, student, losses, backward pass, optimizer, callbacks. They run in turns; times on a CPU are those of the
process, so that other work on the machine does not count.
"""

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader

from prunezoo.core.registry import build_pruner
from trainers.benchmarking.memory import peak_memory, weights_size
from trainers.benchmarking.models import Request, load_model
from trainers.caches.cached import keep_top
from trainers.cli.errors import check_output, command
from trainers.cli.names import find_vlm
from trainers.cli.options import add_option, check_at_least_one
from trainers.cli.terminal import Terminal
from trainers.data.conversation import IGNORED
from trainers.data.modules import TEACHER
from trainers.evaluation.loading import device_name
from trainers.evaluation.record import versions, write_record
from trainers.training.callbacks import GracefulStop, SeedSteps, StopAtNaN
from trainers.training.distill import DistillModule
from trainers.training.frozen import recompute_layers
from trainers.training.losses import answer_slots

ANSWER = 8
"""Tokens of the answer."""


@dataclass
class Bare:
    """The frozen model's own calls on a batch."""

    vlm: Any
    batch: dict[str, Any]
    embeddings: Tensor = field(init=False)

    def __post_init__(self) -> None:
        with torch.no_grad():
            ids = self.batch["input_ids"]
            self.embeddings = self.vlm.get_input_embeddings()(ids)
            images = torch.cat(list(self.vlm.base_model.get_image_features(self.batch["pixel_values"]).pooler_output))
            self.embeddings[ids == self.vlm.config.image_token_id] = images.to(self.embeddings.dtype)

    def teacher(self) -> Tensor:
        """Logits at the answer, from pictures and words."""
        with torch.no_grad():
            inputs = {name: value for name, value in self.batch.items() if name != "labels"}
            return answer_slots(self.vlm(**inputs, use_cache=False).logits, self.batch["labels"])[0]

    def student(self) -> None:
        """Forward, and backward to the input."""
        embeddings = self.embeddings.detach().requires_grad_()
        mask = self.batch["attention_mask"]
        out = self.vlm(inputs_embeds=embeddings, attention_mask=mask, use_cache=False)
        answer_slots(out.logits, self.batch["labels"])[0].logsumexp(-1).mean().backward()

    def __call__(self) -> None:
        """Both: the floor of a step."""
        self.teacher()
        self.student()


class Turns(L.Callback):
    """Times every step, and after it one of the floor.

    Args:
        bare: The floor.
        clock: In seconds.
    """

    def __init__(self, bare: Callable[[], None], clock: Callable[[], float]) -> None:
        self.bare, self.clock = bare, clock
        self.steps: list[float] = []
        self.floors: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """A step begins."""
        self.begin = self.clock()

    def on_train_batch_end(self, *_: Any) -> None:
        """It is over."""
        self.steps.append(self.clock() - self.begin)
        begin = self.clock()
        self.bare()
        self.floors.append(self.clock() - begin)


class OneBatch(L.LightningDataModule):
    """The same batch again and again."""

    groups = ("all",)

    def __init__(self, batch: dict[str, Any], steps: int) -> None:
        super().__init__()
        self.batch, self.steps = batch, steps

    def train_dataloader(self) -> DataLoader:
        """As often as there are steps."""
        copies: Any = [self.batch] * self.steps
        return DataLoader(copies, batch_size=None, collate_fn=dict)


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds of this process on a CPU; on a GPU those on the wall, when all is done."""
    if device.type == "cpu":
        return time.process_time

    def wall() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return wall


def with_labels(batch: dict[str, Any]) -> dict[str, Any]:
    """The last tokens of a request as the answer."""
    labels = torch.full_like(batch["input_ids"], IGNORED)
    labels[:, -ANSWER:] = batch["input_ids"][:, -ANSWER:]
    return {**batch, "labels": labels}


def train(module: DistillModule, batch: dict[str, Any], steps: int, *callbacks: L.Callback) -> None:
    """A short training."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_steps=steps, accelerator="gpu" if module.vlm.device.type == "cuda" else "cpu", devices=1,
            callbacks=[GracefulStop(), StopAtNaN(), SeedSteps(), *callbacks], default_root_dir=folder, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
        )  # fmt: skip
        trainer.fit(module, datamodule=OneBatch(batch, steps))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All numbers."""
    vlm, processor = load_model(args.vlm, args.device, args.dtype)
    batch = with_labels(Request(vlm, processor, args.batch, args.length, (640, 480))())
    bare = Bare(vlm, batch)
    with tempfile.TemporaryDirectory() as folder:
        vlm.save_pretrained(folder)
        pruner = build_pruner("ppm", vlm, hidden=args.hidden)
        dtype = str(vlm.dtype).removeprefix("torch.")
        module = DistillModule(folder, pruner, vlm_dtype=dtype, guide_share=0.0, guide_weight=0.0)  # type: ignore[arg-type]
    module.__dict__["vlm"] = vlm  # one model is enough
    live, cached = (Turns(bare, clock_of(vlm.device)) for _ in range(2))  # the first step, and floor, only warm up
    train(module, batch, args.repeats + 1, live)
    train(module, {**batch, TEACHER: keep_top(bare.teacher(), 64)}, args.repeats + 1, cached)
    peaks = {"floor": peak_memory(vlm.device, bare), "step": peak_memory(vlm.device, lambda: train(module, batch, 1))}
    recompute_layers(vlm)
    peaks["step with model.recompute"] = peak_memory(vlm.device, lambda: train(module, batch, 1))
    floor = median([*live.floors[1:], *cached.floors[1:]])
    live_ratios = [step / under for step, under in zip(live.steps[1:], live.floors[1:], strict=True)]
    cached_ratios = [step / under for step, under in zip(cached.steps[1:], cached.floors[1:], strict=True)]
    return {
        "floor_s": floor,
        "step_over_floor": median(live_ratios),
        "cached_over_floor": median(cached_ratios),
        "cached_over_step": median(cached_ratios) / median(live_ratios),
        "spread": [min(live_ratios), max(live_ratios), min(cached_ratios), max(cached_ratios)],
        "tokens": batch["input_ids"].shape[1],
        "pruner_parameters": sum(p.numel() for p in pruner.parameters()),
        "peak_bytes": peaks,
        "weights_bytes": weights_size(vlm),
        "device": device_name(vlm.device),
        "dtype": dtype,
    }


def show(found: dict[str, Any], console: Console) -> None:
    """The table."""
    table = Table(title=f"a step of distillation on {found['device']}, {found['dtype']}, {found['tokens']} tokens")
    for column, justify in (("", "left"), ("seconds", "right"), ("of the floor", "right"), ("lowest–highest", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    low, high, cached_low, cached_high = found["spread"]
    floor = found["floor_s"]
    rows = {
        "step": ("step_over_floor", low, high),
        "step with the cache": ("cached_over_floor", cached_low, cached_high),
    }
    table.add_row("floor: teacher forward, student forward and backward", f"{floor:.2f}", "1", "")
    for name, (key, least, most) in rows.items():
        table.add_row(name, f"{floor * found[key]:.2f}", f"{found[key]:.3f}", f"{least:.3f}–{most:.3f}")
    console.print(table)
    console.print(f"with the cache: {found['cached_over_step']:.3f} of the step without it")
    peaks = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in found["peak_bytes"].items())
    console.print(f"memory at its peak, over {found['weights_bytes'] / 2**20:.0f} MiB of weights: {peaks}")


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    argv = sys.argv[1:] if argv is None else list(argv)
    p = argparse.ArgumentParser(
        prog="python -m trainers.upkeep.step_cost", description="Measure a step of distillation."
    )
    add_option(p, "vlm", required=True, help="folder, Hub id, tiny-llava, or random:llava-120m")
    add_option(p, "batch")
    p.add_argument("--length", type=int, default=64, help="text tokens")
    p.add_argument("--hidden", type=int, default=64, help="width inside the PPM that is trained")
    p.add_argument("--repeats", type=int, default=5, help="steps that are measured")
    for name in ("device", "dtype", "json"):
        add_option(p, name)
    args = p.parse_args(argv)
    check_at_least_one(args, "batch", "repeats")
    check_output("--json", args.json)
    args.vlm = find_vlm(args.vlm)
    found = measure(args)
    if args.json:
        line = shlex.join(["python", "-m", "trainers.upkeep.step_cost", *argv])
        write_record({"vlm": args.vlm, "command": line, "versions": versions(), **found}, args.json)
    show(found, Terminal())


if __name__ == "__main__":
    main()
