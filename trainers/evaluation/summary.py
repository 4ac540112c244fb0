"""What was measured of the zoo at equal tokens, from the records that ship: the table of docs/methods, the zoo's list.

A shipped module has its record, with its rivals, in its own folder, `checkpoints/NAME/metrics.json`; what was measured
of all methods lies in `hub_cards/league/`, and of other settings and budgets in `hub_cards/measured/`.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from prunezoo.core.errors import PruneZooError
from trainers.cli.names import CHECKPOINTS, ROOT, pruners_shipped

from . import league
from .record import MEAN, Row, mean_row, read_record, select
from .same_suite import check_same_suite
from .scores import ALL_TOKENS, FULL, NO_TOKENS, NONE, is_diagnostic
from .tables import methods_of, percent, span

OTHERS = ROOT / "hub_cards" / "measured"
SHARES = ("1/2", "1/3", "2/9", "1/9", "1/18", "1/36")
"""Columns: shares of all image tokens."""
NEAR = 0.05
"""A figure stands in a column whose tokens it was measured with, up to this share of them."""
COMMON = ("vlm", "split", "seed")
"""What records that stand in one table agree in."""
NOTES = {
    "pyramiddrop": "its authors number the positions of what is left anew at every stage; here they stay, and "
    '`attach(..., positions="compact")` does as they do',
}
"""What a reader of a method's figures must know, by method."""

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Line:
    """What was measured of one pruner.

    Attributes:
        n: questions.
        rows: means over the groups, one a budget.
    """

    n: int
    rows: list[Row]

    def at(self, tokens: float) -> Row | None:
        """The row nearest to so many tokens; None if none is near."""
        near = [row for row in self.rows if abs(row["tokens"] - tokens) <= NEAR * tokens]
        return min(near, key=lambda row: abs(row["tokens"] - tokens), default=None)


@dataclass(frozen=True)
class Zoo:
    """What was measured of all.

    Attributes:
        shipped: the trained modules, by folder name.
        rivals: the methods without weights, by what `--pruner` takes.
        record: one of the records that were measured over as many questions as most.
    """

    shipped: dict[str, Line]
    rivals: dict[str, Line]
    record: Record

    @property
    def tokens(self) -> float:
        """Image tokens of the full model."""
        return float(mean_row(self.record, FULL, ALL_TOKENS)["tokens"])

    def columns(self) -> dict[str, int]:
        """Tokens of each of :data:`SHARES`."""
        return {share: round(self.tokens * Fraction(share)) for share in SHARES}


def read_zoo() -> Zoo:
    """What ships."""
    own = {folder: read_record(CHECKPOINTS / folder / "metrics.json") for folder in pruners_shipped()}
    return gather(own, [*(read_record(path) for path in sorted(OTHERS.glob("*.json"))), *league.read_league()])


def gather(own: Mapping[str, Record], others: Sequence[Record] = ()) -> Zoo:
    """Put records together.

    Args:
        own: of shipped modules, by folder name; at least one.
        others: of the same model and suite. What one says of a shipped module counts if it measured the same weights.

    Raises:
        PruneZooError: They were measured on another model or suite.
    """
    records = [*own.values(), *others]
    usual = Counter(record["n"] for record in records).most_common(1)[0][0]
    first = next(record for record in records if record["n"] == usual)
    check_same_suite([first, *records])
    for record in records:
        for key in COMMON:
            if record[key] != first[key]:
                raise PruneZooError(
                    f"{record['command']}: {key} is {record[key]}, elsewhere {first[key]}: they do not compare; "
                    "measure it as the others"
                )
    shipped: dict[str, Line] = {}
    for folder, record in own.items():
        name, digest = record["pruner"], record["weights"][record["pruner"]]
        same = [other for other in others if other["n"] == record["n"] and other["weights"].get(name) == digest]
        shipped[folder] = Line(record["n"], [row for part in (record, *same) for row in _means(part, name)])
    rivals: dict[str, Line] = {}
    for record in records:
        for name in methods_of(record):
            if "/" not in name and not is_diagnostic(name) and record["n"] == usual:
                line = rivals.setdefault(name, Line(usual, []))
                known = {(row["keep"], row["tokens"]) for row in line.rows}
                line.rows.extend(row for row in _means(record, name) if (row["keep"], row["tokens"]) not in known)
    return Zoo(shipped, rivals, first)


def footnotes(names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """What stands behind a name in a table, such as " [1]", for all of ``names``; and the lines below the table."""
    marks = dict.fromkeys(names, "")
    lines: list[str] = []
    for name in marks:
        if note := NOTES.get(name.partition("?")[0]):
            lines.append(f"[{len(lines) + 1}] {note}  ")
            marks[name] = f" [{len(lines)}]"
    return marks, [*lines, ""] if lines else []


def summary_section(zoo: Zoo) -> str:
    """Markdown: mean retention of the shipped modules and of all other methods, best at 1/9 of the tokens first."""
    columns, usual = zoo.columns(), zoo.record["n"]
    full, blind = mean_row(zoo.record, FULL, ALL_TOKENS), mean_row(zoo.record, NONE, NO_TOKENS)
    heads = [f"{share}: {tokens} tokens" for share, tokens in columns.items()]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(columns) + 1) + "|"]
    marks, notes = footnotes(zoo.rivals)
    named = {f"[`{name}`](../../checkpoints/{name}/README.md)": line for name, line in zoo.shipped.items()}
    named |= {name + marks[name]: line for name, line in zoo.rivals.items()}
    for name, line in sorted(named.items(), key=lambda item: _order(item[1], columns)):
        more = f", {line.n:,} questions" if line.n != usual else ""
        lines.append(f"| {name}{more} | {' | '.join(_cell(line.at(tokens)) for tokens in columns.values())} |")
    lines += [
        "",
        *notes,
        f"Mean retention over {len(zoo.record['groups'])} groups of questions: accuracy in % of the full model's, with "
        f"95 % bootstrap interval; the first {usual:,} questions of the {zoo.record['split']} split of "
        f"`{zoo.record['suite']}`, or as many as a line says. With all {full['tokens']:.0f} tokens the model answers "
        f"{100 * full['accuracy']:.1f} %, with none {100 * blind['accuracy']:.1f} %. Columns are by measured "
        f"tokens, mean over the model's layers and the questions, within {100 * NEAR:.0f} %; – was not measured there.",
        "",
    ]
    return "\n".join(lines)


def _means(record: Record, name: str) -> list[Row]:
    return [row for row in select(record, pruner=name) if row["group"] == MEAN]


def _order(line: Line, columns: Mapping[str, int]) -> tuple[bool, float]:
    """The best at 1/9 first; then, of what was not measured there, the best at the first column that it stands in."""
    row = line.at(columns["1/9"])
    best = row or next(filter(None, map(line.at, columns.values())), None)
    return row is None, -(best["retention"] or 0.0) if best else 0.0


def _cell(row: Row | None) -> str:
    return "–" if row is None else f"{percent(row['retention'])} ({span(row)})"
