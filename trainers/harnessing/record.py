"""What lmms-eval said of several runs, as one record of the kind that `trainers.evaluate` writes.

Tasks take the place of question groups. Those of which the questions' scores are the parts of the figure have
accuracy, retention, intervals and paired differences; all figures of all tasks, as lmms-eval says them, are in
`benchmarks`. Agreement, KL and operations are not known.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from prunezoo.core.errors import PruneZooError
from trainers.evaluation.record import build_record
from trainers.evaluation.scores import ALL_TOKENS, FULL, NO_TOKENS, NONE, ItemScores, Key, Measurement
from trainers.evaluation.tables import display_name, percent

from .jobs import Job, Outcome, Result

SUITE = "lmms-eval"


def benchmarks_of(results: Mapping[Job, Result]) -> list[dict[str, Any]]:
    """`{pruner, keep, task, metric, value, full, tokens}` for each figure; `full` is the full model's."""
    full: dict[tuple[str, str], float] = {}
    rows = []
    for job, result in results.items():
        for outcome in result.outcomes:
            for metric, value in outcome.metrics.items():
                if job.pruner == FULL:
                    full[outcome.task, metric] = value
                own = {"pruner": job.pruner, "keep": job.keep, "task": outcome.task, "metric": metric}
                rows.append({**own, "value": value, "full": full.get((outcome.task, metric)), "tokens": result.tokens})
    return rows


def record_of(
    results: Mapping[Job, Result], contenders: Sequence[str], header: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The record; None where no task has scores of its questions.

    Args:
        results: of all runs, the full model's and that of zero tokens among them.
        contenders: methods that are compared in pairs with every other.
        header: vlm, command, weights and what else names the command.

    Raises:
        PruneZooError: runs asked other questions.
    """
    keys = list(dict.fromkeys((job.pruner, job.keep) for job in results))
    found: dict[Key, list[tuple[Outcome, float]]] = {key: [] for key in keys}
    for job, result in results.items():
        found[job.pruner, job.keep] += [(outcome, result.tokens) for outcome in result.outcomes]
    scored = [
        outcome.task
        for outcome, _ in found[FULL, ALL_TOKENS]
        if all(any(own.task == outcome.task and own.metric for own, _ in found[key]) for key in keys)
    ]
    if not scored:
        return None
    asked = {outcome.task: outcome.ids for outcome, _ in found[FULL, ALL_TOKENS]}
    scores: dict[Key, ItemScores] = {}
    for key in keys:
        parts = {outcome.task: (outcome, tokens) for outcome, tokens in found[key]}
        for task in scored:
            if parts[task][0].ids != asked[task]:
                raise PruneZooError(f"{task} under {key[0]}: other questions than the full model's; remove its folder")
        correct = np.concatenate([np.array(parts[task][0].scores) for task in scored])
        tokens = np.concatenate([np.full(len(asked[task]), parts[task][1]) for task in scored])
        unknown = np.full(len(correct), np.nan)
        scores[key] = ItemScores(tokens[:, None], correct, unknown, unknown, unknown)
    group_of = np.concatenate([np.full(len(asked[task]), number) for number, task in enumerate(scored)])
    assert (NONE, NO_TOKENS) in scores  # `jobs_of` has it
    measurement = Measurement(tuple(scored), group_of, {}, scores)
    record = build_record(measurement, contenders, {**header, "suite": SUITE, "split": "test", "seed": 0})
    return {**record, "benchmarks": benchmarks_of(results)}


def print_benchmarks(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print every figure as lmms-eval says it, and in percent of the full model's."""
    table = Table(title="lmms-eval", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("task", "metric", "pruner"):
        table.add_column(column, no_wrap=True)
    for column in ("keep", "tokens", "value", "% of full"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in sorted(rows, key=lambda row: (row["task"], row["metric"])):
        share = 100 * row["value"] / row["full"] if row["full"] else None
        cells = [row["task"], row["metric"], display_name(row["pruner"]), row["keep"], f"{row['tokens']:.1f}"]
        table.add_row(*cells, f"{row['value']:.4f}", percent(share))
    console.print(table)
