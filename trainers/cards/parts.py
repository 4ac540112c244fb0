"""What a model card says, part by part: tables made from measured records, and the files that these lie in."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult

from prunezoo.core.budgets import AUTO
from prunezoo.core.files import read_object
from prunezoo.core.upload import CARD_FILE as CARD_FILE
from prunezoo.core.upload import METRICS_FILE as METRICS_FILE
from trainers.benchmarking.measure import BARE
from trainers.benchmarking.tables import COLUMNS, ratio, settings_of
from trainers.data.suite import list_suites
from trainers.evaluation.record import MEAN, Row, mean_row, select
from trainers.evaluation.scores import is_diagnostic
from trainers.evaluation.sight import is_blind
from trainers.evaluation.tables import budgets_of, display_name, percent, span, tokens_of

ROOT = Path(__file__).parent.parent.parent
CARDS = ROOT / "hub_cards"
POLICY_FILE = "policy.json"
WEIGHTS_FILE = "model.safetensors"
SPEED_FILE, PICTURE_FILE = "speed.json", "kept.webp"
STOP_FILE, STOP_FIGURE = "stop_rule.json", "stop_rule.png"


def weights_digest(folder: str | Path) -> str | None:
    """SHA-256 of a folder's weights, by which an evaluation knows them again; None where there are none."""
    path = Path(folder) / WEIGHTS_FILE
    if not path.is_file():
        return None
    parts = sorted(path.parent.glob("*/*.safetensors"))  # those of a LoRA
    return hashlib.sha256(b"".join(p.read_bytes() for p in (path, *parts))).hexdigest()


def datasets_of(run: Mapping[str, Any] | None) -> list[str] | None:
    """What it was trained on, where that has a name which others know: suites of ours, or a data set of the Hub.

    Args:
        run: the run record, whose `data` reads `HubDataModule(org/name)`; a file's name says nothing to others.
    """
    match = re.match(r"(\w+)\(([^)]+)", run["data"]) if run else None
    if match is None:
        return None
    kind, names = match[1], match[2].split(", ")
    on_hub = "Hub" in kind and re.fullmatch(r"[\w.-]+/[\w.-]+", names[0]) and not Path(names[0]).exists()
    return names[:1] if on_hub else names if set(names) <= set(list_suites()) else None


def speed_of(folder: Path, method: str) -> dict[str, Any] | None:
    """What `trainers.benchmark` measured: of this pruner, in its folder, or else of its method, in `hub_cards/`."""
    path = folder / SPEED_FILE if (folder / SPEED_FILE).exists() else CARDS / SPEED_FILE
    remedy = "write it with `python -m trainers.benchmark … --json`"
    record = read_object(path, "rows", what="a measurement of speed", remedy=remedy)
    lines = []
    for (batch, length), cases in settings_of(record["rows"]):
        for (name, keep), parts in cases.items():
            if name != BARE and Path(name).name in (method, folder.resolve().name):
                cells = {COLUMNS[part]: ratio(parts[part]) for part in COLUMNS if part in parts}
                own = f"{1000 * parts['pruner']['median_s']:.1f}" if "pruner" in parts else "–"
                tokens = f"{next(iter(parts.values()))['tokens']:g}"
                line = {"batch": batch, "length": length, "keep": keep, "tokens": tokens, "cells": cells, "own": own}
                lines.append(line)
    return {"lines": lines, "own": path.parent == folder, **record} if lines else None


def stop_rule_of(folder: Path) -> dict[str, Any] | None:
    """What `upkeep.stop_curve` measured of these weights; None where nothing was measured, or of other weights."""
    path = folder / STOP_FILE
    if not path.exists():
        return None
    remedy = "write it with `python -m trainers.upkeep.stop_curve`"
    record = read_object(path, "weights", "rows", "paired", what="a measurement of a stop rule", remedy=remedy)
    if record["weights"] != weights_digest(folder):
        return None
    rows = {row["keep"]: row for row in record["rows"] if row["kind"] == "stop rule"}
    lines = []
    for pair in record["paired"]:
        row = rows[pair["keep"]]
        retention = f"{percent(row['retention'])} ({span(row)})"
        line = {"keep": row["keep"], "tokens": tokens_of(row), "retention": retention, "above": _signed(pair)}
        lines.append(line)
    return {"lines": lines, **record}


