"""Compare the speed of today's code with the stored records, by ratios within one run.

    python -m trainers.upkeep.bench_check                  measure anew, as the stored record was, and compare
    python -m trainers.upkeep.bench_check --new A.json     compare a record that is there already
    … --only divprune ppm --repeats 3                      fewer pruners or repeats, for a first look

Seconds of two machines, or of two days, cannot be compared. What is compared is each case against the bare model of its
own run: the speed-up of every part, the pruner's own time as a share of a prefill, and what attaching costs. Named is
what got worse by more than 10 % and by more than both spreads together; the exit code is then 1.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from prunezoo.core.errors import PruneZooError
from prunezoo.core.files import read_object
from trainers.benchmarking.measure import BARE
from trainers.cli.errors import command
from trainers.cli.terminal import Terminal
from trainers.evaluation.tables import WIDE
from trainers.upkeep.support import ROOT

STORED = ROOT / "hub_cards" / "speed.json"
NEW = Path("runs") / "bench" / "speed.json"
WORSE = 0.1
COMPARED = ("vision", "prefill", "first_token", "decode", "end_to_end", "peak_memory")
"""Parts whose speed-up is compared; the pruner's own time is, as a share of the bare model's prefill."""


@dataclass(frozen=True)
class Ratio:
    """A number that means the same on any machine; the larger the better."""

    value: float
    spread: float  # interquartile range


Ratios = dict[tuple[str, ...], Ratio]


def read_speed(path: Path) -> dict[str, Any]:
    """A record of `trainers.benchmark`.

    Raises:
        PruneZooError: No such file, no JSON, or another record.
    """
    keys = ("vlm", "command", "dtype", "rows", "overhead")
    return read_object(path, *keys, what="a record of speed", remedy="write it with `trainers.benchmark … --json`")


def ratios_of(record: Mapping[str, Any]) -> Ratios:
    """Every ratio of a record, by setting, pruner, budget and part.

    The cost of a pruner, and that of attaching, enters as what is left of the speed: 1 / (1 + cost in prefills). So a
    cost of 0.3 % that doubles is no loss of 10 %.
    """
    found: Ratios = {}
    prefill = {_setting(row): row["median_s"] for row in record["rows"] if _is(row, BARE, "prefill")}
    for row in record["rows"]:
        key = (*_setting(row), row["pruner"], row["keep"], row["part"])
        if row["pruner"] == BARE:
            continue
        if row["part"] in COMPARED:
            found[key] = Ratio(row["speedup"], row["speedup_spread"] or 0.0)
        elif row["part"] == "pruner":
            whole = prefill[_setting(row)]
            found[key] = Ratio(1 / (1 + row["median_s"] / whole), row["spread"] / whole)
    for cost in record["overhead"]:
        found[*_setting(cost), "attach", "1.0", "prefill"] = Ratio(1 / (1 + cost["share"]), cost["spread"])
    return found


def _setting(row: Mapping[str, Any]) -> tuple[str, str]:
    return f"batch {row['batch']}", f"{row['length']} text tokens"


def _is(row: Mapping[str, Any], pruner: str, part: str) -> bool:
    return bool(row["pruner"] == pruner and row["part"] == part)


def compare(old: Ratios, new: Ratios) -> Iterator[tuple[tuple[str, ...], Ratio, Ratio, bool]]:
    """What both runs have: the key, both ratios, and whether it got worse by more than noise and 10 %."""
    for key in old.keys() & new.keys():
        before, after = old[key], new[key]
        lost = before.value - after.value
        yield key, before, after, lost > WORSE * before.value and lost > before.spread + after.spread


def options_of(stored: Mapping[str, Any], only: Sequence[str], repeats: int | None) -> list[str]:
    """The command line that wrote a record, for a new one.

    Raises:
        PruneZooError: The record has none of the pruners ``only``, or is not of `trainers.benchmark`.
    """
    words = shlex.split(stored["command"])
    if words[:3] != ["python", "-m", "trainers.benchmark"]:
        raise PruneZooError("'command' of the stored record is not of trainers.benchmark: write it anew, `make speed`")
    options: dict[str, list[str]] = {}
    for word in words[3:]:
        if word.startswith("--"):
            values = options.setdefault(word, [])
        else:
            values.append(word)
    names = [name for name in options["--pruner"] if not only or name in only]
    if not names:
        raise PruneZooError(f"--only {' '.join(only)}: the stored record has {', '.join(options['--pruner'])}")
    options |= {"--pruner": names, "--json": [str(NEW)]}
    if repeats is not None:
        options["--repeats"] = [str(repeats)]
    return [word for option, values in options.items() for word in (option, *values)]


def report(old: Ratios, new: Ratios, console: Console) -> int:
    """Print what got worse; gives the number of such ratios back."""
    rows = list(compare(old, new))
    worse = sorted((row for row in rows if row[3]), key=lambda row: row[2].value / row[1].value)
    if worse:
        table = Table(title="slower than stored", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in ("setting", "pruner", "keep", "part", "stored", "now"):
            table.add_column(name)
        for (batch, length, pruner, keep, part), before, after, _ in worse:
            cells = (f"{ratio.value:.3f} ± {ratio.spread:.3f}" for ratio in (before, after))
            table.add_row(f"{batch}, {length}", pruner, keep, part, *cells)
        console.print(table)
    kept = len(rows) - len(worse)
    console.print(f"{kept} of {len(rows)} ratios are within {WORSE:.0%} of the stored ones, or within their spread")
    if missing := len(old.keys() - new.keys()):
        console.print(f"{missing} stored ratios were not measured")
    return len(worse)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, 1 where something got worse, 2 after a mistake that the user can mend."""
    p = argparse.ArgumentParser(prog="python -m trainers.upkeep.bench_check", description="Has anything got slower?")
    p.add_argument("--stored", type=Path, default=STORED, help="record of trainers.benchmark to compare with")
    p.add_argument("--new", type=Path, help="a record measured already; without it one is measured now")
    p.add_argument("--only", nargs="+", default=[], metavar="PRUNER", help="of the stored ones")
    p.add_argument("--repeats", type=int, help="default: as stored")
    args = p.parse_args(argv)
    stored = read_speed(args.stored)
    if args.new is None:
        NEW.parent.mkdir(parents=True, exist_ok=True)
        options = options_of(stored, args.only, args.repeats)
        words = [sys.executable, "-m", "trainers.benchmark", *options]
        if status := subprocess.run(words, cwd=ROOT, check=False).returncode:  # noqa: S603 - our own
            return status
    new = read_speed(args.new or NEW)
    if new["vlm"] != stored["vlm"] or new["dtype"] != stored["dtype"]:
        raise PruneZooError(
            f"{args.new} is of {new['vlm']} in {new['dtype']}, stored is {stored['vlm']}: no comparison"
        )
    console = Terminal(width=None if sys.stdout.isatty() else WIDE)
    return 1 if report(ratios_of(stored), ratios_of(new), console) else 0


if __name__ == "__main__":
    raise SystemExit(main())
