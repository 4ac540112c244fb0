"""How well a patch classifier tells printed cells, on the test split of drawn sheets; writes its record and its card.

    python -m trainers.upkeep.cells runs/patch_classifier

Beside it stands what needs no training, at as many cells of each sheet as it keeps without neighbours: the variance of
a cell, PixelPrune's ranking, random cells; and PixelPrune as it decides itself. Intervals: 95 % bootstrap over sheets.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunezoo.core.errors import PruneZooError
from prunezoo.core.registry import load_pruner
from prunezoo.learned.patch_classifier import PatchClassifier
from trainers.cards.cells import NAMES, measured_weights, read_measurement, render_card
from trainers.cards.parts import CARD_FILE, METRICS_FILE, weights_digest
from trainers.cli.errors import command
from trainers.cli.names import find_folder
from trainers.cli.text import shown_path
from trainers.data.sheets import Sheets, stacked
from trainers.evaluation.record import write_record
from trainers.training.cells import judge

GRID, BATCH, DRAWS = 16, 16, 2000


def measure(folder: Path, sheets: int) -> dict[str, Any]:
    """Keep cells of test sheets.

    Args:
        folder: Of a trained patch classifier.
        sheets: How many.

    Returns:
        The record, rows of percents of cells, each with its interval.

    Raises:
        PruneZooError: It is another pruner.
    """
    pruner = load_pruner(str(folder))
    if not isinstance(pruner, PatchClassifier):
        raise PruneZooError(f"{folder} holds '{pruner.name}': give a trained patch_classifier")
    others = {name: load_pruner(name).eval() for name in ("energy", "pixelprune", "random_input")}
    alone, sure = (load_pruner(f"{folder}?{options}").eval() for options in ("grow=false", "grow=false&least=0.02"))
    pruner.eval()
    data = Sheets("test", sheets, pruner.config.side, GRID)
    found: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    for first in range(0, sheets, BATCH):
        pixels, labels = stacked([data[i] for i in range(first, min(first + BATCH, sheets))])
        printed, kept = judge(sure, pixels, labels)
        count = kept.sum(1)
        runs: dict[str, tuple[Any, Any]] = {
            "classifier": (pruner, "auto"),
            "alone": (alone, "auto"),
            "energy": (others["energy"], count),
            "pixelprune": (others["pixelprune"], count),
            "random": (others["random_input"], count),
            "pixelprune_auto": (others["pixelprune"], "auto"),
        }
        masks = {"sure": kept} | {name: judge(other, pixels, labels, keep)[1] for name, (other, keep) in runs.items()}
        for name, mask in masks.items():
            found[name].append(torch.stack([printed.sum(1), mask.sum(1), (printed & mask).sum(1)], 1))
    rows = {name: _row(torch.cat(parts).numpy(), GRID**2) for name, parts in found.items()}
    return {
        "weights": weights_digest(folder),
        "split": "test",
        "sheets": sheets,
        "cells": GRID**2,
        "side": pruner.config.side,
        "command": f"python -m trainers.upkeep.cells {shown_path(folder)} --sheets {sheets}",
        "rows": rows,
    }


def _row(counts: np.ndarray, cells: int) -> dict[str, list[float]]:
    """Figures with their intervals out of ``(sheets, 3)``: printed on, kept, both."""
    rng = np.random.default_rng(0)
    draws = np.stack([counts[rng.integers(len(counts), size=len(counts))].sum(0) for _ in range(DRAWS)])

    def figures(sums: np.ndarray) -> np.ndarray:
        return 100 * np.stack([sums[..., 2] / sums[..., 0], sums[..., 1] / (len(counts) * cells)], -1)

    low, high = np.quantile(figures(draws), (0.025, 0.975), axis=0)
    values = zip(figures(counts.sum(0)), low, high, strict=True)
    return {
        name: [round(float(number), 2) for number in one]
        for name, one in zip(("printed_kept", "kept"), values, strict=True)
    }


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the record and the card."""
    p = argparse.ArgumentParser(prog="python -m trainers.upkeep.cells", description="Measure a patch classifier.")
    p.add_argument("folder", help="of a trained patch classifier")
    p.add_argument("--sheets", type=int, default=400, help="of the test split")
    p.add_argument("--card-only", action="store_true", help="render the card from the record that is there")
    args = p.parse_args(argv)
    if args.sheets < 2:
        raise PruneZooError(f"--sheets {args.sheets}: give at least 2")
    folder = Path(find_folder(args.folder))
    if not args.card_only:
        write_record(measure(folder, args.sheets), folder / METRICS_FILE)
    record = read_measurement(folder / METRICS_FILE)
    if measured_weights(record) != {weights_digest(folder)}:
        raise PruneZooError(f"{folder}: other weights were measured than lie there now; measure it again")
    (folder / CARD_FILE).write_text(str(render_card(folder, record)), encoding="utf-8")
    for name, title in NAMES.items():
        row = record["rows"][name]
        print(f"{title}: {row['printed_kept'][0]:.2f} % of the printed cells, {row['kept'][0]:.1f} % of all")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
