"""What pruners keep of documents: the table of docs/pages.md and README's sentence, from one record."""

from collections.abc import Mapping
from typing import Any

from trainers.cli.names import ROOT
from trainers.evaluation.record import mean_row, read_record, select
from trainers.evaluation.scores import ALL_TOKENS, FULL
from trainers.evaluation.tables import budgets_of, display_name, methods_of, percent, span

RECORD = ROOT / "hub_cards" / "pages" / "prompt.json"
TRAINED, PLAIN, KEEP = "checkpoints/ppm-pages", "divprune", "1/9"
LOOKED_UP = ("field", "cell", "dialogue")
"""Groups in which a value is found by its label."""


def documents() -> str:
    """Retention by method and budget, the best first, and what is left of the groups that look a value up."""
    record = read_record(RECORD)
    budgets = budgets_of(record)
    methods = sorted(methods_of(record), key=lambda name: -mean_row(record, name, KEEP)["retention"])
    tokens = [f"{keep}, {mean_row(record, TRAINED, keep)['tokens']:.0f} tokens" for keep in budgets]
    lines = [f"| | {' | '.join(tokens)} | {', '.join(LOOKED_UP)} at {KEEP} |", "|---|" + "---:|" * (len(budgets) + 1)]
    for name in methods:
        rows = [mean_row(record, name, keep) for keep in budgets]
        found = [select(record, pruner=name, keep=KEEP, group=group)[0] for group in LOOKED_UP]
        groups = ", ".join(percent(row["retention"]) for row in found)
        cells = [f"{percent(row['retention'])} ({span(row)})" for row in rows]
        lines.append(f"| `{display_name(name)}` | {' | '.join(cells)} | {groups} |")
    full = mean_row(record, FULL, ALL_TOKENS)
    return "\n".join(
        [
            *lines,
            "",
            f"Retention in % with 95 % intervals, the first {record['n']:,} questions of the {record['split']} split. "
            f"With all {full['tokens']:.0f} tokens the model answers {100 * full['accuracy']:.1f} % right.",
            "",
        ]
    )


def sentence() -> str:
    """The two methods of README's first lines on documents."""
    record: Mapping[str, Any] = read_record(RECORD)
    whole = mean_row(record, FULL, ALL_TOKENS)["tokens"]
    trained, plain = (mean_row(record, name, KEEP) for name in (TRAINED, PLAIN))
    return (
        f"Of questions about forms, tables and charts, with {trained['tokens']:.0f} of {whole:.0f} tokens, a "
        f"trained PPM keeps {trained['retention']:.1f} %, DivPrune {plain['retention']:.1f} % ([pages](docs/pages.md))."
    )
