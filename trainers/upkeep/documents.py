"""What pruners keep of documents: the table of docs/pages.md and README's sentence, from one record and the league."""

from trainers.cli.names import ROOT
from trainers.evaluation import league
from trainers.evaluation.record import mean_row, read_record, select
from trainers.evaluation.scores import ALL_TOKENS, FULL
from trainers.evaluation.tables import budgets_of, display_name, methods_of, percent, span

RECORD = ROOT / "hub_cards" / "pages" / "prompt.json"
TRAINED, KEEP = "checkpoints/ppm-pages", "1/9"
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
    """Of README's first lines: a trained pruner on documents, and the best without training at as many tokens."""
    full = mean_row(league.read_league(league.PAGES)[0], FULL, ALL_TOKENS)
    places = league.league(league.PAGES)[KEEP]
    (trained,) = (place.row for place in places if place.name == TRAINED)
    # some methods cannot be brought down to what is asked, and read more
    free = (place for place in places if place.kind == league.PUBLISHED and place.row["tokens"] <= trained["tokens"])
    plain = next(free)
    return (
        f"Of questions about forms, tables and charts, with {trained['tokens']:.0f} of {full['tokens']:.0f} tokens, "
        f"PPM keeps {trained['retention']:.1f} %, and `{plain.name}`, the best without training, "
        f"{plain.row['retention']:.1f} % ([pages](docs/pages.md))."
    )
