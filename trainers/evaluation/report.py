"""The page of a report: curves, tables, and pictures with what each method keeps; one file that needs no other."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .curves import draw_curves
from .examples import Example
from .pictures import data_uri, draw_kept, enlarge
from .record import MEAN, Row
from .scores import FULL, NONE, is_diagnostic
from .tables import budgets_of, display_name, methods_of, percent, rows_at, span, tokens_of

PAGE, FIGURE = "index.html", "retention.png"


def write_report(record: Mapping[str, Any], examples: Sequence[Example], folder: Path) -> Path:
    """Write the page and, beside it, its figure.

    Args:
        record: what `build_record` made.
        examples: the pictures to show; may be empty.
        folder: where to; made if need be.

    Returns:
        The page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw_curves(record, folder / FIGURE)
    figure = base64.b64encode((folder / FIGURE).read_bytes()).decode("ascii")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(name=display_name, percent=percent, span=span, tint=tint, tokens=tokens_of)
    page = environment.get_template("report.html.j2").render(
        record=record,
        figure=f"data:image/png;base64,{figure}",
        summary=summary_of(record),
        budgets=budgets_of(record),
        preferred=preferred_budget(record),
        tables={keep: table_of(record, keep) for keep in budgets_of(record)},
        groups=[*record["groups"], MEAN],
        examples=[_example(example) for example in examples],
    )
    (folder / PAGE).write_text(page, encoding="utf-8")
    return folder / PAGE


def preferred_budget(record: Mapping[str, Any]) -> str:
    """The budget that the page opens with: the one nearest to a ninth of the tokens."""
    full = next(row["tokens"] for row in record["rows"] if row["pruner"] == FULL and row["group"] == MEAN)
    leader = methods_of(record)[0]
    tokens = {row["keep"]: row["tokens"] for row in record["rows"] if row["pruner"] == leader and row["group"] == MEAN}
    return min(tokens, key=lambda keep: abs(tokens[keep] / full - 1 / 9))


def summary_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The leading method at the preferred budget, against the best other that could be used in its place."""
    keep, leader = preferred_budget(record), methods_of(record)[0]
    rows = {pruner: of[MEAN] for pruner, of in rows_at(record, keep).items()}
    pairs = {pair["rival"]: pair for pair in record["paired"] if pair["pruner"] == leader and pair["keep"] == keep}
    usable = [p for p in pairs if not is_diagnostic(p) and rows[p]["retention"] is not None]
    best = max(usable, key=lambda p: rows[p]["retention"], default=None)
    return {
        "keep": keep,
        "leader": rows[leader],
        "full": rows[FULL],
        "none": rows[NONE],
        "rival": rows[best] if best else None,
        "pair": pairs[best] if best else None,
    }


def table_of(record: Mapping[str, Any], keep: str) -> list[dict[str, Any]]:
    """Lines of one budget's table: method, its rows by group, and in which groups it is the best usable one."""
    rows = rows_at(record, keep)
    usable = [pruner for pruner in rows if pruner not in (FULL, NONE) and not is_diagnostic(pruner)]
    best = {group: max((rows[p][group]["retention"] or 0 for p in usable), default=0) for group in rows[FULL]}
    return [
        {
            "pruner": pruner,
            "rows": of,
            "best": {group: pruner in usable and row["retention"] == best[group] for group, row in of.items()},
            "quiet": pruner not in usable,
        }
        for pruner, of in rows.items()
    ]


def tint(row: Row) -> str:
    """Background of a cell: from paper at half the full model's accuracy to green at all of it."""
    share = min(max(((row["retention"] or 0) - 50) / 50, 0), 1)
    return f"rgba(0, 130, 90, {0.30 * share:.3f})"


def _example(example: Example) -> dict[str, Any]:
    """What the template shows of one item."""
    shown = [
        {
            "pruner": shown.pruner,
            "keep": shown.keep,
            "tokens": len(shown.kept),
            "anchors": shown.anchors,
            "answer": shown.answer,
            "right": shown.right,
            "picture": data_uri(draw_kept(example.item.image, example.grid, shown.kept, shown.anchors)),
        }
        for shown in example.shown
    ]
    return {
        "group": example.item.group,
        "turns": example.item.turns,
        "answer": example.answer,
        "right": example.right,
        "tokens": example.grid[0] * example.grid[1],
        "picture": data_uri(enlarge(example.item.image)),
        "shown": shown,
    }
