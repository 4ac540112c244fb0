"""How much each part of a pruner bears: the sweep of `trainers.slim`, measured on the validation split."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from prunezoo.core.registry import split_options
from trainers.cards.parts import weights_digest
from trainers.cli.names import find_pruner
from trainers.evaluation.record import versions, write_record

from .magnitude import cliffs, sweep
from .measure import START, measure_all, suite_of
from .methods import Run, trained
from .note import size_of
from .weights import check_sparsity


def sweep_all(run: Run, console: Console) -> None:
    """Measure how much each part bears, on the validation split."""
    config, file = run.config, Path(run.config.sweep.file)
    pruner, suite = trained(run), suite_of(config.data, "validation", config.sweep.limit)
    for sparsity in config.sweep.grid:
        check_sparsity(sparsity)
    copies = {START: pruner, **sweep(pruner, sorted(config.sweep.grid), config.even)}
    journal = file.with_name(f"{file.name}.partial.npz")
    known_by = json.dumps([run.line, suite.fingerprint(), weights_digest(split_options(find_pruner(config.pruner))[0])])
    rows = measure_all(config.model.init_args.vlm, suite, copies, config.sweep.keep, journal, known_by, console)
    for row in rows:
        name = row["name"].split()
        row |= {"part": name[0], "sparsity": float(name[1]) if len(name) > 1 else 0.0, **size_of(copies[row["name"]])}
    found = cliffs(rows[1:], config.sweep.drop)
    facts = {"command": run.line, "vlm": config.model.init_args.vlm, "pruner": config.pruner, "keep": config.sweep.keep}
    facts |= {"suite": suite.name, "suite_version": suite.version, "split": "validation", "n": len(suite)}
    write_record({**facts, "versions": versions(), "rows": rows, "cliffs": found, "drop": config.sweep.drop}, file)
    journal.unlink(missing_ok=True)
    table = Table(title=f"{suite.name} validation, {len(suite)} questions, keep {config.sweep.keep}")
    for column in ("part", "sparsity", "retention", "against the start"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for row in rows:
        table.add_row(row["part"], f"{row['sparsity']:g}", spoken(row["retention"], row["ci"]), against(row))
    console.print(table)
    for part, sparsity in found.items():
        bears = "not even the first" if sparsity is None else f"{sparsity:g}"
        console.print(f"{part}: bears {bears} (more than {config.sweep.drop:g} points are not surely lost)")
    console.print(f"numbers: {file}; zeros are no speed-up", soft_wrap=True)


def spoken(value: float | None, ci: Sequence[float | None]) -> str:
    """A figure with its interval; a dash where there is none."""
    return "–" if value is None or ci[0] is None else f"{value:.1f} ({ci[0]:.1f} … {ci[1]:.1f})"


def against(row: dict[str, Any]) -> str:
    """How far it is from the start."""
    return spoken(row["difference"], row["difference_ci"])
