"""What a training by distillation will need, before anything is loaded or rented.

    python -m trainers.plan --config configs/ppm_llava.yaml [--config configs/strategy/zero3.yaml] --gpus 8

prints memory of a GPU by part, operations, hours, tokens, and sizes of caches, from the recipe and the configuration of
the frozen model alone. Keys of the recipe can be overridden as for `trainers.fit`.

What it leaves out: the pruner's own activations, and what CUDA, NCCL and the allocator take for themselves.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from prunezoo.core.errors import PruneZooError
from trainers.cli.errors import command
from trainers.fit import FitCLI, build
from trainers.planning.models import load_config
from trainers.planning.simulate import ANSWER, Pass, Weights, count_weights, simulate, vision_flops

GIB, TERA = 2**30, 1e12
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")
"""Begin the names of those whose memory is known."""
LIVE = 10**9
"""Parameters that ZeRO-3 lets lie gathered, its default."""


@dataclass(frozen=True)
class Job:
    """What is to be planned."""

    recipe: Any  # the parsed configuration
    config: Any  # of the frozen model
    gpus: int
    tokens: int  # of a sample
    image_tokens: int

    @property
    def model(self) -> Any:
        """The recipe's model."""
        return self.recipe.model.init_args

    @property
    def batch(self) -> int:
        """Samples of a GPU at once."""
        return self.recipe.data.init_args.batch_size

    @property
    def samples(self) -> int:
        """Of a step of all GPUs together."""
        return self.batch * self.gpus * self.recipe.trainer.accumulate_grad_batches

    @property
    def dtype(self) -> torch.dtype:
        """That the frozen model is held in."""
        named = self.model.vlm_dtype
        stored = str(getattr(self.config, "dtype", None) or "bfloat16").removeprefix("torch.")
        return DTYPES[stored if named == "auto" else named]

    @property
    def strategy(self) -> str:
        """`single`, `ddp`, `zero1` to `zero3` or `fsdp2`."""
        strategy = self.recipe.trainer.strategy
        if strategy in (None, "auto"):
            return "single" if self.gpus == 1 else "ddp"
        if isinstance(strategy, str):
            return strategy
        name = strategy.class_path.rpartition(".")[2].lower()
        return f"{name}{strategy.init_args.stage}" if name == "zero" else name


class ReadOnly(FitCLI):
    """Parses a recipe, and makes nothing of it."""

    def instantiate_classes(self) -> None:
        """Not here."""


def pruner_size(recipe: Any) -> int:
    """Parameters that are trained."""
    said = recipe.model.init_args.pruner.as_dict()
    place, _, name = said["class_path"].rpartition(".")
    cls = getattr(import_module(place), name)
    with torch.device("meta"):
        pruner = cls(**(said.get("init_args", {}).get("config") or {}))
    return sum(p.numel() for p in pruner.parameters() if p.requires_grad)


def memory(job: Job, weights: Weights, passes: Pass, trained: int) -> dict[str, float]:
    """Bytes of one GPU, by part."""
    share, size = job.gpus, job.dtype.itemsize
    everything = (weights.vision + weights.language) * size
    sharded = job.strategy in ("zero3", "fsdp2")
    stage = {"zero1": 1, "zero2": 2, "zero3": 3, "fsdp2": 3}.get(job.strategy, 0)
    gathered = {"zero3": min(LIVE * size, everything), "fsdp2": 2 * weights.embedding * size}.get(job.strategy, 0)
    return {
        "frozen model": everything / share if sharded else everything,
        "frozen model, gathered for the moment": gathered,
        "pruner": 4 * trained / (share if stage >= 3 else 1),
        "gradients": 4 * trained / (share if stage >= 2 else 1),
        "AdamW": 8 * trained / (share if stage >= 1 else 1),
        "activations, logits, losses": max(passes.student_bytes, passes.teacher_bytes),
    }


def step_flops(job: Job, passes: Pass, vision: float) -> tuple[float, float, float]:
    """Operations of a step of one GPU: in the first stage, in the second, in the second with the cache of answers."""
    through = passes.forward_flops + passes.backward_flops
    first = job.batch * vision + (through if job.model.guide == "relevance" else passes.forward_flops)
    guided = job.model.guide_weight > 0
    teacher = (through if job.model.guide == "relevance" else passes.forward_flops) if guided else passes.forward_flops
    second = job.batch * vision + teacher + through
    cached = second if guided else job.batch * vision + through
    times = job.recipe.trainer.accumulate_grad_batches
    return times * first, times * second, times * cached


