"""The terminal's view of a record: one table a budget, methods down, question groups across."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainers.cli.names import FRONTS

from .instrument import Verdict
from .record import MEAN, Row, select
from .scores import ALL_TOKENS, FULL, NO_TOKENS, NONE
from .sight import is_blind, notes_of

TOKENS = "Tokens are measured: image tokens that the language model reads, mean over its layers."
WIDE = 150
"""Columns of a terminal from which accuracy, agreement and KL are shown too."""


def display_name(pruner: str) -> str:
    """A short name for a table or figure: the last part of a Hub id or folder, the last two of a deeper folder."""
    for front in FRONTS:
        if pruner.startswith(front):
            return front + display_name(pruner.removeprefix(front))
    parts = Path(pruner).parts
    return pruner if "/" not in pruner else "/".join(parts[-2:]) if len(parts) > 2 else parts[-1]


def budgets_of(record: Mapping[str, Any]) -> list[str]:
    """The budgets of a record, as on the command line."""
    return list(dict.fromkeys(row["keep"] for row in record["rows"] if row["pruner"] not in (FULL, NONE)))


def methods_of(record: Mapping[str, Any]) -> list[str]:
    """The methods of a record that have a budget, in its order."""
    return list(dict.fromkeys(row["pruner"] for row in record["rows"] if row["pruner"] not in (FULL, NONE)))


def rows_at(record: Mapping[str, Any], keep: str) -> dict[str, dict[str, Row]]:
    """Rows by method and group at one budget, the full model first and zero tokens last."""
    picked = {FULL: select(record, pruner=FULL, keep=ALL_TOKENS)}
    picked |= {pruner: select(record, pruner=pruner, keep=keep) for pruner in methods_of(record)}
    picked[NONE] = select(record, pruner=NONE, keep=NO_TOKENS)
    return {pruner: {row["group"]: row for row in rows} for pruner, rows in picked.items()}


def percent(value: float | None, digits: int = 1) -> str:
    """A number that is in percent already; a dash where nothing is defined."""
    return "–" if value is None else f"{value:.{digits}f}"


def times(value: float | None, factor: float) -> float | None:
    """A product; None where the value is not known."""
    return None if value is None else factor * value


def tokens_of(row: Row) -> str:
    """Measured tokens, `16.0`; with their standard deviation over items where a method decides by itself."""
    spread = row.get("tokens_spread", 0.0)  # not in older records
    return f"{row['tokens']:.1f}" + (f" ± {spread:.1f}" if spread >= 0.05 else "")


def span(row: Row) -> str:
    """The interval of a row's retention, `95.1–98.3`."""
    low, high = row["ci"]
    return "–" if low is None else f"{low:.1f}–{high:.1f}"


def print_record(record: Mapping[str, Any], console: Console) -> None:
    """Print retention per group at each budget, then the paired differences; a narrow terminal gets fewer columns.

    Accuracy where nothing has a retention; then nothing is compared.
    """
    groups = record["groups"]
    wide, blind = console.width >= WIDE, is_blind(record)
    for keep in budgets_of(record):
        rows = rows_at(record, keep)
        table = _table(f"{'Accuracy' if blind else 'Retention'} in % at --keep {keep}")
        table.add_column("pruner", no_wrap=True)
        table.add_column("tokens", justify="right", no_wrap=True)
        for group in groups:
            table.add_column(group, justify="right", min_width=len(group) if wide else 5, overflow="fold")
        for column in ("mean", *(("95 %", "accuracy", "agree", "KL") if wide else ())):
            table.add_column(column, justify="right", no_wrap=True)
        best = {
            group: max((r[group]["retention"] or 0.0) for p, r in rows.items() if p not in (FULL, NONE))
            for group in (*groups, MEAN)
        }
        for pruner, of in rows.items():
            mean = of[MEAN]
            cells: list[str | Text] = [display_name(pruner), tokens_of(mean)]
            for group in (*groups, MEAN):
                top = pruner not in (FULL, NONE) and of[group]["retention"] == best[group]
                shown = 100 * of[group]["accuracy"] if blind else of[group]["retention"]
                cells.append(Text(percent(shown), style="bold green" if top else ""))
            shares = [times(mean[name], 100) for name in ("accuracy", "agreement")]
            cells += [span(mean), *map(percent, shares), percent(mean["kl"], 3)] if wide else []
            table.add_row(*cells, style="dim" if pruner in (FULL, NONE) else None)
        console.print(table)
    console.print(TOKENS, style="dim")
    for note in notes_of(record):
        console.print(note, style="bold yellow", highlight=False)
    if record["paired"] and not blind:
        console.print(_paired_table(record["paired"], budgets_of(record)))
    for row in record["oracle_scale"]:
        if row["group"] == MEAN:
            console.print(
                f"{display_name(row['pruner'])} at the fewest tokens that answer each question: "
                f"{100 * row['accuracy']:.1f} % right with {row['tokens']:.1f} tokens in the mean"
            )


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _paired_table(paired: Sequence[Row], keeps: Sequence[str]) -> Table:
    table = _table("Paired differences of mean retention, points (95 %)")
    for column in ("pruner", "rival"):
        table.add_column(column, no_wrap=True)
    for keep in keeps:
        table.add_column(keep, justify="right", no_wrap=True)
    cells = {(row["pruner"], row["rival"], row["keep"]): _difference(row) for row in paired}
    for pruner, rival in dict.fromkeys((row["pruner"], row["rival"]) for row in paired):
        line = [cells.get((pruner, rival, keep), "") for keep in keeps]
        table.add_row(display_name(pruner), display_name(rival), *line)
    return table


def _difference(row: Row) -> Text:
    """`+3.1 (+1.0 … +5.2)`, coloured where the interval excludes 0."""
    if row["difference"] is None:
        return Text("–")
    low, high = row["ci"]
    style = "green" if low > 0 else "red" if high < 0 else "dim"
    return Text(f"{row['difference']:+.1f} ({low:+.1f} … {high:+.1f})", style=style)


def print_verdicts(verdicts: Sequence[Verdict], console: Console) -> None:
    """Print which bars of a good instrument hold."""
    table = _table("Is this a good instrument?")
    table.add_column("")
    table.add_column("bar")
    table.add_column("measured", justify="right")
    for verdict in verdicts:
        mark = Text("holds", style="green") if verdict.passed else Text("FAILS", style="bold red")
        table.add_row(mark, verdict.bar, verdict.measured)
    console.print(table)
