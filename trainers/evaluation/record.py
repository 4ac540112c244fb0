"""From a measurement to the JSON object that tables, report, card and later issues read."""

import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from prunezoo.core.budgets import AUTO
from prunezoo.core.errors import PruneZooError
from prunezoo.core.files import read_object
from trainers.cli.errors import whole_file

from .answers import answers_of
from .scores import ALL_TOKENS, FULL, NO_TOKENS, NONE, Key, Measurement
from .statistics import Resampled, interval, resample

MEAN = "mean"
"""The group of the rows that hold the mean over groups."""
MOST_BUDGETS = 16
"""Different numbers of tokens up to which a histogram lists them."""

Row = dict[str, Any]


def rows_of(measurement: Measurement, resampled: Resampled) -> list[Row]:
    """One row for each method x budget x group, and one for the mean over groups.

    Returns:
        `{pruner, keep, tokens, tokens_spread, flops, group, n, accuracy, retention, agreement, kl, ci}`: the spread is
        the standard deviation over items, above 0 where a method decides by itself; flops are operations of tower and
        language model, as a share of those with all tokens (None where not known); accuracy and agreement in [0, 1], kl
        in nats, retention and its 95 % interval in percent of the full model (None where there is none to give, see
        `sight_of`).
    """
    retention, draws = resampled.retention(), resampled.retention_draws()
    rows = []
    for m, ((pruner, keep), scores) in enumerate(measurement.scores.items()):
        per_group: dict[str, list[float]] = {"tokens": [], "flops": [], "accuracy": [], "agreement": [], "kl": []}
        for g, group in enumerate((*measurement.groups, MEAN)):
            here = measurement.group_of == g if group != MEAN else np.ones(measurement.items, dtype=bool)
            if group == MEAN:
                values = {name: float(np.mean(of)) for name, of in per_group.items()}
            else:
                values = {
                    "tokens": float(scores.tokens[here].mean()),
                    "flops": float(scores.flops[here].mean()),
                    "accuracy": float(scores.correct[here].mean()),
                    "agreement": float(scores.agreement[here].mean()),
                    "kl": float(scores.kl[here].mean()),
                }
                for name, value in values.items():
                    per_group[name].append(value)
            low, high = interval(draws[m, g])
            rows.append(
                {
                    "pruner": pruner,
                    "keep": keep,
                    "tokens": _number(values["tokens"]),
                    "tokens_spread": _number(float(scores.tokens[here].std())),
                    "flops": _number(values["flops"]),
                    "group": group,
                    "n": int(here.sum()),
                    "accuracy": _number(values["accuracy"]),
                    "retention": _number(float(retention[m, g])),
                    "agreement": _number(values["agreement"]),
                    "kl": _number(values["kl"]),
                    "ci": [_number(low), _number(high)],
                }
            )
    return rows


def paired_of(keys: Sequence[Key], resampled: Resampled, contenders: Sequence[str]) -> list[Row]:
    """Each contender against every other method at the same budget, over the same items.

    Args:
        keys: whose answers were resampled, in that order.
        resampled: of them.
        contenders: methods among them.

    Returns:
        `{pruner, rival, keep, difference, ci}` in points of mean retention; positive where the contender is better.
    """
    index: dict[Key, int] = {key: m for m, key in enumerate(keys)}
    mean, mean_draws = resampled.retention()[:, -1], resampled.retention_draws()[:, -1]
    rows = []
    for contender in contenders:
        for keep in dict.fromkeys(k for p, k in keys if p == contender):
            rivals = [p for p, k in keys if k == keep and p != contender and p not in (FULL, NONE)]
            for rival in rivals:
                own, other = index[contender, keep], index[rival, keep]
                low, high = interval(mean_draws[own] - mean_draws[other])
                rows.append(
                    {
                        "pruner": contender,
                        "rival": rival,
                        "keep": keep,
                        "difference": _number(float(mean[own] - mean[other])),
                        "ci": [_number(low), _number(high)],
                    }
                )
    return rows


def sight_of(measurement: Measurement, resampled: Resampled) -> list[Row]:
    """By how much the full model is above zero tokens, paired over the same items.

    Returns:
        `{group, difference, ci}` in points of accuracy for each group and the mean over groups. Where the interval
        reaches 0, rows have no retention; where that of the mean does, none has, and no pair a difference.
    """
    names = (*measurement.groups, MEAN)
    return [
        {"group": name, "difference": _number(points), "ci": [_number(low), _number(high)]}
        for name, (points, low, high) in zip(names, resampled.sight(), strict=True)
    ]


def layers_of(measurement: Measurement) -> list[Row]:
    """What each decoder layer reads under the methods that prune between the layers.

    Returns:
        `{pruner, keep, layer, tokens, spread}` with mean and standard deviation over items.
    """
    rows = []
    for (pruner, keep), scores in measurement.scores.items():
        if bool((scores.layers == scores.layers[:, :1]).all()):
            continue
        for layer, tokens in enumerate(scores.layers.T):
            mean, spread = _number(float(tokens.mean())), _number(float(tokens.std()))
            rows.append({"pruner": pruner, "keep": keep, "layer": layer, "tokens": mean, "spread": spread})
    return rows


