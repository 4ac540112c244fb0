"""How good a stop rule's lengths are, beside fixed lengths and at equal mean length.

    python -m trainers.upkeep.stop_curve --vlm checkpoints/tiny-llava --pruner checkpoints/tail-drop-tiny \
        --suite scenes [--json F] [--figure F]

Every question is read at every length that the rule can choose. What the rule gets right at a tolerance can then be
looked up. At each of its mean lengths it is compared with fixed lengths mixed to the same mean: as many questions read
at the next shorter length and as many at the next longer one as it takes, whichever questions those are.

Letters: I items, S lengths.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from prunezoo.core.errors import PruneZooError
from prunezoo.learned.tail_drop import StopRule
from trainers.caches.prefix_losses import LossWorker, losses_of
from trainers.cards.parts import weights_digest
from trainers.cli.errors import check_output, command
from trainers.cli.names import find_pruner, find_vlm
from trainers.cli.options import add_option, check_at_least_one
from trainers.cli.terminal import Terminal
from trainers.data.suite import SPLITS, load_suite
from trainers.evaluation.curves import COLOURS, GREY, save_figure
from trainers.evaluation.loading import default_device, default_dtype
from trainers.evaluation.record import versions, write_record
from trainers.evaluation.statistics import Floats, interval, resample
from trainers.training.stop_rule import load_latents

FIXED, RULE, MIXED = "fixed length", "stop rule", "fixed lengths mixed"


@dataclass(frozen=True)
class Point:
    """One way to choose lengths.

    Attributes:
        kind: FIXED, RULE or MIXED.
        keep: as `attach` takes it; of a mixture that of the rule beside it.
        lengths: (I,) tokens.
        right: (I,) in [0, 1].
        loss: (I,) nats.
    """

    kind: str
    keep: str
    lengths: Floats
    right: Floats
    loss: Floats


def points_of(rule: StopRule, tolerance: float, table: dict[str, torch.Tensor], means: Sequence[int]) -> list[Point]:
    """Each fixed length; the rule at its own tolerance and at each mean, and beside it the mixture of equal mean.

    Args:
        rule: the rule.
        tolerance: of keep="auto".
        table: from `losses_of`.
        means: for keep="auto:K".
    """
    stops = np.array(rule.stops, dtype=np.float64)
    loss, right = table["loss"].double().numpy(), table["right"][:, 1:].double().numpy()
    points = [
        Point(FIXED, f"{stops[s]:.0f}", np.full(len(loss), stops[s]), right[:, s], loss[:, s])
        for s in range(len(stops))
    ]
    expected = rule(table["known"]).detach()
    accepted = {"auto": tolerance, **{f"auto:{mean}": rule.tolerance_of(mean) for mean in means}}
    rows = np.arange(len(loss))
    for keep, accept in accepted.items():
        chosen = rule.choose(expected, accept).numpy()
        lengths = stops[chosen]
        points.append(Point(RULE, keep, lengths, right[rows, chosen], loss[rows, chosen]))
        above = int(np.searchsorted(stops, lengths.mean()).clip(1, len(stops) - 1))
        part = (lengths.mean() - stops[above - 1]) / (stops[above] - stops[above - 1])
        mixed = [(1 - part) * values[:, above - 1] + part * values[:, above] for values in (right, loss)]
        points.append(Point(MIXED, keep, np.full(len(loss), lengths.mean()), *mixed))
    return points


def record_of(
    points: Sequence[Point], full: Floats, group_of: NDArray[np.int64], groups: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Numbers with bootstrap intervals over the questions.

    Returns:
        rows `{kind, keep, tokens, tokens_spread, retention, ci, accuracy, kl}`, means over groups but for the tokens,
        which are over questions; and paired `{keep, tokens, difference, ci}`, points of retention by which the rule is
        above the mixture of equal mean.
    """
    drawn = resample(np.stack([point.right for point in points]), full, group_of, len(groups))
    retention, draws = drawn.retention()[:, -1], drawn.retention_draws()[:, -1]
    rows, paired = [], []
    for number, point in enumerate(points):
        kl = np.mean([point.loss[group_of == group].mean() for group in range(len(groups))])
        rows.append(
            {
                "kind": point.kind,
                "keep": point.keep,
                "tokens": round(float(point.lengths.mean()), 4),
                "tokens_spread": round(float(point.lengths.std()), 4),
                "retention": round(float(retention[number]), 4),
                "ci": [round(bound, 4) for bound in interval(draws[number])],
                "accuracy": round(float(drawn.accuracy[number].mean()), 6),
                "kl": round(float(kl), 6),
            }
        )
        if point.kind == MIXED:
            above = interval(draws[number - 1] - draws[number])
            paired.append(
                {
                    "keep": point.keep,
                    "tokens": rows[-1]["tokens"],
                    "difference": round(float(retention[number - 1] - retention[number]), 4),
                    "ci": [round(bound, 4) for bound in above],
                }
            )
    return {"rows": rows, "paired": paired}


