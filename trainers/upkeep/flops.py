"""Methods of the vision stage at equal operations of the tower, each with its own schedule and with one from a file.

    python -m trainers.schedule read checkpoints/diffrate-tiny --out runs/schedule.json
    python -m trainers.upkeep.flops --schedule runs/schedule.json --json hub_cards/tower/flops.json

A schedule decides how much of a picture each block reads, so at equal tokens behind the tower two of them cost
differently. Here each method is brought down, by `keep`, to the tower's operations that are asked for, as near as whole
tokens allow; what the language model then reads is told beside it. Differences are paired over the same questions.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from prunezoo.core.contract import Pruner
from prunezoo.core.errors import PruneZooError
from prunezoo.core.registry import load_pruner
from prunezoo.core.schedule import Schedule
from prunezoo.host.families import find_family
from trainers.cli.errors import check_output, command
from trainers.cli.names import find_vlm
from trainers.cli.options import add_option, check_at_least_one
from trainers.cli.terminal import Terminal
from trainers.data.suite import SPLITS, load_suite
from trainers.evaluation.budgets import Budget, parse_budget
from trainers.evaluation.flops import planned_tower_share
from trainers.evaluation.journal import Journal
from trainers.evaluation.loading import load_vlm
from trainers.evaluation.methods import PrunerMethod, View
from trainers.evaluation.record import build_record, mean_row, write_record
from trainers.evaluation.run import measure_with_progress
from trainers.evaluation.scores import Measurement
from trainers.evaluation.tables import WIDE

NEAR = 0.01
"""How far from the share that is asked for a method may stay; else it cannot be brought down to it."""
METHODS = ("tome", "gtp", "zero_tprune", "spatten", "token_transforming")
SHARES = ("9/10", "3/4", "1/2")
OTHER = "?schedule="


class AtEqualWork(PrunerMethod):
    """A pruner whose budgets are shares of the tower's operations.

    Args:
        name: of the method, as tables show it.
        pruner: with its schedule.
        vlm: the model.
    """

    def __init__(self, name: str, pruner: Pruner, vlm: Any) -> None:
        super().__init__(name, [pruner])
        self.tower = find_family(vlm).tower()
        self.known: dict[tuple[float, int], tuple[int, float]] = {}

    def reach(self, share: float, tokens: int) -> tuple[int, float]:
        """The tokens that it has to leave of a picture of so many, and the share that this makes, as near as can be."""
        if (share, tokens) not in self.known:
            made = [(planned_tower_share(self.pruners[0], keep, tokens, self.tower), keep) for keep in range(1, tokens)]
            reached, keep = min(made, key=lambda one: abs(one[0] - share))
            self.known[share, tokens] = keep, reached
        return self.known[share, tokens]

    def amount(self, view: View, keep: int | float | str) -> int:
        """See the base class."""
        (tokens,) = set(view.inputs.counts)
        assert isinstance(keep, float)  # a share, as `main` has parsed it
        return self.reach(keep, tokens)[0]


def methods_of(names: Sequence[str], schedule: Path, vlm: Any) -> list[AtEqualWork]:
    """Each method as it is, and with the schedule."""
    learned, made = Schedule.load(schedule), []
    for name in names:
        own, other = load_pruner(name).eval(), load_pruner(name).eval()
        other.given_schedule = learned
        made += [AtEqualWork(name, own, vlm), AtEqualWork(f"{name}{OTHER}{learned.made_by}", other, vlm)]
    return made


def shares_of(words: Sequence[str]) -> list[Budget]:
    """Shares below 1.

    Raises:
        PruneZooError: Something else.
    """
    budgets = [parse_budget(word) for word in words]
    for budget in budgets:
        if not isinstance(budget.keep, float) or budget.keep >= 1:
            raise PruneZooError(f"--share {budget.label}: write a share of the tower's operations below 1, as 1/2")
    return budgets


def table_of(record: dict[str, Any]) -> Table:
    """Rows by share and method."""
    table = Table("tower", "method", "tokens", "tower + language model", "retention", "with the schedule: points")
    paid = {(row["pruner"], row["rival"], row["keep"]): row for row in record["paired"]}
    for entry in record["tower"]:
        name, label = entry["pruner"], entry["keep"]
        row = mean_row(record, name, label)
        gain = paid.get((name, name.partition(OTHER)[0], label))
        points = "" if gain is None else f"{gain['difference']:+.1f} ({gain['ci'][0]:+.1f} to {gain['ci'][1]:+.1f})"
        low, high = row["ci"]
        table.add_row(
            f"{entry['reached']:.3f}", name, f"{row['tokens']:.0f}", f"{row['flops']:.3f}",
            f"{row['retention']:.1f} ({low:.1f}–{high:.1f})", points,
        )  # fmt: skip
    return table


def run(args: argparse.Namespace, command_line: str, console: Console) -> None:
    """Measure, write, print."""
    check_output("--json", args.json)
    check_at_least_one(args, "batch-size")
    shares, suite = shares_of(args.share), load_suite(args.suite, args.split, args.limit)
    model = find_vlm(args.vlm)
    vlm, processor = load_vlm(model)
    methods = methods_of(args.pruner, args.schedule, vlm)
    journals: list[Journal] = []
    tokens = (vlm.config.vision_config.image_size // vlm.config.vision_config.patch_size) ** 2
    tower: list[dict[str, Any]] = []
    measured: Measurement | None = None
    schedule = Schedule.load(args.schedule).to_dict()
    for share in shares:
        assert isinstance(share.keep, float)
        reached = {method: method.reach(share.keep, tokens) for method in methods}
        able = [method for method, (_, made) in reached.items() if abs(made - share.keep) < NEAR]
        for method in methods:
            if method not in able:
                console.print(f"{method.name} cannot bring the tower to {share.label} of its operations", markup=False)
        here: list[dict[str, Any]] = [
            {"pruner": method.name, "keep": share.label, "left": reached[method][0], "reached": reached[method][1]}
            for method in able
        ]
        facts = [suite.fingerprint(), len(suite), model, args.split, schedule, here]
        path = args.json.with_name(f"{args.json.name}.{share.label.replace('/', '-')}.partial.npz")
        journals.append(Journal(path, json.dumps(facts)))
        found = measure_with_progress(vlm, processor, suite, able, [share], args.batch_size, journals[-1], console)
        measured = found if measured is None else replace(measured, scores={**measured.scores, **found.scores})
        tower += here
    assert measured is not None  # argparse wants a share
    header = {
        "vlm": model, "suite": suite.name, "suite_version": suite.version, "split": args.split, "seed": 0,
        "command": command_line, "schedule": schedule, "tower": tower,
    }  # fmt: skip
    record = build_record(measured, [entry["pruner"] for entry in tower if OTHER in entry["pruner"]], header)
    write_record(record, args.json)
    for journal in journals:
        journal.remove()
    console.print(table_of(record))
    console.print(f"numbers: {args.json}")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    p = argparse.ArgumentParser(
        prog="python -m trainers.upkeep.flops", description="Methods in the tower, at equal operations of it."
    )
    add_option(p, "vlm", default="tiny-llava")
    add_option(p, "pruner", default=list(METHODS), help="methods of the vision stage")
    p.add_argument("--schedule", required=True, type=Path, help="file that each of them takes in turn")
    p.add_argument("--share", nargs="+", default=list(SHARES), help="of the bare tower's operations, as 1/2")
    add_option(p, "suite", default="scenes")
    add_option(p, "split", choices=SPLITS)
    add_option(p, "limit", default=2100)
    add_option(p, "batch-size", default=32)
    add_option(p, "json", required=True, help="file for the numbers; an interrupted run goes on")
    args = p.parse_args(argv)
    words = ["python", "-m", "trainers.upkeep.flops", *(sys.argv[1:] if argv is None else argv)]
    run(args, shlex.join(words), Terminal(width=None if sys.stdout.isatty() else WIDE))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
