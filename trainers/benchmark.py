"""Measure how fast a model is under pruners, part by part, beside the bare model.

    python -m trainers.benchmark --vlm V --pruner P [P2 …] --keep 192 1/9 [--batch 1 4] [--length 64 …] [--json F]

Every number is a ratio against the bare model, measured alternating with it. `V` is a folder, a Hub id, or a model made
up of a given size, `random:llava-120m`: how long a model takes does not depend on its weights. A learned method may be
named by its registry name: it is then built, untrained, for the model's width.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence

from prunezoo.core.registry import list_pruners
from trainers.benchmarking.models import RANDOM, SIZES
from trainers.benchmarking.run import run
from trainers.cli.errors import command
from trainers.cli.options import add_option
from trainers.cli.terminal import Terminal
from trainers.evaluation.tables import WIDE


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m trainers.benchmark",
        description="Measure speed and memory under pruners, part by part, alternating with the unpruned model.",
        epilog="`full` is measured always: attached with every token kept, it shows what attaching itself costs.",
    )
    made_up = ", ".join(RANDOM + name for name in SIZES)
    add_option(p, "vlm", required=True, help=f"folder, Hub id, tiny-llava, or with random weights: {made_up}")
    add_option(
        p,
        "pruner",
        help=f"folders, Hub ids, shipped ones (ppm-tiny), names ({', '.join(list_pruners())})",
    )
    add_option(p, "keep", default=["1/3", "1/9"])
    add_option(p, "batch", nargs="+", default=[1])
    p.add_argument("--length", nargs="+", type=int, default=[64], help="text tokens of a prompt, beside the image's")
    p.add_argument("--decode", type=int, default=16, help="new tokens of an answer")
    p.add_argument("--repeats", type=int, default=10, help="times that each case is run beside the bare model")
    p.add_argument("--picture", default="640x480", help="width and height of the pictures in pixels")
    p.add_argument("--compile", action="store_true", help="time each learned pruner compiled by torch, too")
    for name in ("json", "device", "dtype"):
        add_option(p, name)
    return p


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, 2 after a mistake that the user can mend, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        run(
            parser().parse_args(argv),
            shlex.join(["python", "-m", "trainers.benchmark", *argv]),
            Terminal(width=None if sys.stdout.isatty() else WIDE),
        )
    except KeyboardInterrupt:
        print("stopped; what was measured stands above, no file was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
