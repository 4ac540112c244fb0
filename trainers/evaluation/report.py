"""The page of a report: curves, tables, and pictures with what each method keeps; one file that needs no other."""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from trainers.cli.errors import whole_file

from .curves import draw_curves
from .examples import Example
from .panels import panels_of
from .pictures import data_uri, enlarge
from .record import MEAN, Row
from .scores import FULL, NONE, is_diagnostic
from .sight import is_blind, notes_of, unseen
from .tables import display_name, methods_of, percent, rows_at, span, times, tokens_of

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
    budgets, blind = rising_budgets(record), is_blind(record)
    first, rest = differences_of(record)
    page = (
        page_templates()
        .get_template("report.html.j2")
        .render(
            record=record,
            date=datetime.now(UTC).date(),
            leader=methods_of(record)[0],
            pruners=methods_of(record),
            panels=[] if blind else panels_of(record),
            notes=notes_of(record),
            blind=blind,
            unseen=unseen(record),
            differences_first=first,
            differences_rest=rest,
            summary=summary_of(record),
            budgets=list(budgets),
            preferred=preferred_budget(record),
            tables={keep: table_of(record, keep) for keep in budgets},
            groups=[*record["groups"], MEAN],
            gallery=gallery_of(record, examples, budgets),
        )
    )
    with whole_file(folder / PAGE) as scratch:
        scratch.write_text(page, encoding="utf-8", errors="backslashreplace")  # a name need not be text
    return folder / PAGE


def page_templates() -> Environment:
    """The templates of pages; `json` writes data into a script element, from which nothing in them can break out."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        name=display_name,
        percent=percent,
        span=span,
        tint=tint,
        tokens=tokens_of,
        json=to_json,
        times=times,
        clear=clear,
        code=with_code,
    )
    return environment


def to_json(value: object) -> Markup:
    """JSON for a script element."""
    return Markup(json.dumps(value).replace("<", "\\u003c"))  # noqa: S704 - no markup can begin without it


def with_code(text: str) -> Markup:
    """A note for a page: what stands between backticks as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704 - escaped before


def rising_budgets(record: Mapping[str, Any]) -> dict[str, float]:
    """The budgets and the tokens that the first method has at them, the fewest first, as on a slider."""
    leader = methods_of(record)[0]
    tokens = {row["keep"]: row["tokens"] for row in record["rows"] if row["pruner"] == leader and row["group"] == MEAN}
    return dict(sorted(tokens.items(), key=lambda pair: pair[1]))


def gallery_of(record: Mapping[str, Any], examples: Sequence[Example], budgets: Mapping[str, float]) -> dict[str, Any]:
    """What the page's script draws: pictures once, and for each budget and method the kept cells and the answer."""
    return {
        "labels": [f"{keep}: {tokens:.4g} tokens" for keep, tokens in budgets.items()],
        "preferred": list(budgets).index(preferred_budget(record)),
        "pruners": [display_name(shown) for shown in dict.fromkeys(s.pruner for e in examples for s in e.shown)],
        "examples": [_example(example, list(budgets)) for example in examples],
    }


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


def differences_of(record: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Lines of the tables of paired differences: those of the first method compared, and all others; each pair once.

    None where nothing has a retention.
    """
    if is_blind(record):
        return [], []
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    order = {pruner: number for number, pruner in enumerate(methods_of(record))}
    for pair in sorted(record["paired"], key=lambda pair: order.get(pair["pruner"], len(order))):
        ends = pair["pruner"], pair["rival"]
        if ends[::-1] not in lines and pair["difference"] is not None:
            line = lines.setdefault(ends, {"pruner": ends[0], "rival": ends[1], "pairs": {}})
            line["pairs"][pair["keep"]] = pair
    leader = next(iter(lines), ("",))[0]
    first = [line for ends, line in lines.items() if ends[0] == leader]
    return first, [line for line in lines.values() if line not in first]


def clear(pair: Row) -> bool:
    """Whether the interval of a difference leaves out 0."""
    low, high = pair["ci"]
    return bool(low > 0 or high < 0)


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


def _example(example: Example, budgets: Sequence[str]) -> dict[str, Any]:
    """What the page shows of one item; cells are counted row by row."""
    columns = example.grid[1]
    shown: list[list[dict[str, Any]]] = [[] for _ in budgets]
    for one in example.shown:
        kept = [int(row * columns + column) for row, column in one.kept]
        entry = {"kept": kept, "anchors": one.anchors, "answer": one.answer, "right": one.right}
        shown[budgets.index(one.keep)].append({"name": display_name(one.pruner), **entry})
    return {
        "group": example.item.group,
        "turns": example.item.turns,
        "answer": example.answer,
        "right": example.right,
        "tokens": example.grid[0] * columns,
        "grid": example.grid,
        "picture": data_uri(enlarge(example.picture)),
        "shown": shown,
    }