def draw(record: dict[str, Any], path: Path) -> None:
    """Retention against mean length, a line for the fixed lengths and one for the rule."""
    figure = Figure(figsize=(4.6, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for kind, colour in zip((RULE, FIXED), COLOURS, strict=False):
        rows = sorted((row for row in record["rows"] if row["kind"] == kind), key=lambda row: row["tokens"])
        tokens = [row["tokens"] for row in rows]
        axes.plot(tokens, [row["retention"] for row in rows], color=colour, marker="o", markersize=3.5, label=kind)
        axes.vlines(tokens, *zip(*(row["ci"] for row in rows), strict=True), color=colour, linewidth=1, alpha=0.6)
    axes.axhline(100, color=GREY, linewidth=0.9)
    axes.set(xscale="log", xlabel="image tokens kept, mean", ylabel="retention, %")
    ticks = [row["tokens"] for row in record["rows"] if row["kind"] == FIXED]
    axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(frameon=False, loc="lower right")
    save_figure(figure, path)


def show(record: dict[str, Any], console: Console) -> None:
    """Print the table."""
    table = Table(title=f"{record['suite']} {record['split']}, {record['n']} questions")
    for column in ("kind", "keep", "tokens", "retention", "above fixed lengths of equal mean"):
        table.add_column(column, justify="left" if column in ("kind", "keep") else "right")
    for row in record["rows"]:
        if row["kind"] == MIXED:
            continue
        pairs = [p for p in record["paired"] if p["keep"] == row["keep"] and row["kind"] == RULE]
        above = "".join(f"{p['difference']:+.1f} ({p['ci'][0]:+.1f} … {p['ci'][1]:+.1f})" for p in pairs)
        retention = f"{row['retention']:.1f} ({row['ci'][0]:.1f}–{row['ci'][1]:.1f})"
        table.add_row(row["kind"], row["keep"], f"{row['tokens']:.1f}", retention, above)
    console.print(table)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m trainers.upkeep.stop_curve", description="Measure a stop rule beside fixed lengths."
    )
    add_option(p, "vlm", required=True)
    latents = "folder of tail-drop latents with a stop rule, or tail-drop-tiny"
    add_option(p, "pruner", nargs=None, default=None, required=True, help=latents)
    add_option(p, "suite", required=True)
    add_option(p, "split", choices=SPLITS)
    add_option(p, "limit")
    p.add_argument("--mean", nargs="+", type=int, default=[2, 3, 4, 6, 8, 12, 16], help="mean lengths for the rule")
    add_option(p, "batch-size")
    add_option(p, "dtype")
    p.add_argument("--cache", type=Path, default=Path("runs/stop_curve"), help="folder for what was read")
    add_option(p, "json")
    p.add_argument("--figure", type=Path, help="draw the curve here (PNG)")
    return p


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args, console = parser().parse_args(argv), Terminal()
    check_output("--json", args.json)
    check_output("--figure", args.figure)
    check_at_least_one(args, "batch-size", "mean")
    args.vlm, args.pruner = find_vlm(args.vlm), find_pruner(args.pruner)
    pruner = load_latents(args.pruner)
    if pruner.stop is None:
        raise PruneZooError(f"--pruner {args.pruner}: it has no stop rule; train one with trainers.stop_rule")
    suite = load_suite(args.suite, args.split, args.limit)
    dtype = args.dtype or default_dtype(default_device())
    worker = LossWorker(args.vlm, dtype, suite, args.batch_size, None, pruner)
    table = losses_of(worker, args.cache / args.suite / args.split)
    groups = [item.group for item in suite]
    group_of = np.array([suite.groups.index(group) for group in groups])
    points = points_of(pruner.stop, pruner.config.tolerance, table, args.mean)
    record = {
        "vlm": args.vlm,
        "pruner": args.pruner,
        "weights": weights_digest(args.pruner),
        "suite": args.suite,
        "split": args.split,
        "n": len(suite),
        "command": shlex.join(["python", "-m", "trainers.upkeep.stop_curve", *argv]),
        "versions": versions(),
        **record_of(points, table["right"][:, 0].double().numpy(), group_of, suite.groups),
    }
    if args.json:
        write_record(record, args.json)
    show(record, console)
    if args.figure:
        draw(record, args.figure)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
