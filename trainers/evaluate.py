"""Measure pruners on a suite.

    python -m trainers.evaluate --vlm V --pruner P [P2 …] --keep 192 128 1/9 --suite S [--json F] [--report DIR]
    python -m trainers.evaluate … --suite llava-json questions.json --suite-option images=DIR scorer=exact

A pruner is a registry name (`divprune`), a folder or a Hub id, perhaps with config fields (`FOLDER?adaptive=false`);
`oracle`, `relevance` and `attention@L` are diagnostics; `random@NAME` is random choice at the places of a method inside
the vision tower; `fixed:NAME` keeps 64 tokens of every image at `auto:64`, where NAME would choose for each.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from trainers.cli.errors import command
from trainers.cli.names import find_pruner, find_vlm
from trainers.cli.options import add_option
from trainers.cli.terminal import Terminal
from trainers.data.suite import SPLITS, list_suites
from trainers.evaluation.methods import RIVALS
from trainers.evaluation.run import run
from trainers.evaluation.tables import WIDE


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m trainers.evaluate",
        description="Measure pruners on a suite, beside the full model and zero tokens.",
    )
    add_option(p, "vlm", required=True)
    add_option(p, "pruner", help="methods (divprune), shipped pruners (ppm), folders, Hub ids, diagnostics")
    add_option(
        p,
        "keep",
        default=["1/3", "2/9", "1/9", "1/18"],
        help="tokens (64), shares (1/9, 0.25), or what a pruner sets itself (auto, auto:64)",
    )
    add_option(
        p,
        "suite",
        nargs="+",
        required=True,
        help=f"one of {', '.join(list_suites())}, with a file or id; module:Class",
    )
    add_option(p, "suite-option")
    add_option(p, "split", choices=SPLITS)
    add_option(p, "limit")
    p.add_argument("--rivals", action="store_true", help=f"add those of {', '.join(RIVALS)} that this model can have")
    p.add_argument(
        "--instrument", action="store_true", help="add oracle, random and every attention, and judge model and suite"
    )
    p.add_argument(
        "--equal-tokens",
        action="store_true",
        help="--keep is the mean over the decoder's layers, also for methods that prune between them",
    )
    p.add_argument(
        "--compare", nargs="+", default=[], metavar="P", help="pruners that, as the first, are compared with all others"
    )
    add_option(p, "json", help="write rows and paired differences here")
    add_option(p, "report")
    p.add_argument("--examples", type=int, default=2, help="pictures of each group in the report")
    p.add_argument("--card", type=Path, help="write the model card of this checkpoint folder from what is measured")
    p.add_argument("--any-model", action="store_true", help="take pruners that were trained for another model too")
    p.add_argument("--seed", type=int, default=0, help="moves only what is random in a method")
    p.add_argument("--devices", type=int, default=1, help="processes that share the work, each with its own GPU")
    for name in ("batch-size", "device", "dtype"):
        add_option(p, name)
    return p


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, 2 after a mistake that the user can mend, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        args = parser().parse_args(argv)
        args.vlm, args.pruner = find_vlm(args.vlm), [find_pruner(name) for name in args.pruner]
        args.compare = [find_pruner(name) for name in args.compare]
        run(
            args,
            shlex.join(["python", "-m", "trainers.evaluate", *argv]),
            Terminal(width=None if sys.stdout.isatty() else WIDE),
        )
    except KeyboardInterrupt:
        print("stopped; with --json the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
