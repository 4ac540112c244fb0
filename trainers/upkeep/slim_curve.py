"""Measure pruners that were made small, by every way: retention at 1/9 of the tokens against size and time.

    python -m trainers.upkeep.slim_curve --config ppm_tiny --pruner ppm [--sparsity 0.3 0.5 0.8 0.9] [--seed 1 2 3]
    python -m trainers.upkeep.slim_curve … --set trainer.max_steps=4 data.batch_size=4 --limit 21

Runs `trainers.slim` for each method, sparsity and seed, one after the other; measures all that came of it on the same
questions; times each pruner's own forward pass in turns with the one that they were made of. Stopped, it goes on where
it was. `lth` and `precrop` begin with the recipe's untrained pruner, the others with `--pruner`. Methods that take
units out leave one in each layer; sparsities beyond that are left out.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from prunezoo.core.contract import Pruner
from prunezoo.core.errors import PruneZooError
from prunezoo.core.registry import load_pruner
from trainers.cards.parts import weights_digest
from trainers.cli.errors import check_output, command
from trainers.cli.names import ROOT, find_pruner, find_vlm
from trainers.cli.options import add_option, check_at_least_one
from trainers.cli.ours import run_ours
from trainers.cli.terminal import Terminal
from trainers.data.suite import load_suite
from trainers.evaluation.curves import COLOURS, GREY, MARKERS, save_figure
from trainers.evaluation.loading import default_device, device_name
from trainers.evaluation.record import versions, write_record
from trainers.slimming.measure import START, measure_all
from trainers.slimming.methods import METHODS, STRUCTURED
from trainers.slimming.note import NOTE_FILE, size_of
from trainers.slimming.sweeping import spoken
from trainers.slimming.units import as_ppm, most_that_goes
from trainers.slimming.weights import check_sparsity

from .selection import made_up
from .step_cost import clock_of

KEEP = "1/9"
UNTRAINED = ("lth", "precrop")
"""Methods that begin with an untrained pruner."""
DROPPED = 6
"""Points below the best that the chart shows."""
TUNED = ("magnitude", "lrp")
"""Methods that act at once, and are trained on as `--tune` says."""


def sparsities(args: argparse.Namespace, start: Pruner, console: Console) -> dict[str, list[float]]:
    """What each method is asked for: all, or as much as it can take out of the pruner; says what is left out.

    Raises:
        PruneZooError: One of the methods can be asked for none.
    """
    found: dict[str, list[float]] = {}
    for method in args.method:
        most = most_that_goes(as_ppm(start, method)) if method in STRUCTURED else 1.0
        found[method] = [sparsity for sparsity in args.sparsity if sparsity <= most]
        beyond = [f"{sparsity:g}" for sparsity in args.sparsity if sparsity > most]
        if not found[method]:
            raise PruneZooError(f"--sparsity {' '.join(beyond)}: {method} can take out at most {most:.3f} here")
        if beyond:
            console.print(f"{method}: at most {most:.3f} can go, so without {', '.join(beyond)}", markup=False)
    return found


def small_ones(args: argparse.Namespace, asked: Mapping[str, Sequence[float]], console: Console) -> dict[str, Path]:
    """Make all of them, or find them made; folders by `METHOD SPARSITY SEED`.

    Args:
        args: The command line.
        asked: Sparsities by method.
        console: What is run is said there.

    Raises:
        PruneZooError: One of the runs failed; it said why.
    """
    found: dict[str, Path] = {}
    for method, shares in asked.items():
        for sparsity in shares:
            # without training nothing is drawn
            for seed in args.seed if args.tune or method not in TUNED else args.seed[:1]:
                out = args.folder / f"{method}-{sparsity:g}-{seed}"
                found[f"{method} {sparsity:g} {seed}"] = out
                if (out / NOTE_FILE).is_file():
                    continue
                words = [f"--config={args.config}", f"--method={method}", f"--sparsity={sparsity}", f"--out={out}"]
                words += [f"--seed_everything={seed}", *(f"--{pair}" for pair in args.set)]
                words += [] if method in UNTRAINED else [f"--pruner={args.pruner}"]
                words += [f"--tune={args.tune}"] if method in TUNED else []
                console.print(shlex.join(["python", "-m", "trainers.slim", *words]), soft_wrap=True)
                run_ours("trainers.slim", *words)
    return found


@torch.no_grad()
def time_all(pruners: dict[str, Pruner], width: int, tokens: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Seconds of the forward pass of each for one picture, and as a share of START's, in turns with it.

    Args:
        pruners: START among them.
        width: Of the tokens.
        tokens: Of the picture.
        repeats: Times that each is measured.
    """
    device = torch.device(default_device())
    inputs, clock, keep = made_up(1, tokens, width, device), clock_of(device), max(1, tokens // 9)

    def once(pruner: Pruner) -> float:
        begin = clock()
        pruner(inputs, keep)
        return clock() - begin

    whole, found = pruners[START].to(device), {}
    for name, pruner in pruners.items():
        pruner.to(device)
        once(pruner), once(whole)  # both are warm
        pairs = [(once(pruner), once(whole)) for _ in range(repeats)]
        ratios = [own / other for own, other in pairs]
        found[name] = {
            "seconds": median(own for own, _ in pairs),
            "time": median(ratios),
            "spread": [min(ratios), max(ratios)],
        }
    return found


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Retention against parameters that are not zero, and against time; a colour for each method.

    What lost more than DROPPED points stands on the lower edge, with its figure: else all others would lie on a line.
    """
    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    rows = [row for row in rows if row["retention"] is not None]  # of few questions the model may see nothing
    methods = list(dict.fromkeys(row["method"] for row in rows if row["method"] != START))
    edge = max((row["retention"] for row in rows), default=100.0) - DROPPED
    panels = (
        ("not_zero", 1000, "thousand parameters that are not zero"),
        ("time", 1, "time of the pruner, 1 = before"),
    )
    for number, (key, unit, label) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, 2, number)
        for start in (row for row in rows if row["method"] == START):
            axes.axhline(start["retention"], color=GREY, linewidth=0.9)
        for method, colour, marker in zip(methods, COLOURS, MARKERS, strict=False):
            own = [row for row in rows if row["method"] == method]
            x = [row[key] / unit for row in own]
            axes.plot(x, [max(row["retention"], edge) for row in own], marker, color=colour, markersize=4, label=method)
            ends = [[max(end, edge) for end in row["ci"]] for row in own]
            axes.vlines(x, *zip(*ends, strict=True), color=colour, linewidth=1, alpha=0.6)
            for at, row in zip(x, own, strict=True):
                if row["retention"] < edge:
                    axes.annotate(f" {row['retention']:.0f} %", (at, edge), color=colour, fontsize=8, va="bottom")
        axes.set(xlabel=label, ylabel=f"retention at {KEEP}, %" if number == 1 else "")
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    save_figure(figure, path)


def show(record: dict[str, Any], console: Console) -> None:
    """Print the table."""
    table = Table(title=f"{record['suite']} {record['split']}, {record['n']} questions, keep {KEEP}")
    for column in ("method", "sparsity", "seed", "parameters", "not zero", "retention", "time"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in record["rows"]:
        retention = spoken(row["retention"], row["ci"])
        sizes = f"{row['parameters']:,}", f"{row['not_zero']:,}"
        table.add_row(row["method"], f"{row['sparsity']:g}", str(row["seed"]), *sizes, retention, f"{row['time']:.2f}")
    console.print(table)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m trainers.upkeep.slim_curve", description="Make a pruner small by every way, and measure all."
    )
    p.add_argument("--config", default="ppm_tiny", help="recipe")
    add_option(p, "vlm", default="tiny-llava")
    add_option(p, "pruner", nargs=None, default="ppm", help="the trained one to begin with")
    p.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS), help="ways")
    p.add_argument("--sparsity", nargs="+", type=float, default=[0.3, 0.5, 0.8, 0.9], help="shares that go")
    p.add_argument("--seed", nargs="+", type=int, default=[1, 2, 3], help="of the trainings")
    p.add_argument("--tune", type=int, default=300, help=f"steps of training behind {' and '.join(TUNED)}")
    p.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="keys of the recipe")
    add_option(p, "suite", default="scenes")
    add_option(p, "limit", default=2100)
    p.add_argument("--repeats", type=int, default=20, help="times that each is timed")
    p.add_argument("--tokens", type=int, default=144, help="image tokens of the picture that is timed")
    p.add_argument("--folder", type=Path, default=Path("runs/slim_curve"), help="where the small pruners lie")
    add_option(p, "json", default=ROOT / "hub_cards" / "slim.json")
    p.add_argument("--figure", type=Path, default=ROOT / "docs" / "slim.png", help="draw the curve here (PNG)")
    return p


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args, console = parser().parse_args(argv), Terminal()
    check_at_least_one(args, "limit", "repeats", "tokens")
    for sparsity in args.sparsity:
        check_sparsity(sparsity)
    check_output("--json", args.json)
    check_output("--figure", args.figure)
    args.vlm, args.pruner = find_vlm(args.vlm), find_pruner(args.pruner)
    start = load_pruner(args.pruner)
    folders = small_ones(args, sparsities(args, start, console), console)
    pruners = {START: start, **{name: load_pruner(str(path)) for name, path in folders.items()}}
    suite, width = load_suite(args.suite, "test", args.limit), pruners[START].base_model
    if width is None:
        raise PruneZooError(f"--pruner {args.pruner}: it was trained for no model; name a trained one")
    known_by = json.dumps([args.vlm, suite.fingerprint(), {n: weights_digest(path) for n, path in folders.items()}])
    journal = args.json.with_name(f"{args.json.name}.partial.npz")
    found = measure_all(args.vlm, suite, pruners, KEEP, journal, known_by, console)
    times = time_all(pruners, width.width, args.tokens, args.repeats)
    rows = []
    for row in found:
        name = row.pop("name")
        method, sparsity, seed = (*name.split(), 0, 0)[:3]
        named = {"method": method, "sparsity": float(sparsity), "seed": int(seed)}
        rows.append({**named, **size_of(pruners[name]), **row, **times[name]})
    facts = {"command": shlex.join(["python", "-m", "trainers.upkeep.slim_curve", *argv]), "vlm": args.vlm}
    facts |= {"suite": suite.name, "suite_version": suite.version, "split": "test", "n": len(suite), "keep": KEEP}
    facts |= {"device": device_name(torch.device(default_device())), "tune": args.tune, "versions": versions()}
    record = {**facts, "rows": rows}
    write_record(record, args.json)
    journal.unlink(missing_ok=True)
    draw(rows, args.figure)
    show(record, console)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
