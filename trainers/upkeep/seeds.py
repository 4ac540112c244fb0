"""What a training gains over others in the mean of its seeds, from the record of one evaluation.

    python -m trainers.upkeep.seeds RECORD --of policy=runs/p_1,runs/p_2 --of control=runs/c_1,runs/c_2 [--json F]

Each `--of` names a training and its pruners, one a seed, by the names that the record has. For each budget: the mean
retention of each, from the lowest to the highest seed, and by how much the first is above each other, with the 95 %
interval over the questions.
"""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from prunezoo.core.errors import PruneZooError
from trainers.cli.errors import check_output, command
from trainers.cli.options import add_option
from trainers.cli.terminal import Terminal
from trainers.evaluation.answers import join_answers
from trainers.evaluation.record import read_record, write_record
from trainers.evaluation.same_suite import SUITE, suite_of
from trainers.evaluation.seeds import difference_of, mean_of

Trainings = Mapping[str, Sequence[str]]


def trainings(words: Sequence[str]) -> dict[str, list[str]]:
    """Pruners by training, from `NAME=PRUNER,PRUNER`.

    Raises:
        PruneZooError: There are fewer than two, one has no name or no pruner, or two have one name.
    """
    found: dict[str, list[str]] = {}
    for word in words:
        name, _, pruners = word.partition("=")
        if not name or not all(each := pruners.split(",")):
            raise PruneZooError(f"--of {word}: write NAME=PRUNER,PRUNER")
        if name in found:
            raise PruneZooError(f"--of {word}: '{name}' is there already")
        found[name] = each
    if len(found) < 2:
        raise PruneZooError("--of: name two trainings or more, to tell the first from the others")
    return found


def rows_of(record: Mapping[str, Any], asked: Trainings, path: Path) -> list[dict[str, Any]]:
    """`{keep, training, seeds, retention, of_seeds, difference, ci}` for each budget and training.

    The difference is the first training's to this one; None in its own row.

    Raises:
        PruneZooError: The record lacks a pruner, or its questions tell too little.
    """
    answers = join_answers([record])
    names = [name for pruners in asked.values() for name in pruners]
    there = list(dict.fromkeys(name for name, _ in answers.right))
    for name in names:
        if name not in there:
            raise PruneZooError(f"--of {name}: {path} has no such pruner; it has: {', '.join(there)}")
    budgets = list(record["answers"]["right"][names[0]])
    if short := [name for name in names if list(record["answers"]["right"][name]) != budgets]:
        raise PruneZooError(f"--of {short[0]}: {path} has it at other budgets than {names[0]}")
    keys = [(name, keep) for name in names for keep in budgets]
    resampled = answers.resample(keys)
    points, draws = resampled.retention()[:, -1], resampled.retention_draws()[:, -1]
    if np.isnan(points).any():
        raise PruneZooError(f"{path}: too few questions to tell the model from a blind one; ask more")
    first, rows = next(iter(asked)), []
    for keep in budgets:
        of = {training: [keys.index((name, keep)) for name in pruners] for training, pruners in asked.items()}
        for training, own in of.items():
            row: dict[str, Any] = {"keep": keep, "training": training, "seeds": len(own), **mean_of(points, own)}
            row |= {"difference": None, "ci": None}
            rows.append(row if training == first else row | difference_of(points, draws, of[first], own))
    return rows


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m trainers.upkeep.seeds", description="Tell trainings apart over seeds.")
    p.add_argument("record", type=Path, help="as trainers.evaluate --json writes it")
    p.add_argument("--of", action="append", required=True, metavar="NAME=PRUNER,PRUNER", help="a training's seeds")
    add_option(p, "json", help="file for the numbers")
    return p


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser().parse_args(argv)
    asked = trainings(args.of)
    if args.json:
        check_output("--json", args.json)
    record = read_record(args.record)
    rows = rows_of(record, asked, args.record)
    table = Table(title=f"{record['suite']} {record['split']}, {record['n']} questions; mean over the seeds")
    first = next(iter(asked))
    for column in ("keep", "training", "seeds", "retention: mean, lowest to highest", f"{first} above it"):
        table.add_column(column, justify="left" if column == "training" else "right")
    for row in rows:
        spread = f"{row['retention']:.1f}, {min(row['of_seeds']):.1f} to {max(row['of_seeds']):.1f}"
        apart = "" if row["ci"] is None else f"{row['difference']:+.1f} ({row['ci'][0]:+.1f} to {row['ci'][1]:+.1f})"
        table.add_row(row["keep"], row["training"], str(row["seeds"]), spread, apart)
    Terminal().print(table)
    if args.json:
        facts = {"command": shlex.join(["python", "-m", "trainers.upkeep.seeds", *argv]), "record": record["command"]}
        facts |= {name: record[name] for name in ("vlm", "split", "n")}
        facts |= dict(zip(SUITE, suite_of(record), strict=True))
        write_record({**facts, "rows": rows}, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
