"""What is in the zoo: `python -m trainers.list [NAME …]` shows every method and every shipped pruner as a table.

The results are those of the shipped records: mean retention, in percent of the frozen model with all its tokens, at the
budgets that were measured. `--markdown` prints the table of docs/choose.md.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from modules.core.registry import list_pruners, pruner_class

from .about import About, about
from .card_parts import METRICS_FILE
from .errors import command
from .evaluation.record import MEAN, Row, read_record, select
from .evaluation.tables import percent
from .names import CHECKPOINTS, find_pruner, has_weights, methods_shipped

REFERENCE = "ppm-tiny"
"""The shipped pruner in whose record the training-free methods were measured, all under one command."""
SHARES = (1 / 3, 2 / 9, 1 / 9, 1 / 18)
TOLERANCE = 0.05  # of a budget, within which measured tokens stand in its column


@dataclass(frozen=True)
class Entry:
    """One line: a method, or a trained pruner of it.

    Attributes:
        name: what commands take.
        method: its registry name.
        kind: learned or training-free.
        stage: vision, prompt or layer.
        trained_for: the frozen model; empty for what needs no training, None for a learned method that is not shipped.
        rows: mean rows of its record, where it was measured.
        about: the method in words.
    """

    name: str
    method: str
    kind: str
    stage: str
    trained_for: str | None
    rows: list[Row]
    about: About


def entries() -> list[Entry]:
    """The whole zoo: what is learned first, the trained pruners under their own names."""
    shipped = methods_shipped()
    reference = read_record(CHECKPOINTS / REFERENCE / METRICS_FILE)
    found = []
    for method in sorted(list_pruners(), key=lambda name: (not has_weights(name), name)):
        cls = pruner_class(method)
        stage = "several" if method == "combined" else cls.stage
        if not has_weights(method):
            rows = select(reference, pruner=method, group=MEAN)
            found.append(Entry(method, method, "training-free", stage, "", rows, about(cls)))
            continue
        folders = [folder for folder, of in shipped.items() if of == method]
        for folder in folders:
            stored = json.loads((CHECKPOINTS / folder / "config.json").read_text(encoding="utf-8"))
            path = CHECKPOINTS / folder / METRICS_FILE
            metrics = read_record(path) if path.is_file() else {"rows": []}
            rows = [row for row in metrics["rows"] if row["pruner"] == metrics["pruner"] and row["group"] == MEAN]
            model = stored.get("base_model", {}).get("name", "not noted")
            found.append(Entry(folder, method, "learned", stage, model.rpartition("/")[2], rows, about(cls)))
        if not folders:
            found.append(Entry(method, method, "learned", stage, None, [], about(cls)))
    return found


def result(entry: Entry, share: float, tokens: float) -> str:
    """Mean retention at a share of the tokens, or a dash."""
    for row in entry.rows:
        if abs(row["tokens"] / tokens - share) <= TOLERANCE * share:
            return percent(row["retention"])
    return "–"


def lines_of(found: Sequence[Entry]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table."""
    reference = read_record(CHECKPOINTS / REFERENCE / METRICS_FILE)
    tokens = next(row["tokens"] for row in reference["rows"] if row["pruner"] == "full")
    header = ["name", "kind", "stage", "trained for", *(f"{tokens * share:.0f} tokens" for share in SHARES), "paper"]
    lines = []
    for entry in found:
        papers = "–" if entry.about.evidence == "ours" else f"arXiv {entry.about.papers[0]}"
        trained = "not shipped" if entry.trained_for is None else entry.trained_for or "–"
        results = [result(entry, share, tokens) for share in SHARES]
        lines.append([entry.name, entry.kind, entry.stage, trained, *results, papers])
    return header, lines


def markdown() -> str:
    """The table of docs/choose.md, with the command behind its numbers."""
    header, lines = lines_of(entries())
    reference = read_record(CHECKPOINTS / REFERENCE / METRICS_FILE)
    rows = [f"| {' | '.join(header)} |", "|---|---|---|---|" + "---:|" * len(SHARES) + "---|"]
    rows += [f"| {' | '.join([f'`{line[0]}`', *line[1:]])} |" for line in lines]
    said = (
        f"Mean retention in % on `{reference['suite']}`, {reference['split']} split, with `{reference['vlm']}`; how "
        f"many questions, and the command, stand in each card, for methods without weights {reference['n']} and "
        "the one below; a dash: not measured at that budget in what ships."
    )
    return "\n".join([*rows, "", said, "", "```", reference["command"], "```", ""])


def print_table(found: Sequence[Entry], console: Console) -> None:
    """Print it."""
    header, lines = lines_of(found)
    table = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption="Mean retention in % of the model with all tokens."
    )
    for number, name in enumerate(header):
        is_number = name.endswith("tokens")
        table.add_column(name, justify="right" if is_number else "left", no_wrap=number == 0 or is_number)
    for line in lines:
        table.add_row(*line, style="bold" if line[1] == "learned" and line[3] != "not shipped" else None)
    console.print(table)


def print_entry(entry: Entry, console: Console) -> None:
    """Print all that is known of one."""
    console.rule(f"[bold]{entry.name}[/] ({entry.method}, {entry.kind}, {entry.stage} stage)")
    console.print(entry.about.text, highlight=False)
    console.print(f"\nEvidence: {entry.about.evidence}.", highlight=False)
    for row in entry.rows:
        low, high = row["ci"]
        kept = f"keep {row['keep']}: {row['tokens']:g} tokens"
        console.print(f"{kept}, retention {percent(row['retention'])} % ({low:.1f} to {high:.1f})", highlight=False)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print the zoo."""
    p = argparse.ArgumentParser(prog="python -m trainers.list", description="Show the pruners of the zoo.")
    p.add_argument("name", nargs="*", help="tell all about these: a method or a shipped pruner")
    p.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    args = p.parse_args(argv)
    console: Any = Console(width=None if sys.stdout.isatty() else 132)
    found = entries()
    if args.markdown:
        print(markdown(), end="")
    elif not args.name:
        print_table(found, console)
    for name in args.name:
        chosen = [entry for entry in found if name in (entry.name, entry.method)]
        if not chosen:
            find_pruner(name)  # says what is near
        for entry in chosen:
            print_entry(entry, console)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
