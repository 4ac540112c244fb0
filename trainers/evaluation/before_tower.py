"""What rankings in front of the tower cost in answers, beside their rivals; docs/input.md has the tables made from it.

Its records lie in `hub_cards/before_tower/`: what `trainers.evaluate` and `trainers.upkeep.smaller_picture` write, over
the same questions.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

from prunezoo.core.errors import PruneZooError
from trainers.cli.names import ROOT

from .answers import join_answers
from .record import MEAN, Row, read_record, select
from .scores import ALL_TOKENS, FULL, NO_TOKENS, NONE
from .statistics import interval
from .tables import display_name, methods_of, percent, span

FOLDER = ROOT / "hub_cards" / "before_tower"
BUDGETS = ("3/4", "1/2", "1/4")
BASE = "pixelprune"
"""Whose ranking the others are held against."""
WHERE = {
    "resize": "behind the tower",
    "smaller_picture": "the picture itself",
    "blurred_picture": "the picture itself, scaled up again: all tokens",
}
"""What is no ranking in front of the tower."""

Record = Mapping[str, Any]


@cache
def records() -> list[Record]:
    """All of them, by name of file.

    Raises:
        PruneZooError: There is none.
    """
    found: list[Record] = [read_record(path) for path in sorted(FOLDER.glob("*.json"))]
    if not found:
        raise PruneZooError(f"{FOLDER}: no record; docs/input.md has the commands that make them")
    return found


def table() -> str:
    """Retention at each budget, the best at 1/2 first, and how far each is from :data:`BASE`."""
    rows = {
        (name, keep): row
        for record in records()
        for name in methods_of(record)
        if name not in (FULL, NONE)
        for keep in BUDGETS
        if (row := _mean(record, name, keep))
    }
    answers = join_answers(records())
    resampled = answers.resample(list(rows))
    points, draws = resampled.retention()[:, -1], resampled.retention_draws()[:, -1]
    number = {key: at for at, key in enumerate(rows)}

    def cell(name: str, keep: str) -> str:
        if (name, keep) not in rows:
            return "–"
        row, own, base = rows[name, keep], number[name, keep], number[BASE, keep]
        said = f"{row['tokens']:.0f}: {percent(row['retention'])} ({span(row)})"
        if name == BASE:
            return said
        low, high = interval(draws[own] - draws[base])
        return f"{said}; {points[own] - points[base]:+.1f} ({low:+.1f} … {high:+.1f})"

    names = sorted({name for name, _ in rows}, key=lambda name: -points[number[name, BUDGETS[1]]])
    lines = [f"| | where | {' | '.join(BUDGETS)} |", "|---|---|" + "---|" * len(BUDGETS)]
    for name in names:
        cells = " | ".join(cell(name, keep) for keep in BUDGETS)
        lines.append(f"| `{display_name(name)}` | {WHERE.get(name, 'in front of the tower')} | {cells} |")
    first = records()[0]
    full, none = _mean(first, FULL, ALL_TOKENS), _mean(first, NONE, NO_TOKENS)
    assert full is not None and none is not None  # every record has them
    commands = "; ".join(f"`{record['command']}`" for record in records())
    return "\n".join(
        [
            *lines,
            "",
            f"Tokens that the language model reads: retention in % (95 %); points more than `{BASE}`, paired over the "
            f"same questions (95 %). The first {first['n']:,} questions of the {first['split']} split of "
            f"`{first['suite']}`, `{display_name(first['vlm'])}`, mean over {len(first['groups'])} groups; with all "
            f"tokens {100 * full['accuracy']:.1f} % are right, with none {100 * none['accuracy']:.1f} %. {commands}.",
            "",
        ]
    )


def _mean(record: Record, name: str, keep: str) -> Row | None:
    """The mean row of a method at a budget; None where it was not measured."""
    return next(iter(select(record, pruner=name, keep=keep, group=MEAN)), None)
