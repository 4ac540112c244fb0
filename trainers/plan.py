"""What a training by distillation will need, before anything is loaded or rented.

    python -m trainers.plan --config configs/ppm_llava.yaml [--config configs/strategy/zero3.yaml] --gpus 8

prints memory of a GPU by part, operations, hours, tokens, and sizes of caches, from the recipe and the configuration of
the frozen model alone. Keys of the recipe can be overridden as for `trainers.fit`.

What it leaves out: the pruner's own activations, and what CUDA, NCCL and the allocator take for themselves.
"""

import argparse
import sys
from collections.abc import Sequence

from prunezoo.core.errors import PruneZooError
from trainers.cli.errors import command
from trainers.cli.terminal import Terminal
from trainers.fit import FitCLI, build
from trainers.planning.job import Job, plan
from trainers.planning.models import load_config
from trainers.planning.tables import show

STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")
"""Begin the names of those whose memory is known."""


class ReadOnly(FitCLI):
    """Parses a recipe, and makes nothing of it."""

    def instantiate_classes(self) -> None:
        """Not here."""


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
    show(job, plan(job, args.tflops, args.items), args.memory, args.tflops, source, Terminal())


if __name__ == "__main__":
    main()
