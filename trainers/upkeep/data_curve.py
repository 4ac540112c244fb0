"""What share of the data is enough: pruners trained on chosen items, as many steps each, by every way of choosing.

    python -m trainers.upkeep.data_curve --folder runs/data_curve [--config ppm_tiny atp_tiny] [--share 0.05 0.2 1]
    python -m trainers.upkeep.data_curve … --set trainer.max_steps=4 data.batch_size=4 --items 64 --limit 14

For each recipe, way, share and seed: `trainers.select` writes the list, `trainers.fit` trains on it, and all are
measured on the same questions of the test split. Ways are told from `random` at the same share and seeds: by the mean
over seeds of the differences, each over the same questions. Stopped, it goes on where it was.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from prunezoo.core.errors import PruneZooError
from prunezoo.core.hub import CONFIG_FILE
from prunezoo.core.registry import load_pruner
from trainers.cards.parts import weights_digest
from trainers.cli.errors import check_output, command
from trainers.cli.names import find_vlm
from trainers.cli.options import add_option, check_at_least_one
from trainers.cli.ours import run_ours
from trainers.cli.terminal import Terminal
from trainers.data.suite import load_suite
from trainers.evaluation.answers import join_answers
from trainers.evaluation.budgets import parse_budget
from trainers.evaluation.curves import COLOURS, MARKERS, save_figure
from trainers.evaluation.journal import Journal
from trainers.evaluation.loading import load_vlm
from trainers.evaluation.methods import PrunerMethod
from trainers.evaluation.record import build_record, versions, write_record
from trainers.evaluation.run import measure_with_progress
from trainers.evaluation.seeds import difference_of, mean_of

SPLIT = "test"
RANDOM = "random"
WAYS = {
    RANDOM: [],
    "prototype-easy": ["--hold=easy"],
    "prototype-hard": ["--hold=hard"],
    "dbp": [],
}
"""Ways of choosing, with their options of `trainers.select`."""
SHARES = (0.05, 0.1, 0.2, 0.5, 1.0)
BATCH = 32

Key = tuple[str, str, float, int]
"""Recipe, way, share, seed."""


def spoken(key: Key) -> str:
    """In a record."""
    recipe, way, share, seed = key
    return f"{recipe} {way} {share:g} {seed}"


def train(recipe: str, way: str, share: float, seed: int, args: argparse.Namespace) -> Path:
    """A pruner of a recipe on the items that are chosen in one way; without effect where it is there."""
    out: Path = args.folder / recipe / f"{way}-{share:g}-{seed}"
    if (out / CONFIG_FILE).is_file():
        return out
    data = [f"--config={recipe}", f"--data.train_items={args.items}", *(f"--{pair}" for pair in args.set)]
    if share < 1:
        only = out.with_name(f"{out.name}.json")
        only.parent.mkdir(parents=True, exist_ok=True)
        choice = [f"--method={way.partition('-')[0]}", f"--share={share}", f"--seed={seed}", *WAYS[way]]
        clusters = [] if args.clusters is None else [f"--clusters={args.clusters}"]
        cache = f"--cache={args.folder / 'embeddings'}"
        run_ours("trainers.select", *data, *choice, *clusters, cache, f"--file={only}")
        data.append(f"--data.only={only}")
    run_ours("trainers.fit", *data, f"--seed_everything={seed}", f"--out={out}")
    return out


def train_all(args: argparse.Namespace, console: Console) -> dict[Key, Path]:
    """Folders by recipe, way, share and seed. With all items no way chooses: they are under `random`."""
    asked = [
        (recipe, way, share, seed)
        for recipe in args.config
        for share in sorted(args.share, reverse=True)
        for way in (args.method if share < 1 else [RANDOM])
        for seed in args.seed
    ]
    found = {}
    for number, key in enumerate(asked, start=1):
        recipe, way, share, seed = key
        console.print(f"{number} of {len(asked)}: {recipe}, {share:.0%} by {way}, seed {seed}", markup=False)
        found[key] = train(*key, args)
    return found


def measure(args: argparse.Namespace, folders: Mapping[Key, Path], console: Console) -> dict[str, Any]:
    """The record of all of them on the same questions, each under the words of its key."""
    suite = load_suite(args.suite, SPLIT, args.limit)
    vlm, processor = load_vlm(args.vlm)
    pruners = {spoken(key): load_pruner(path).to(vlm.device).eval() for key, path in folders.items()}
    methods = [PrunerMethod(name, [pruner]) for name, pruner in pruners.items()]
    facts = [args.vlm, args.keep, suite.fingerprint(), {spoken(key): weights_digest(p) for key, p in folders.items()}]
    journal = Journal(args.json.with_name(f"{args.json.name}.partial.npz"), json.dumps(facts))
    found = measure_with_progress(vlm, processor, suite, methods, [parse_budget(args.keep)], BATCH, journal, console)
    header = {"vlm": args.vlm, "suite": suite.name, "suite_version": suite.version, "split": SPLIT, "seed": 0}
    record = build_record(found, [], {**header, "command": ""})
    journal.remove()
    return record


def rows_of(measured: Mapping[str, Any], keys: Sequence[Key], keep: str) -> list[dict[str, Any]]:
    """`{recipe, method, share, seeds, retention, of_seeds, difference, ci}` for each recipe, way and share.

    The difference is to `random` at the same share, mean over the seeds, with its 95 % interval over the questions;
    None where there is nothing to compare with.

    Raises:
        PruneZooError: On so few questions the model cannot be told from a blind one.
    """
    resampled = join_answers([measured]).resample([(spoken(key), keep) for key in keys])
    points, draws = resampled.retention()[:, -1], resampled.retention_draws()[:, -1]
    if np.isnan(points).any():
        raise PruneZooError(f"--limit {measured['n']}: too few questions to tell the model from a blind one; ask more")
    at, rows = {key: number for number, key in enumerate(keys)}, []
    for recipe, way, share in dict.fromkeys(key[:3] for key in keys):
        seeds = [key[3] for key in keys if key[:3] == (recipe, way, share)]
        own = [at[recipe, way, share, seed] for seed in seeds]
        lot = [at[recipe, RANDOM, share, seed] for seed in seeds if (recipe, RANDOM, share, seed) in at]
        row: dict[str, Any] = {"recipe": recipe, "method": way, "share": share, "seeds": seeds}
        row |= {**mean_of(points, own), "difference": None, "ci": None}
        if way != RANDOM and len(lot) == len(own):
            row |= difference_of(points, draws, own, lot)
        rows.append(row)
    return rows


def draw(rows: Sequence[dict[str, Any]], keep: str, path: Path) -> None:
    """Retention against the share, a panel for each recipe; bars from the lowest to the highest seed."""
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    figure = Figure(figsize=(4.3 * len(recipes), 3.2), layout="constrained")
    ways = list(dict.fromkeys(row["method"] for row in rows))
    for number, recipe in enumerate(recipes, start=1):
        axes = figure.add_subplot(1, len(recipes), number)
        for way, colour, marker in zip(ways, COLOURS, MARKERS, strict=False):
            own = sorted(
                (row for row in rows if row["recipe"] == recipe and (row["method"] == way or row["share"] == 1)),
                key=lambda row: row["share"],
            )
            shares = [100 * row["share"] for row in own]
            axes.plot(shares, [row["retention"] for row in own], marker=marker, color=colour, markersize=4, label=way)
            ends = [(min(row["of_seeds"]), max(row["of_seeds"])) for row in own]
            axes.vlines(shares, *zip(*ends, strict=True), color=colour, linewidth=1, alpha=0.6)
        axes.set(xscale="log", title=recipe, xlabel="share of the items, %")
        if number == 1:
            axes.set_ylabel(f"retention at {keep}, %")
            axes.legend(frameon=False, fontsize=8, loc="lower right")
    save_figure(figure, path)


def show(record: dict[str, Any], console: Console) -> None:
    """Print the table."""
    table = Table(title=f"{record['suite']} {record['split']}, {record['n']} questions, keep {record['keep']}")
    for column in ("recipe", "method", "share", "seeds", "retention: mean, lowest to highest", "to random"):
        table.add_column(column, justify="left" if column in ("recipe", "method") else "right")
    for row in record["rows"]:
        spread = f"{row['retention']:.1f}, {min(row['of_seeds']):.1f} to {max(row['of_seeds']):.1f}"
        apart = "" if row["ci"] is None else f"{row['difference']:+.1f} ({row['ci'][0]:+.1f} to {row['ci'][1]:+.1f})"
        table.add_row(row["recipe"], row["method"], f"{row['share']:.0%}", str(len(row["seeds"])), spread, apart)
    console.print(table)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m trainers.upkeep.data_curve", description="Train on chosen items, and measure what is enough."
    )
    p.add_argument("--config", nargs="+", default=["ppm_tiny", "atp_tiny"], help="recipes in configs/, on one suite")
    p.add_argument("--method", nargs="+", choices=WAYS, default=list(WAYS), help="ways of choosing")
    p.add_argument("--share", nargs="+", type=float, default=list(SHARES), help="of the items, in (0, 1]")
    p.add_argument("--seed", nargs="+", type=int, default=[1, 2, 3], help="of choice and training")
    p.add_argument("--items", type=int, default=4096, help="among how many is chosen")
    p.add_argument("--clusters", type=int, help="of prototype and dbp; by default those of trainers.select")
    p.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="keys of the recipes")
    add_option(p, "keep", nargs=None, default="1/9")
    add_option(p, "vlm", default="tiny-llava")
    add_option(p, "suite", default="scenes")
    add_option(p, "limit", default=2100)
    p.add_argument("--folder", type=Path, default=Path("runs/data_curve"), help="where the pruners lie")
    add_option(p, "json", required=True, help="file for the numbers")
    p.add_argument("--figure", type=Path, help="draw the curve here (PNG)")
    return p


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args, console = parser().parse_args(argv), Terminal()
    check_at_least_one(args, "limit", "items")
    if wrong := [share for share in args.share if not 0 < share <= 1]:
        raise PruneZooError(f"--share {wrong[0]:g}: above 0, and at most 1")
    check_output("--json", args.json)
    check_output("--figure", args.figure)
    args.vlm = find_vlm(args.vlm)
    folders = train_all(args, console)
    measured = measure(args, folders, console)
    facts = {"command": shlex.join(["python", "-m", "trainers.upkeep.data_curve", *argv]), "vlm": args.vlm}
    facts |= {name: measured[name] for name in ("suite", "suite_version", "split", "n")}
    facts |= {"keep": args.keep, "items": args.items, "set": args.set, "versions": versions()}
    record = {**facts, "rows": rows_of(measured, list(folders), args.keep)}
    write_record(record, args.json)
    show(record, console)
    if args.figure:
        draw(record["rows"], args.keep, args.figure)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
