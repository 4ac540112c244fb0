"""Calibrate how many tokens a scorer keeps of each image: `keep="auto:64"`, for scorers trained as distributions.

    python -m trainers.calibrate --vlm tiny-llava --pruner runs/ppm --suite scenes --mean 16 8 32

An image then keeps the fewest tokens that hold enough of the probability; how much is enough for a mean of so many
tokens is measured on the suite's validation split and written into the pruner's `config.json`. Means in between need no
run of their own. Tower and scorer read each item once; the language model only if the scorer needs it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from prunezoo.core.contract import Pruner
from prunezoo.core.errors import PruneZooError
from prunezoo.core.mass import Mass, tails
from prunezoo.core.registry import load_pruner, split_options
from prunezoo.host import encode, encode_needs
from trainers.cli.errors import command
from trainers.cli.names import find_pruner, find_vlm
from trainers.cli.options import add_option, check_at_least_one
from trainers.cli.terminal import Terminal
from trainers.data.conversation import ConversationCollator
from trainers.data.suite import Suite, list_suites
from trainers.evaluation.loading import load_vlm
from trainers.evaluation.run import read_suite


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m trainers.calibrate",
        description="Find what keep='auto:64' means for a scorer that was trained as a distribution, and save it.",
    )
    add_option(p, "vlm", required=True)
    add_option(
        p,
        "pruner",
        nargs=None,
        default=None,
        required=True,
        help="a folder, a shipped one (ppm), or a Hub id with --output",
    )
    add_option(p, "suite", nargs="+", required=True, help=f"one of {', '.join(list_suites())}")
    add_option(p, "suite-option")
    add_option(p, "split", default="validation", choices=("validation", "train"), help="never the test split")
    add_option(p, "limit")
    p.add_argument(
        "--mean", type=int, nargs="+", required=True, help="tokens in the mean over items; 'auto' stands for the first"
    )
    p.add_argument("--output", type=Path, help="save the calibrated pruner here, not into its own folder")
    for name in ("batch-size", "device", "dtype"):
        add_option(p, name)
    return p


@torch.no_grad()
def tails_of(
    vlm: Any, processor: Any, pruner: Pruner, suite: Suite, batch_size: int, console: Terminal
) -> list[Tensor]:
    """What the tokens of each image hold together with all that are less likely, (N,) each, see :func:`tails`."""
    collate, found = ConversationCollator(processor), []
    dtype = next(pruner.parameters()).dtype
    for start in track(range(0, len(suite), batch_size), f"{suite.name} {suite.split}", console=console):
        batch = collate(suite[start : start + batch_size])
        inputs = encode(vlm, batch, encode_needs(pruner)).inputs.to(dtype)
        for row, valid in zip(tails(pruner.score(inputs), inputs.valid).cpu(), inputs.valid.cpu(), strict=True):
            found.append(row[: int(valid.sum())])
    return found


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args, console = parser().parse_args(sys.argv[1:] if argv is None else list(argv)), Terminal()
    check_at_least_one(args, "batch-size", "mean")
    source = find_pruner(args.pruner)
    folder = args.output or Path(split_options(source)[0])
    if not args.output and not folder.is_dir():
        raise PruneZooError(f"--pruner {args.pruner} is no folder: name one to save it into with --output")
    suite = read_suite(args.suite, args.suite_option, args.split, args.limit)
    vlm, processor = load_vlm(find_vlm(args.vlm), args.device, args.dtype)
    pruner = load_pruner(source, vlm=vlm).to(vlm.device)
    if not pruner.distribution:
        raise PruneZooError(
            f"--pruner {args.pruner}: '{pruner.name}' is no distribution over tokens"
            + (", and sets its budgets itself" if pruner.sets_budgets else "")
        )
    items = tails_of(vlm, processor, pruner, suite, args.batch_size, console)
    pruner.mass = Mass.calibrate(items, args.mean)
    for mean, left_out in pruner.mass.left_out.items():
        counts = torch.stack([(item > left_out).sum() for item in items]).double()
        console.print(
            f"auto:{mean}: {counts.mean():.2f} tokens in the mean over {len(items)} images, from {counts.min():.0f} to "
            f"{counts.max():.0f}, which hold {1 - left_out:.6g} of the probability",
            soft_wrap=True,
        )
    console.print(f"saved: {pruner.save_pretrained(folder)}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