def plan(job: Job, tflops: float, items: int | None) -> dict[str, Any]:
    """All numbers."""
    weights, trained = count_weights(job.config), pruner_size(job.recipe)
    text = job.config.get_text_config()
    autocast = job.recipe.trainer.precision == "bf16-mixed"
    passes = simulate(text, job.dtype, job.batch, job.tokens, autocast, recompute=job.model.recompute)
    vision = job.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    first, second, cached = step_flops(job, passes, vision_flops(weights, patches))
    steps, share = job.recipe.trainer.max_steps, job.model.guide_share
    count = items or steps * job.samples
    flops = steps * (share * first + (1 - share) * second)
    with_cache = steps * (share * first + (1 - share) * cached)
    return {
        "parameters": {"vision": weights.vision, "language": weights.language, "trained": trained},
        "memory": memory(job, weights, passes, trained),
        "flops_per_step": {"first stage": first, "second stage": second, "second stage, cached answers": cached},
        "steps": steps,
        "tokens": steps * job.samples * job.tokens,
        "hours": flops / (tflops * TERA) / 3600,
        "hours_cached": with_cache / (tflops * TERA) / 3600,
        "items": count,
        "caches": {
            "answers, 64 likeliest tokens": count * (16 + ANSWER * (6 * 64 + 4)),
            "one hidden state of them": count * ANSWER * 2 * text.hidden_size,
            "relevance maps": count * (16 + 8 * job.image_tokens),
        },
    }


def show(job: Job, found: dict[str, Any], args: argparse.Namespace, source: str, console: Console) -> None:
    """Tables."""
    total = sum(found["memory"].values())
    table = Table(title=f"memory of a GPU: {job.strategy} on {job.gpus}, batch {job.batch}, {job.tokens} tokens")
    table.add_column("part")
    table.add_column("GiB", justify="right")
    for part, size in found["memory"].items():
        table.add_row(part, f"{size / GIB:.2f}")
    table.add_row("together", f"{total / GIB:.2f}", style="bold")
    console.print(table)
    if total > args.memory * GIB:
        console.print(
            f"more than the {args.memory} GiB of a GPU: take model.recompute=true, a smaller data.batch_size, zero3 or "
            "fsdp2, or more GPUs"
        )
    work = Table(title="work")
    work.add_column("")
    work.add_column("", justify="right")
    sizes = found["parameters"]
    work.add_row("frozen parameters", f"{(sizes['vision'] + sizes['language']) / 1e9:.2f} G ({source})")
    work.add_row("trained parameters", f"{sizes['trained'] / 1e6:.1f} M")
    for stage, flops in found["flops_per_step"].items():
        work.add_row(f"a step of a GPU, {stage}", f"{flops / TERA:.1f} TFLOP")
    work.add_row("steps", f"{found['steps']:,}")
    work.add_row("samples of a step", f"{job.samples}")
    work.add_row("tokens read by the model", f"{found['tokens'] / 1e9:.2f} G")
    work.add_row(f"hours at {args.tflops:g} TFLOP/s of a GPU", f"{found['hours']:.1f}")
    work.add_row("the same with cached answers", f"{found['hours_cached']:.1f}")
    for name, size in found["caches"].items():
        work.add_row(f"cache of {name}, {found['items']:,} items", f"{size / 1e9:.2f} GB")
    console.print(work)


def make_job(args: argparse.Namespace, words: list[str]) -> tuple[Job, str]:
    """Out of the command line; and where the model's configuration came from.

    Raises:
        PruneZooError: It cannot be planned; the message says why.
    """
    sys.argv[1:] = words  # LightningCLI warns where these are not what it is given
    recipe = build(None, ReadOnly).config
    if recipe.model.class_path.rpartition(".")[2] != "DistillModule":
        raise PruneZooError(f"plans are for trainers.training.distill.DistillModule, not for {recipe.model.class_path}")
    if recipe.trainer.max_steps < 1:
        raise PruneZooError("trainer.max_steps must say how long the training is")
    for option in ("gpus", "image_tokens", "text_tokens", "items", "tflops", "memory"):
        value = getattr(args, option)
        if value is not None and value <= 0:
            raise PruneZooError(f"--{option.replace('_', '-')} {value}: must be above 0")
    if recipe.data.init_args.batch_size < 1:
        raise PruneZooError(f"data.batch_size={recipe.data.init_args.batch_size}: at least 1")
    config, source = load_config(recipe.model.init_args.vlm)
    image_tokens = args.image_tokens or getattr(config, "image_seq_length", None)
    if not image_tokens:
        raise PruneZooError(f"{recipe.model.init_args.vlm} does not say how many tokens an image has: --image-tokens")
    job = Job(recipe, config, args.gpus, image_tokens + args.text_tokens, image_tokens)
    if not job.strategy.startswith(STRATEGIES):
        raise PruneZooError(f"trainer.strategy={job.strategy} is not planned: take a file of configs/strategy/")
    return job, source


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    p = argparse.ArgumentParser(
        prog="python -m trainers.plan",
        description="Memory, operations, hours and cache sizes of a training by distillation.",
        epilog="All other words are those of trainers.fit: --config RECIPE, --data.batch_size=4, …",
        allow_abbrev=False,
    )
    p.add_argument("--gpus", type=int, default=1, help="processes, one a GPU")
    p.add_argument("--image-tokens", type=int, help="of a picture; by default what the model's configuration says")
    p.add_argument("--text-tokens", type=int, default=64, help="of a sample, question and answer")
    p.add_argument(
        "--items", type=int, help="of the training set, for the caches; by default as many as are trained on"
    )
    p.add_argument("--tflops", type=float, default=300, help="10^12 operations that a GPU really does in a second")
    p.add_argument("--memory", type=float, default=80, help="GiB of a GPU")
    args, words = p.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    job, source = make_job(args, words)
    show(job, plan(job, args.tflops, args.items), args, source, Console())


if __name__ == "__main__":
    main()
