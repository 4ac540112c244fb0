"""The terminal's view of a record: one table a budget, methods down, question groups across."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .instrument import Verdict
from .record import MEAN, Row, select
from .scores import ALL_TOKENS, FULL, NO_TOKENS, NONE


def display_name(pruner: str) -> str:
    """A short name for a table or figure: the last part of a folder or Hub id."""
    return Path(pruner).name if "/" in pruner else pruner


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


def span(row: Row) -> str:
    """The interval of a row's retention, `95.1–98.3`."""
    low, high = row["ci"]
    return "–" if low is None else f"{low:.1f}–{high:.1f}"


def print_record(record: Mapping[str, Any], console: Console) -> None:
    """Print retention per group at each budget, then the paired differences."""
    groups = record["groups"]
    for keep in budgets_of(record):
        rows = rows_at(record, keep)
        table = Table(title=f"Retention in % at --keep {keep}", box=box.SIMPLE_HEAD, title_justify="left")
        table.add_column("pruner", no_wrap=True)
        table.add_column("tokens", justify="right")
        for group in groups:
            table.add_column(group, justify="right")
        for column in ("mean", "95 %", "accuracy", "agree", "KL"):
            table.add_column(column, justify="right", no_wrap=True)
        best = {
            group: max((r[group]["retention"] or 0.0) for p, r in rows.items() if p not in (FULL, NONE))
            for group in (*groups, MEAN)
        }
        for pruner, of in rows.items():
            mean = of[MEAN]
            cells: list[str | Text] = [display_name(pruner), f"{mean['tokens']:.1f}"]
            for group in (*groups, MEAN):
                top = pruner not in (FULL, NONE) and of[group]["retention"] == best[group]
                cells.append(Text(percent(of[group]["retention"]), style="bold green" if top else ""))
            shares = [f"{100 * mean[name]:.1f}" for name in ("accuracy", "agreement")]
            cells += [span(mean), *shares, f"{mean['kl']:.3f}"]
            table.add_row(*cells, style="dim" if pruner in (FULL, NONE) else None)
        console.print(table)
    if record["paired"]:
        console.print(_paired_table(record["paired"]))


def _paired_table(paired: Sequence[Row]) -> Table:
    table = Table(title="Paired differences of mean retention, points", box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("pruner", "rival", "keep"):
        table.add_column(column, no_wrap=True)
    for column in ("difference", "95 %"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in paired:
        low, high = row["ci"]
        clear = low is not None and (low > 0 or high < 0)
        interval = "–" if low is None else f"{low:+.1f} … {high:+.1f}"
        difference = "–" if row["difference"] is None else f"{row['difference']:+.1f}"
        table.add_row(
            display_name(row["pruner"]),
            display_name(row["rival"]),
            row["keep"],
            Text(difference, style=("green" if low > 0 else "red") if clear else "dim"),
            interval,
        )
    return table


def print_verdicts(verdicts: Sequence[Verdict], console: Console) -> None:
    """Print which bars of a good instrument hold."""
    table = Table(title="Is this a good instrument?", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("")
    table.add_column("bar")
    table.add_column("measured", justify="right")
    for verdict in verdicts:
        mark = Text("holds", style="green") if verdict.passed else Text("FAILS", style="bold red")
        table.add_row(mark, verdict.bar, verdict.measured)
    console.print(table)
