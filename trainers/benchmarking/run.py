"""What `trainers.benchmark` does: measure in turns, write the numbers, print."""

import argparse
from copy import deepcopy
from itertools import product
from typing import Any

from rich.console import Console

from prunezoo.core.base_model import BaseModel
from prunezoo.core.compiled import compile_pruner, networks
from prunezoo.core.errors import PruneZooError
from prunezoo.core.prefill import Prefill
from prunezoo.core.registry import list_pruners
from prunezoo.host import attach
from trainers.cli.errors import check_output
from trainers.cli.lock import hold
from trainers.cli.names import find_pruner, find_vlm
from trainers.cli.options import check_at_least_one
from trainers.cli.terminal import progress_bar
from trainers.evaluation.budgets import parse_budgets
from trainers.evaluation.loading import device_name
from trainers.evaluation.record import versions, write_record

from .measure import Setting, cases_of
from .models import Request, load_for_timing, load_model
from .tables import print_record

COMPILED = "compiled"
"""Behind the name of a pruner: its networks are compiled by torch."""


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
    args.vlm = find_vlm(args.vlm)
    picture = picture_size(args.picture)
    budgets = parse_budgets(args.keep)
    hold("--json", args.json)
    vlm, processor = load_model(args.vlm, args.device, args.dtype)
    model = BaseModel.describe(vlm)
    methods = list_pruners()  # `ppm`, or `ppm?hidden=64`, is built untrained
    named = [name if name.partition("?")[0] in methods else find_pruner(name) for name in args.pruner]
    sizes = model.width, model.tower_width, Prefill.of(vlm.config)
    pruners = [(name, load_for_timing(name, *sizes).to(vlm.device)) for name in dict.fromkeys(named)]
    if args.compile:
        again = [(f"{name} {COMPILED}", deepcopy(pruner)) for name, pruner in pruners if any(networks(pruner))]
        pruners += [(name, compile_pruner(pruner)) for name, pruner in again]
    for budget, (_, pruner) in product(budgets, pruners):
        with attach(vlm, pruner, budget.keep):  # refuses here and now what it cannot do
            pass
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
    console.print(f"measuring {names} alternating with the unpruned {args.vlm} on {device_name(vlm.device)}")
    try:
        with progress_bar(console, "requests") as progress:
            task = progress.add_task("", total=sum(setting.steps for setting in settings))
            for setting in settings:
                batch = len(setting.request.items)
                progress.update(task, description=f"batch {batch}, {setting.request.length} text tokens")
                setting.measure(lambda: progress.advance(task))
    except KeyboardInterrupt:
        print_record(record(), console)
        raise
    result = record()
    if args.json:
        write_record(result, args.json)  # first: whatever fails afterwards, the numbers are there
    print_record(result, console)
    if args.json:
        console.print(f"numbers: {args.json}")
    return result
