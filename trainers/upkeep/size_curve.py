"""How much a PPM's size is worth: accuracy against its own operations, as shares of the model's prefill.

    python -m trainers.upkeep.size_curve --out runs/size_curve [--steps 1200] [--json F] [--figure F]

Each size is what `budget_flops` buys on the model of configs/ppm_tiny.yaml, trained by that recipe and measured on the
test split beside the others, over the same questions. What is trained or measured already is taken from the folder, so
that a run that was stopped goes on. Few steps and `--limit` show that it works, not what a size is worth.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from rich.console import Console
from rich.table import Table

from prunezoo.core.hub import CONFIG_FILE
from prunezoo.core.registry import load_pruner
from trainers.cli.errors import check_output, command
from trainers.cli.options import add_option, check_at_least_one
from trainers.cli.ours import run_ours
from trainers.cli.recipes import load_yaml
from trainers.cli.terminal import Terminal
from trainers.evaluation.curves import COLOURS, GREY, save_figure
from trainers.evaluation.record import mean_row, read_record, versions, write_record
from trainers.planning.share import share_on
from trainers.upkeep.support import ROOT

RECIPE = "configs/ppm_tiny.yaml"
VLM = "checkpoints/tiny-llava"
SHARES = (0.005, 0.01, 0.02, 0.05, 0.2)
KEEPS = ("1/9", "1/36")


def train(share: float, folder: Path, steps: int | None) -> None:
    """A PPM of a share of the prefill, by the recipe; without effect where it is there."""
    if (folder / CONFIG_FILE).is_file():
        return
    recipe = load_yaml((ROOT / RECIPE).read_text("utf-8"))
    given = recipe["model"]["init_args"]["pruner"]["init_args"]["config"]
    left = {name: value for name, value in given.items() if name not in ("hidden", "blocks")}
    recipe["model"]["init_args"]["pruner"]["init_args"]["config"] = {**left, "budget_flops": share}
    own = folder.parent / f"{folder.name}.yaml"  # as a file: what a recipe says of sizes cannot be unsaid by an option
    own.parent.mkdir(parents=True, exist_ok=True)
    own.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    more = [] if steps is None else [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}"]
    run_ours("trainers.fit", "--config", str(own), f"--out={folder}", *more, cwd=ROOT)


def rows_of(record: dict[str, Any], folders: dict[float, Path]) -> list[dict[str, Any]]:
    """`{asked, share, hidden, blocks, parameters, keep, tokens, accuracy, retention, ci}` for each size and budget."""
    rows = []
    for asked, folder in folders.items():
        pruner = load_pruner(folder)
        size = {"asked": asked, "share": share_on(pruner, str(ROOT / VLM)), "hidden": pruner.config.to_dict()["hidden"]}
        size |= {"blocks": pruner.config.to_dict()["blocks"], "parameters": sum(p.numel() for p in pruner.parameters())}
        for keep in KEEPS:
            row = mean_row(record, str(folder), keep)
            rows.append({**size, "keep": keep, **{k: row[k] for k in ("tokens", "accuracy", "retention", "ci")}})
    return rows


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Retention against the share, a line for each budget."""
    figure = Figure(figsize=(4.6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for keep, colour in zip(KEEPS, COLOURS, strict=False):
        own = sorted((row for row in rows if row["keep"] == keep), key=lambda row: row["share"])
        shares = [100 * row["share"] for row in own]
        tokens = f"{own[0]['tokens']:.0f} tokens"
        axes.plot(shares, [row["retention"] for row in own], color=colour, marker="o", markersize=3.5, label=tokens)
        axes.vlines(shares, *zip(*(row["ci"] for row in own), strict=True), color=colour, linewidth=1, alpha=0.6)
    axes.axhline(100, color=GREY, linewidth=0.9)
    axes.set(xscale="log", xlabel="pruner's operations, % of a prefill", ylabel="retention, %")
    axes.xaxis.set_major_formatter(ScalarFormatter())  # 1 and 10, not powers
    axes.legend(frameon=False, loc="lower right")
    save_figure(figure, path)


def show(record: dict[str, Any], console: Console) -> None:
    """Print the table."""
    table = Table(title=f"{record['suite']} {record['split']}, {record['n']} questions")
    for column in ("of a prefill", "hidden", "blocks", "parameters", "keep", "retention"):
        table.add_column(column, justify="right")
    for row in record["rows"]:
        kept = f"{row['retention']:.1f} ({row['ci'][0]:.1f}–{row['ci'][1]:.1f})"
        sizes = (f"{100 * row['share']:.2f} %", row["hidden"], row["blocks"], f"{row['parameters']:,}", row["keep"])
        table.add_row(*map(str, sizes), kept)
    console.print(table)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    argv = sys.argv[1:] if argv is None else list(argv)
    p = argparse.ArgumentParser(
        prog="python -m trainers.upkeep.size_curve", description="Measure what the size of a PPM is worth."
    )
    p.add_argument(
        "--out", type=Path, required=True, help="folder for what is trained and measured; a run goes on there"
    )
    p.add_argument("--share", nargs="+", type=float, default=list(SHARES), help="of a prefill, for each size")
    p.add_argument("--steps", type=int, help="of each training; by default the recipe's")
    p.add_argument("--figure", type=Path, help="draw the curve here (PNG)")
    for name in ("limit", "json"):
        add_option(p, name)
    args = p.parse_args(argv)
    check_at_least_one(args, *(name for name in ("steps", "limit") if getattr(args, name) is not None))
    check_output("--json", args.json)
    check_output("--figure", args.figure)
    out = args.out.resolve()
    folders = {share: out / f"share-{share:g}" for share in args.share}
    for share, folder in folders.items():
        train(share, folder, args.steps)
    measured = out / "measured.json"
    names = [str(folder) for folder in folders.values()]
    limit = [] if args.limit is None else ["--limit", str(args.limit)]
    if not measured.is_file() or not {row["pruner"] for row in read_record(measured)["rows"]} >= set(names):
        where = ("--vlm", VLM, "--suite", "scenes", "--json", str(measured))
        run_ours("trainers.evaluate", *where, *limit, "--keep", *KEEPS, "--pruner", *names, cwd=ROOT)
    found = read_record(measured)
    kept = {key: found[key] for key in ("vlm", "suite", "suite_version", "split", "n")}
    line = shlex.join(["python", "-m", "trainers.upkeep.size_curve", *argv])
    record = {**kept, "command": line, "versions": versions(), "rows": rows_of(found, folders)}
    if args.json:
        write_record(record, args.json)
    show(record, Terminal())
    if args.figure:
        draw(record["rows"], args.figure)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
