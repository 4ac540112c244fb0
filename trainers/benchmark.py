"""Measure how fast a model is under pruners, part by part, beside the bare model.

    python -m trainers.benchmark --vlm V --pruner P [P2 …] --keep 192 1/9 [--batch 1 4] [--length 64 …] [--json F]

Every number is a ratio against the bare model, run in turns with it. `V` is a folder, a Hub id, or a model made up of a
given size, `random:llava-120m`: how long a model takes does not depend on its weights. A learned method may be named by
its registry name: it is then built, untrained, for the model's width.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from prunezoo.core.errors import PruneZooError
from prunezoo.core.registry import list_pruners
from prunezoo.host import attach
from trainers.benchmarking.measure import Setting, cases_of
from trainers.benchmarking.models import RANDOM, SIZES, Request, load_for_timing, load_model
from trainers.benchmarking.tables import print_record
from trainers.cli.errors import check_output, command
from trainers.cli.lock import hold
from trainers.cli.names import find_pruner, find_vlm
from trainers.cli.options import add_option, check_at_least_one
from trainers.evaluation.budgets import parse_budgets
from trainers.evaluation.loading import device_name
from trainers.evaluation.record import versions, write_record
from trainers.evaluation.tables import WIDE


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m trainers.benchmark",
        description="Measure speed and memory under pruners, part by part, in turns with the bare model.",
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
    for name in ("json", "device", "dtype"):
        add_option(p, name)
    return p


def picture_size(text: str) -> tuple[int, int]:
    """Width and height out of `640x480`."""
    width, _, height = text.partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise PruneZooError(f"--picture {text}: write width and height in pixels, as 640x480")
    return int(width), int(height)


def check(args: argparse.Namespace) -> None:
    """Refuse numbers that mean nothing, and a place that nothing can be written to."""
    check_at_least_one(args, "batch", "length", "decode", "repeats")
    check_output("--json", args.json)


def run(args: argparse.Namespace, command_line: str, console: Console) -> dict[str, Any]:
    """Measure, print, and write what was asked for; gives the record back. Ctrl-C prints what there is."""
    check(args)
    hold("--json", args.json)
    args.vlm = find_vlm(args.vlm)
    picture = picture_size(args.picture)
    budgets = parse_budgets(args.keep)
    vlm, processor = load_model(args.vlm, args.device, args.dtype)
    width = vlm.config.get_text_config().hidden_size
    named = [name if name in list_pruners() else find_pruner(name) for name in args.pruner]  # `ppm` is built untrained
    pruners = [(name, load_for_timing(name, width).to(vlm.device)) for name in dict.fromkeys(named)]
    for _, pruner in pruners:
        attach(vlm, pruner, budgets[0].keep)  # refuses here and now what it cannot do
    settings = [
        Setting(
            vlm, Request(vlm, processor, batch, length, picture), cases_of(pruners, budgets), args.decode, args.repeats
        )
        for batch in dict.fromkeys(args.batch)
        for length in dict.fromkeys(args.length)
    ]

    def record() -> dict[str, Any]:
        return {
            "vlm": args.vlm,
            "command": command_line,
            "versions": versions(),
            "device": device_name(vlm.device),
            "dtype": str(vlm.dtype).removeprefix("torch."),
            "decode": args.decode,
            "repeats": args.repeats,
            "rows": [row for setting in settings for row in setting.rows()],
            "overhead": [overhead for setting in settings if (overhead := setting.overhead())],
        }

    names = ", ".join(name for name, _ in pruners) or "attach alone"
    console.print(f"measuring {names} in turns with the bare {args.vlm} on {device_name(vlm.device)}")
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("requests"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    try:
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("", total=sum(setting.steps for setting in settings))
            for setting in settings:
                batch = len(setting.request.items)
                progress.update(task, description=f"batch {batch}, {setting.request.length} text tokens")
                setting.measure(lambda: progress.advance(task))
    except KeyboardInterrupt:
        print_record(record(), console)
        raise
    result = record()
    print_record(result, console)
    if args.json:
        write_record(result, args.json)
        console.print(f"numbers: {args.json}")
    return result


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, 2 after a mistake that the user can mend, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        run(
            parser().parse_args(argv),
            shlex.join(["python", "-m", "trainers.benchmark", *argv]),
            Console(width=None if sys.stdout.isatty() else WIDE),
        )
    except KeyboardInterrupt:
        print("stopped; what was measured stands above, no file was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
