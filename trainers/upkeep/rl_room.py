"""How much better a choice of tokens could be among those that a policy would draw: the room that RL has.

    python -m trainers.upkeep.rl_room --pruner ppm-tiny --keep 1/72 1/36 1/18 --draws 16 --limit 1050 --json F

At each budget the pruner's own choice (its best scores) stands beside subsets that are drawn by its scores, as training
by policy gradient draws them, and beside subsets drawn by lot: the mean of the draws, and the best of them, in which a
question counts as right where any draw is. The best is found by the answers, so it says how much there is to learn from
such draws, and is no pruner; what lies in luck alone, the best by lot says. With `--json` a run that was stopped goes
on with the same command, in batches of any size.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from prunezoo.core.base_model import check_base_model
from prunezoo.core.errors import PruneZooError
from prunezoo.core.registry import load_pruner
from trainers.cards.parts import weights_digest
from trainers.cli.errors import check_output, command
from trainers.cli.lock import hold
from trainers.cli.names import FRONTS, find_pruner, find_vlm, folder_named
from trainers.cli.options import add_option, check_at_least_one
from trainers.cli.terminal import Terminal, progress_bar
from trainers.data.suite import SPLITS, Suite
from trainers.evaluation.answers import answers_of
from trainers.evaluation.budgets import parse_budgets
from trainers.evaluation.drawn import Ways, measure_drawn, passes
from trainers.evaluation.draws import Draws
from trainers.evaluation.journal import Journal
from trainers.evaluation.loading import load_vlm
from trainers.evaluation.record import MEAN, Row, paired_of, rows_of, select, sight_of, versions, write_record
from trainers.evaluation.run import read_suite
from trainers.evaluation.scores import ALL_TOKENS, FULL, NO_TOKENS, NONE, Measurement, is_diagnostic
from trainers.evaluation.sight import notes_of
from trainers.evaluation.statistics import interval, resample
from trainers.evaluation.tables import WIDE, display_name, percent, span


def measured_parts(measurement: Measurement, ways: Ways) -> dict[str, Any]:
    """What a record has of a measurement.

    Returns:
        `groups`, `chance`, `sight`, `rows`, `paired` and `answers` as `trainers.evaluate` writes them, for the names of
        ``ways`` in place of pruners. Rows have `accuracy_ci` besides, in [0, 1]: 95 % over the questions. In pairs
        stand the mean and the best of the draws, against each other way.
    """
    correct = np.stack([scores.correct for scores in measurement.scores.values()])
    full, none = measurement.scores[FULL, ALL_TOKENS].correct, measurement.scores[NONE, NO_TOKENS].correct
    resampled = resample(correct, full, measurement.group_of, len(measurement.groups), none=none)
    # each way at each budget: (groups, resamples), the mean over groups last
    draws = np.concatenate([resampled.accuracy_draws, resampled.accuracy_draws.mean(1, keepdims=True)], axis=1)
    ends = [[round(end, 6) for end in interval(drawn)] for method in draws for drawn in method]
    rows = [{**row, "accuracy_ci": own} for row, own in zip(rows_of(measurement, resampled), ends, strict=True)]
    return {
        "groups": list(measurement.groups),
        "chance": {group: measurement.chance.get(group) for group in measurement.groups},
        "sight": sight_of(measurement, resampled),
        "rows": rows,
        "paired": paired_of(list(measurement.scores), resampled, (ways.mean, ways.best)),
        "answers": answers_of(measurement),
    }


def show(record: dict[str, Any], ways: Ways, console: Console) -> None:
    """Print the table, and what there is to say beside it."""
    title = (
        f"{record['suite']} {record['split']}, {record['n']} questions, draws at temperature {record['temperature']:g}"
    )
    table = Table(title=title)
    for column in ("keep", "tokens", "subsets", "accuracy, %", "retention, %", "points above the choice"):
        table.add_column(column, justify="left" if column == "subsets" else "right")
    above = {(row["pruner"], row["keep"]): row for row in record["paired"] if row["rival"] == ways.chosen}
    for row in select(record, group=MEAN):
        low, high = (100 * end for end in row["accuracy_ci"])
        accuracy = f"{100 * row['accuracy']:.1f} ({low:.1f}–{high:.1f})"
        retention = f"{percent(row['retention'])} ({span(row)})"
        name = f"chosen by {display_name(ways.chosen)}" if row["pruner"] == ways.chosen else row["pruner"]
        pair = _difference(above.get((row["pruner"], row["keep"])))
        table.add_row(row["keep"], f"{row['tokens']:.1f}", name, accuracy, retention, pair)
    console.print(table)
    for note in notes_of(record):
        console.print(note)


def _difference(pair: Row | None) -> str:
    """`+3.1 (+1.0 … +5.2)`; nothing where no pair or no retention is."""
    if pair is None or pair["difference"] is None:
        return ""
    return f"{pair['difference']:+.1f} ({pair['ci'][0]:+.1f} … {pair['ci'][1]:+.1f})"


def journal_of(args: argparse.Namespace, suite: Suite, dtype: str, draws: Draws) -> Journal | None:
    """Where an interrupted run goes on from, beside the JSON; None where none is asked for."""
    if not args.json:
        return None
    digests = [weights_digest(args.vlm), weights_digest(folder_named(args.pruner))]
    facts = [args.vlm, args.pruner, dtype, *digests, args.keep, vars(draws), args.suite_option]
    asked = [suite.name, suite.version, suite.split, len(suite), suite.fingerprint()]
    return Journal(args.json.with_name(f"{args.json.name}.partial.npz"), json.dumps([*facts, *asked]))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m trainers.upkeep.rl_room", description="Measure the room that reinforcement learning has."
    )
    add_option(p, "pruner", nargs=None, default="ppm-tiny", help="of the prompt stage, with scores")
    add_option(p, "vlm", default="tiny-llava")
    add_option(p, "suite", nargs="+", default=["scenes"])
    for name, own in {"suite-option": {}, "split": {"choices": SPLITS}, "limit": {}}.items():
        add_option(p, name, **own)
    add_option(p, "keep", default=["1/72", "1/36", "1/18"])
    p.add_argument("--draws", type=int, default=16, help="subsets of each question and budget")
    p.add_argument("--temperature", type=float, default=1.0, help="scores are divided by it before they are drawn by")
    p.add_argument("--seed", type=int, default=0, help="of the draws")
    for name in ("batch-size", "device", "dtype", "json"):
        add_option(p, name)
    return p


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args, console = parser().parse_args(argv), Terminal(width=None if sys.stdout.isatty() else WIDE)
    check_at_least_one(args, "batch-size")
    check_output("--json", args.json)
    budgets, draws = parse_budgets(args.keep), Draws(args.draws, args.temperature, args.seed)
    args.vlm, args.pruner = find_vlm(args.vlm), find_pruner(args.pruner)
    if is_diagnostic(args.pruner) or args.pruner.startswith(FRONTS):
        raise PruneZooError(f"--pruner {args.pruner}: this is for a pruner as it is: take one like ppm-tiny")
    suite = read_suite(args.suite, args.suite_option, args.split, args.limit)
    hold("--json", args.json)
    pruner = load_pruner(args.pruner).eval()
    vlm, processor = load_vlm(args.vlm, args.device, args.dtype)
    check_base_model(args.pruner, pruner.base_model, vlm)
    pruner.to(vlm.device)
    journal = journal_of(args, suite, str(vlm.dtype), draws)
    with progress_bar(console, "answers") as bar:
        task = bar.add_task(f"{suite.name} {suite.split}", total=len(suite) * passes(budgets, draws))
        found = measure_drawn(
            vlm, processor, suite, args.pruner, pruner, budgets, draws, args.batch_size,
            lambda answers: bar.advance(task, answers), journal,
        )  # fmt: skip
    ways, digest = Ways.of(args.pruner, draws.number), weights_digest(folder_named(args.pruner))
    record = {
        "vlm": args.vlm,
        "pruner": args.pruner,
        "suite": suite.name,
        "suite_version": suite.version,
        **({"scorer": suite.scorer} if suite.scorer else {}),
        "split": args.split,
        "n": found.items,
        "draws": draws.number,
        "temperature": draws.temperature,
        "seed": draws.seed,
        "command": shlex.join(["python", "-m", "trainers.upkeep.rl_room", *argv]),
        "versions": versions(),
        "weights": {args.pruner: digest} if digest else {},
        **measured_parts(found, ways),
    }
    if args.json:
        write_record(record, args.json)
    if journal:
        journal.remove()
    show(record, ways, console)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