def eval_results(metrics: Mapping[str, Any]) -> list[EvalResult]:
    """Accuracy and retention of the pruner, for each group and the mean, at every budget."""
    results = []
    for row in select(metrics, pruner=metrics["pruner"]):
        for kind, value in (("accuracy", row["accuracy"]), ("retention", row["retention"])):
            if value is not None:
                results.append(
                    EvalResult(
                        task_type="image-text-to-text",
                        dataset_type=metrics["suite"],
                        dataset_name=metrics["suite"],
                        dataset_config=row["group"],
                        dataset_split=metrics["split"],
                        metric_type=kind,
                        metric_name=f"{kind}, keep {row['keep']}",
                        metric_value=value,
                    )
                )
    return results


def budget_table(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line a budget: its tokens, and retention with interval for each group and the mean.

    Accuracy where nothing has a retention.
    """
    lines = []
    for keep in budgets_of(metrics):
        rows = {row["group"]: row for row in select(metrics, pruner=metrics["pruner"], keep=keep)}
        shown = [rows[group] for group in (*metrics["groups"], MEAN)]
        if is_blind(metrics):
            cells = [percent(100 * row["accuracy"]) for row in shown]
        else:
            cells = [f"{percent(row['retention'])} ({span(row)})" for row in shown]
        example = f'"{keep}"' if AUTO.fullmatch(keep) else keep  # as it is written in Python
        lines.append({"keep": keep, "example": example, "tokens": tokens_of(rows[MEAN]), "cells": cells})
    return lines


def layer_table(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One line a decoder layer, where they read different numbers of tokens: mean and spread at every budget."""
    rows = metrics.get("layers", ())  # not in older metrics
    lines = []
    for layer in sorted({row["layer"] for row in rows}):
        here = {row["keep"]: row for row in rows if row["layer"] == layer}
        cells = [f"{here[keep]['tokens']:.1f} ± {here[keep]['spread']:.1f}" for keep in budgets_of(metrics)]
        lines.append({"layer": layer, "cells": cells})
    return lines


def histogram_tables(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One table a budget that the pruner sets: for each group the mean, and how many questions get which tokens."""
    rows = metrics.get("histogram", ())  # not in older metrics
    tables = []
    for keep in dict.fromkeys(row["keep"] for row in rows):
        here = {(row["group"], row["tokens"]): row["share"] for row in rows if row["keep"] == keep}
        columns = sorted({tokens for _, tokens in here})
        lines = []
        for group in metrics["groups"]:
            shares = [here.get((group, tokens), 0.0) for tokens in columns]
            mean = sum(share * tokens for share, tokens in zip(shares, columns, strict=True))
            lines.append({"group": group, "mean": f"{mean:.1f}", "cells": [f"{100 * share:.0f}" for share in shares]})
        tables.append({"keep": keep, "columns": [f"{tokens:g}" for tokens in columns], "lines": lines})
    return tables


def policy_of(folder: Path) -> dict[str, Any] | None:
    """What `trainers.upkeep.policy_record` wrote of a policy that learned by its rewards."""
    path = folder / POLICY_FILE
    if not path.exists():
        return None
    remedy = "write it with `python -m trainers.upkeep.policy_record`"
    return read_object(path, "figures", "cost", what="the record of a policy", remedy=remedy)


def rival_table(metrics: Mapping[str, Any], diagnostics: bool) -> list[dict[str, Any]]:
    """One line a rival, or a diagnostic: its mean retention at every budget, and how far the pruner is above it.

    None where nothing has a retention.
    """
    lines: list[dict[str, Any]] = []
    if is_blind(metrics):
        return lines
    for rival in dict.fromkeys(p["rival"] for p in metrics["paired"] if is_diagnostic(p["rival"]) == diagnostics):
        cells = []
        for keep in budgets_of(metrics):
            row = mean_row(metrics, rival, keep)
            (pair,) = (p for p in metrics["paired"] if p["rival"] == rival and p["keep"] == keep)
            cells.append(f"{percent(row['retention'])}, {_signed(pair)}")
        lines.append({"rival": display_name(rival), "cells": cells})
    return lines


def weakest(metrics: Mapping[str, Any]) -> list[Row]:
    """The row of the lowest retention at each budget."""
    worst = []
    for keep in budgets_of(metrics):
        rows = select(metrics, pruner=metrics["pruner"], keep=keep)
        rows = [row for row in rows if row["group"] != MEAN and row["retention"] is not None]
        worst += sorted(rows, key=lambda row: row["retention"])[:1]
    return worst


def _signed(pair: Row) -> str:
    if pair["difference"] is None:
        return "–"
    return f"{pair['difference']:+.1f} ({pair['ci'][0]:+.1f} … {pair['ci'][1]:+.1f})"
