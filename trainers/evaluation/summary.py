"""One table over all shipped modules, beside their rivals at equal measured tokens, from the records of their cards."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from modules.core.errors import PruneZooError

from .record import MEAN, Row, select
from .scores import ALL_TOKENS, FULL, NO_TOKENS, NONE, is_diagnostic
from .tables import display_name, methods_of, percent, span

SHARES = ("1/3", "2/9", "1/9", "1/18", "1/36")
"""Columns: shares of all image tokens."""
NEAR = 0.05
"""A figure stands in a column whose tokens it was measured with, up to this share of them."""
COMMON = ("vlm", "suite", "split", "seed")
"""What records that stand in one table agree in."""


def read_records(folders: Sequence[Path]) -> dict[str, Mapping[str, Any]]:
    """The `metrics.json` of shipped modules, by folder name.

    Raises:
        PruneZooError: One cannot be read, or they were measured on another model or suite.
    """
    records: dict[str, Mapping[str, Any]] = {}
    for folder in folders:
        path = folder / "metrics.json"
        try:
            records[folder.name] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise PruneZooError(f"{path}: not readable ({error}); `trainers.evaluate --card` writes it") from error
    first = next(iter(records.values()))
    for name, record in records.items():
        for key in COMMON:
            if record[key] != first[key]:
                raise PruneZooError(
                    f"checkpoints/{name}/metrics.json: {key} is {record[key]}, elsewhere {first[key]}: they do not "
                    "compare; measure it as the others"
                )
    return records


def summary_section(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown: mean retention of every shipped module, then of the rivals, best at 1/9 of the tokens first.

    Args:
        records: As :func:`read_records` gives them, at least one.
    """
    usual = Counter(record["n"] for record in records.values()).most_common(1)[0][0]  # questions
    first = next(record for record in records.values() if record["n"] == usual)
    (full,) = (row for row in select(first, pruner=FULL, keep=ALL_TOKENS) if row["group"] == MEAN)
    (blind,) = (row for row in select(first, pruner=NONE, keep=NO_TOKENS) if row["group"] == MEAN)
    columns = [round(full["tokens"] * Fraction(share)) for share in SHARES]
    own: dict[str, list[Row | None]] = {}
    rivals: dict[str, list[Row | None]] = {}
    for folder, record in records.items():
        for method in methods_of(record):
            is_own = method == record["pruner"]
            if not is_own and ("/" in method or "?" in method or is_diagnostic(method) or record["n"] != usual):
                continue  # another shipped module, which has a record of its own, or what is no rival
            more = f", {record['n']:,} questions" if record["n"] != usual else ""
            name = f"[`{folder}`](checkpoints/{folder}/README.md){more}" if is_own else display_name(method)
            line = (own if is_own else rivals).setdefault(name, [None] * len(columns))
            for row in select(record, pruner=method):
                for place, tokens in enumerate(columns):
                    if row["group"] == MEAN and abs(row["tokens"] - tokens) <= NEAR * tokens:
                        line[place] = line[place] or row
    heads = [f"{share}: {tokens} tokens" for share, tokens in zip(SHARES, columns, strict=True)]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(columns) + 1) + "|"]
    for table in (own, rivals):
        ordered = sorted(table.items(), key=lambda line: -_best(line[1][SHARES.index("1/9")]))
        lines += [f"| {name} | {' | '.join(map(_cell, line))} |" for name, line in ordered]
    lines += [
        "",
        f"Mean retention over {len(first['groups'])} groups of questions: accuracy in % of the full model's, with 95 % "
        f"bootstrap interval; the first {usual:,} questions of the {first['split']} split of `{first['suite']}`, or "
        f"as many as a line says. With all {full['tokens']:.0f} tokens the model answers "
        f"{100 * full['accuracy']:.1f} %, with none {100 * blind['accuracy']:.1f} %. Columns are by measured "
        f"tokens, mean over the model's layers and the questions, within {100 * NEAR:.0f} %; – was not measured there.",
        "",
    ]
    return "\n".join(lines)


def _best(row: Row | None) -> float:
    return row["retention"] if row and row["retention"] is not None else 0.0


def _cell(row: Row | None) -> str:
    return "–" if row is None else f"{percent(row['retention'])} ({span(row)})"