def histogram_of(measurement: Measurement) -> list[Row]:
    """How often each number of tokens is read under the methods that set budgets, where few different ones are.

    Returns:
        `{pruner, keep, group, tokens, share}`: the share in [0, 1] of a group's questions; only what occurs.
    """
    rows = []
    for (pruner, keep), scores in measurement.scores.items():
        budgets = np.unique(scores.tokens)
        if AUTO.fullmatch(keep) and 1 < len(budgets) <= MOST_BUDGETS:
            for g, group in enumerate(measurement.groups):
                here = scores.tokens[measurement.group_of == g]
                for tokens in np.unique(here):
                    share = _number(float((here == tokens).mean()))
                    rows.append({"pruner": pruner, "keep": keep, "group": group, "tokens": tokens, "share": share})
    return rows


def oracle_scale_of(measurement: Measurement, contenders: Sequence[str]) -> list[Row]:
    """Each contender with the fewest tokens that answer each question, as one who knew the answers would choose them.

    After Matryoshka Multimodal Models (arXiv 2405.17430). The choice is among its budgets and all tokens, of the best
    scores the one with the fewest; a question that none of them answers counts the fewest of all.

    Returns:
        `{pruner, group, tokens, accuracy}` for each group and for the mean over groups.
    """
    rows = []
    for contender in contenders:
        scales = [scores for (pruner, _), scores in measurement.scores.items() if pruner == contender]
        scales = sorted([*scales, measurement.scores[FULL, ALL_TOKENS]], key=lambda scores: scores.tokens.mean())
        right = np.stack([scores.correct for scores in scales])  # (scales, I)
        fewest = np.take_along_axis(np.stack([scores.tokens for scores in scales]), right.argmax(0)[None], 0)[0]
        values = np.stack([fewest, right.max(0)])
        means = [values[:, measurement.group_of == group].mean(1) for group in range(len(measurement.groups))]
        for group, (tokens, accuracy) in zip(
            (*measurement.groups, MEAN), (*means, np.mean(means, axis=0)), strict=True
        ):
            row = {"pruner": contender, "group": group, "tokens": _number(tokens), "accuracy": _number(accuracy)}
            rows.append(row)
    return rows


def build_record(
    measurement: Measurement,
    contenders: Sequence[str],
    header: Mapping[str, Any],
    resamples: int = 2000,
) -> dict[str, Any]:
    """The whole JSON object: header, versions, chance, rows and paired differences.

    Args:
        measurement: what was measured.
        contenders: methods that are compared in pairs with every other.
        header: vlm, suite, split, command and what else names the run.
        resamples: bootstrap resamples.
    """
    correct = np.stack([scores.correct for scores in measurement.scores.values()])
    full, none = measurement.scores[FULL, ALL_TOKENS].correct, measurement.scores[NONE, NO_TOKENS].correct
    resampled = resample(correct, full, measurement.group_of, len(measurement.groups), resamples, none=none)
    return {
        **header,
        "n": measurement.items,
        "versions": versions(),
        "groups": list(measurement.groups),
        "chance": {group: measurement.chance.get(group) for group in measurement.groups},
        "sight": sight_of(measurement, resampled),
        "rows": rows_of(measurement, resampled),
        "paired": paired_of(list(measurement.scores), resampled, contenders),
        "oracle_scale": oracle_scale_of(measurement, contenders),
        "layers": layers_of(measurement),
        "histogram": histogram_of(measurement),
        "answers": answers_of(measurement),
    }


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers")}}


def write_record(record: Mapping[str, Any], path: str | Path) -> None:
    """Write the object as JSON, whole or not at all."""
    with whole_file(Path(path)) as scratch:
        scratch.write_text(_dump(record), encoding="utf-8")


def read_record(path: str | Path) -> dict[str, Any]:
    """Read what `write_record` wrote.

    Raises:
        PruneZooError: no such file, no JSON, or not what `evaluate` writes.
    """
    remedy = "write it with `python -m trainers.evaluate … --json`"
    record = read_object(Path(path), "vlm", "suite", "split", "n", "rows", what="an evaluation", remedy=remedy)
    if not record["rows"]:
        raise PruneZooError(f"{path}: not an evaluation, it lacks rows; {remedy}")
    return record


def select(record: Mapping[str, Any], **wanted: str) -> list[Row]:
    """Rows whose fields equal what is wanted, e.g. `select(record, keep="1/9", group="mean")`."""
    return [row for row in record["rows"] if all(row[name] == value for name, value in wanted.items())]


def mean_row(record: Mapping[str, Any], pruner: str, keep: str) -> Row:
    """The row of all groups together, of a pruner at a budget."""
    (row,) = select(record, pruner=pruner, keep=keep, group=MEAN)
    return row


def _dump(record: Mapping[str, Any]) -> str:
    """JSON with a line for each row, which is easier to read, and to compare, than a line for each number."""
    parts = []
    for key, value in record.items():
        if value and isinstance(value, list) and isinstance(value[0], dict):
            text = "[\n  " + ",\n  ".join(json.dumps(row, allow_nan=False) for row in value) + "\n ]"
        else:
            text = json.dumps(value, allow_nan=False)
        parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _number(value: float) -> float | None:
    """Six decimals; None for what is not defined, which JSON cannot hold."""
    return round(float(value), 6) if math.isfinite(value) else None
