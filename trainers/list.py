"""What is in the zoo: `python -m trainers.list [NAME …]` shows every method and every shipped pruner as a table.

The results are those of the shipped records: mean retention, in percent of the frozen model with all its tokens, at the
budgets that were measured. `--markdown` prints the table of docs/choose.md, `--axes` where each method stands on the
axes by which surveys of pruning sort.
"""

import argparse
import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from prunezoo.core.registry import list_pruners
from trainers.cards.axes import NOTE, axes
from trainers.cards.axes import lines_of as axes_of
from trainers.cards.zoo import Entry, entries, lines_of, markdown
from trainers.cli.errors import command
from trainers.cli.names import find_pruner
from trainers.cli.terminal import Terminal
from trainers.evaluation.summary import Zoo, read_zoo
from trainers.evaluation.tables import percent


def print_table(zoo: Zoo, found: Sequence[Entry], console: Console) -> None:
    """Print it."""
    header, lines = lines_of(zoo, found)
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption="Mean retention in % of the model with all tokens; work: own operations as a share of a prefill's.",
    )
    for number, name in enumerate(header):
        is_number = name.endswith(("tokens", "work"))
        shown = name.replace(" ", "\n") if is_number else name
        table.add_column(shown, justify="right" if is_number else "left", no_wrap=number < 2 or is_number)
    for line in lines:
        table.add_row(*line, style="bold" if line[1] == "learned" and line[3] != "not shipped" else None)
    console.print(table)


def print_axes(methods: Sequence[str], console: Console) -> None:
    """Print where methods stand."""
    header, lines = axes_of(methods)
    table = Table(*header, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption=NOTE)
    for line in lines:
        table.add_row(*line)
    console.print(table)


def print_entry(entry: Entry, console: Console) -> None:
    """Print all that is known of one."""
    console.rule(Text(entry.name, style="bold").append(f" ({entry.method}, {entry.kind}, {entry.stage} stage)", "none"))
    console.print(entry.about.text, highlight=False)
    console.print(f"\nEvidence: {entry.about.evidence}.", highlight=False)
    if entry.work is not None:
        console.print(f"Own operations, at 1/9: {100 * entry.work:.1f} % of a prefill's.", highlight=False)
    for row in entry.line.rows if entry.line else ():
        low, high = row["ci"]
        kept = f"keep {row['keep']}: {row['tokens']:g} tokens"
        console.print(f"{kept}, retention {percent(row['retention'])} % ({low:.1f} to {high:.1f})", highlight=False)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print the zoo."""
    p = argparse.ArgumentParser(prog="python -m trainers.list", description="Show the pruners of the zoo.")
    p.add_argument("name", nargs="*", help="tell all about these: a method or a shipped pruner")
    p.add_argument("--axes", action="store_true", help="by what methods decide, where and when; how fast they are")
    p.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    args = p.parse_args(argv)
    console = Terminal(width=None if sys.stdout.isatty() else 144)
    if args.axes:
        print_axes(args.name or list_pruners(), console)
        return 0
    zoo = read_zoo()
    found = entries(zoo)
    if args.markdown:
        print(markdown(), end="")
    elif not args.name:
        print_table(zoo, found, console)
    for name in args.name:
        chosen = [entry for entry in found if name in (entry.name, entry.method)]
        if not chosen:
            find_pruner(name)  # says what is near
        for entry in chosen:
            print_entry(entry, console)
            where = "; ".join(f"{axis} {value}" for axis, value in axes(entry.method).items())
            console.print(f"Axes: {where}.", highlight=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
