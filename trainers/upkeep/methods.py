"""Which method goes with which family: run the matrix of methods and families, and note the outcomes.

    python -m trainers.upkeep.methods

The outcomes go into tests/families/methods.json, and from there into docs/families.md.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from prunezoo.core.registry import pruner_class
from trainers.cli.errors import command

from .support import ROOT, family_title, run_matrix

CELLS = ["tests/families/test_methods.py"]
OUTCOMES = ROOT / "tests" / "families" / "methods.json"


def methods_section(record: Mapping[str, Any]) -> str:
    """The table in Markdown: methods down, families across; what is refused stands below it with its reason.

    Families of which all is the same share a column.
    """
    outcomes = {tuple(name.split("-")): outcome for name, outcome in record["outcomes"].items()}
    families = list(dict.fromkeys(family for family, _ in outcomes))
    methods = sorted(dict.fromkeys(method for _, method in outcomes), key=lambda name: (pruner_class(name).stage, name))
    notes: dict[str, int] = {}
    rows = [
        [_cell(outcomes.get((family, method)), family_title(family), method, notes) for family in families]
        for method in methods
    ]
    columns: dict[tuple[str, ...], list[str]] = {}  # titles, by what stands under them
    for family, *cells in zip(families, *rows, strict=True):
        columns.setdefault(tuple(cells), []).append(family_title(family))
    titles = [", ".join(dict.fromkeys(own)) for own in columns.values()]
    lines = [f"| method | stage | {' | '.join(titles)} |", "|---|---|" + "---|" * len(titles)]
    for method, *cells in zip(methods, *columns, strict=True):
        lines.append(f"| `{method}` | {pruner_class(method).stage} | {' | '.join(cells)} |")
    lines += ["", *(f"[{number}] {note}  " for note, number in notes.items())]
    return "\n".join([*lines, "", f"With transformers {record['transformers']}.", ""])


def _cell(outcome: str | None, title: str, method: str, notes: dict[str, int]) -> str:
    """`yes`, or `no` with the number of its reason; new reasons are entered, without the names that the cell has.

    A dash where it was not run.
    """
    if outcome is None:
        return "–"
    if outcome == "yes":
        return outcome
    reason = outcome.removeprefix("refused: ").replace(f"pruner '{method}' ", "")
    reason = reason.replace(f"{title.split(' (')[0]} ", "")
    return f"no [{notes.setdefault(reason, len(notes) + 1)}]"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    p = argparse.ArgumentParser(
        prog="python -m trainers.upkeep.methods", description="Note which method goes with which family."
    )
    p.parse_args(argv)
    record = run_matrix(sys.executable, CELLS, "test_methods")
    OUTCOMES.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
