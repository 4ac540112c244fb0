"""Pruners of the same kind measured side by side, on the same questions, against the one that they were made of."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from prunezoo.core.contract import Pruner
from prunezoo.core.errors import PruneZooError
from trainers.data.suite import Suite, load_suite
from trainers.evaluation.budgets import parse_budget
from trainers.evaluation.journal import Journal
from trainers.evaluation.loading import load_vlm
from trainers.evaluation.methods import PrunerMethod
from trainers.evaluation.record import build_record, mean_row
from trainers.evaluation.run import measure_with_progress

START = "start"
"""The pruner that the others were made of, in records."""


def suite_of(data: Any, split: str, limit: int | None) -> Suite:
    """The suite of a recipe's data.

    Args:
        data: `data` of the parsed recipe.
        split: Of the suite.
        limit: Only the first so many items.

    Raises:
        PruneZooError: Its data are no suite.
    """
    name = data.init_args.get("suite")
    if name is None:
        raise PruneZooError(
            "data: to measure, the recipe's data must be a suite (trainers.data.modules.SuiteDataModule)"
        )
    return load_suite(name, split, limit, **(data.init_args.get("options") or {}))


def measure_all(
    vlm: str,
    suite: Suite,
    pruners: Mapping[str, Pruner],
    keep: str,
    journal: Path,
    known_by: str,
    console: Console,
    batch_size: int = 32,
) -> list[dict[str, Any]]:
    """Retention of each, and how far it is from that of START.

    Args:
        vlm: Folder or Hub id.
        suite: The questions.
        pruners: By name, START among them.
        keep: Budget.
        journal: File of what has been measured, so that an interrupted measurement goes on.
        known_by: All that the result depends on.
        console: Where progress is shown.
        batch_size: Questions at a time.

    Returns:
        For each `{name, retention, ci, accuracy, kl, difference, difference_ci}` in percent of the full model and, the
        differences, in its points, with 95 % intervals over the questions.
    """
    model, processor = load_vlm(vlm)
    methods = [PrunerMethod(name, [pruner.to(model.device)]) for name, pruner in pruners.items()]
    budget, log = parse_budget(keep), Journal(journal, known_by)
    with torch.no_grad():
        found = measure_with_progress(model, processor, suite, methods, [budget], batch_size, log, console)
    record = build_record(found, [START], {})
    apart = {row["rival"]: row for row in record["paired"]}
    rows = []
    for name in pruners:
        row, pair = mean_row(record, name, budget.label), apart.get(name)
        rows.append(
            {
                "name": name,
                **{key: row[key] for key in ("retention", "ci", "accuracy", "kl")},
                "difference": None if pair is None or pair["difference"] is None else -pair["difference"],
                "difference_ci": [None, None]
                if pair is None or pair["ci"][0] is None
                else [-b for b in pair["ci"][::-1]],
            }
        )
    return rows
