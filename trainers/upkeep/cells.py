"""How well a patch classifier tells printed cells, on the test split of drawn sheets; writes its record and its card.

    python -m trainers.upkeep.cells runs/patch_classifier

Beside it stand what needs no training, at as many cells of each sheet as the classifier keeps: the variance of a cell,
PixelPrune's ranking, random cells; and PixelPrune as it decides itself. Intervals are 95 % bootstrap over sheets.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import Tensor

from prunezoo.core.errors import PruneZooError
from prunezoo.core.files import read_object
from prunezoo.core.registry import load_pruner
from prunezoo.learned.patch_classifier import PatchClassifier
from trainers.cards.about import about
from trainers.cards.markdown import bibtex, fence
from trainers.cards.parts import CARD_FILE, METRICS_FILE, weights_digest
from trainers.cli.errors import command
from trainers.cli.names import find_folder
from trainers.cli.text import shown_path
from trainers.data.sheets import Sheets, stacked
from trainers.evaluation.record import write_record
from trainers.training.cells import judge
from trainers.training.run_record import RUN_FILE, read_run

GRID, BATCH, DRAWS = 16, 16, 2000
NAMES = {
    "classifier": "chosen cells and their neighbours",
    "alone": "chosen cells alone, `?grow=false`",
    "energy": "`energy`, as many cells",
    "pixelprune": "`pixelprune`, as many cells",
    "random": "`random_input`, as many cells",
    "pixelprune_auto": '`pixelprune`, `keep="auto"`',
}
"""Rows of the table, in its order."""


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
    alone = load_pruner(f"{folder}?grow=false").eval()
    pruner.eval()
    data = Sheets("test", sheets, pruner.config.side, GRID)
    found: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    for first in range(0, sheets, BATCH):
        pixels, labels = stacked([data[i] for i in range(first, min(first + BATCH, sheets))])
        printed, kept = judge(pruner, pixels, labels)
        count = kept.sum(1)
        runs: dict[str, tuple[Any, Any]] = {
            "alone": (alone, "auto"),
            "energy": (others["energy"], count),
            "pixelprune": (others["pixelprune"], count),
            "random": (others["random_input"], count),
            "pixelprune_auto": (others["pixelprune"], "auto"),
        }
        masks = {"classifier": kept} | {
            name: judge(other, pixels, labels, keep)[1] for name, (other, keep) in runs.items()
        }
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


def render(folder: Path, record: Mapping[str, Any]) -> ModelCard:
    """The card of a folder, from its record and the record of its training."""
    said, run = about(PatchClassifier), read_run(folder / RUN_FILE)
    lines = ["| | printed cells kept, % | all cells kept, % |", "|---|---|---|"]
    for name, title in NAMES.items():
        row = record["rows"][name]
        cells = ("{:.2f} ({:.2f} to {:.2f})".format(*row[figure]) for figure in ("printed_kept", "kept"))
        lines.append(f"| {title} | {' | '.join(cells)} |")
    side = record["side"]
    results = [
        EvalResult("image-classification", "drawn sheets", "sheets", name, record["rows"]["classifier"][name][0], title)
        for name, title in (("printed_kept", "printed cells kept, %"), ("kept", "all cells kept, %"))
    ]
    data = ModelCardData(
        library_name="prunezoo",
        license="apache-2.0",
        tags=["prunezoo", "visual-token-pruning", "document", PatchClassifier.name],
        model_name=folder.name,
        eval_results=results,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {folder.name}\n\n{said.title}",
        "For documents, in front of the vision tower of any family that has the input stage. It was trained on cells "
        f"of {side}×{side} pixels, as Qwen2-VL and Qwen2.5-VL have them; others are scaled to that. Pictures must be "
        "normalised as these models' processors do.",
        fence(
            "from prunezoo import attach\n\n"
            f'with attach(vlm, "{shown_path(folder)}", keep="auto"):\n    vlm.generate(**inputs)',
            "python",
        ),
        f"## What it keeps\n\n{record['sheets']} drawn sheets of {record['cells']} cells each, of the test split, "
        "whose fonts were not trained on. A cell is printed on if it has ink for two pixels or more.",
        "\n".join(lines),
        "In brackets: 95 % bootstrap intervals over sheets. This says which cells stay, not what a model then answers.",
        fence(record["command"], ""),
        f"## Training\n\n{run['steps']:,} steps, {run['seconds'] / 60:.0f} minutes, {run['device']}.\n",
        fence(run["recipe"], "yaml"),
        "## Limits\n\nIt has seen drawn sheets only: no scans, no photographs, no handwriting. It reads no question.",
        "## Citation\n\n" + fence(bibtex(said.references), "bibtex"),
    ]
    return ModelCard("\n\n".join(parts) + "\n")


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
    record = read_object(folder / METRICS_FILE, what="a measurement", remedy="measure again without --card-only")
    if record.get("weights") != weights_digest(folder):
        raise PruneZooError(f"{folder}: other weights were measured than lie there now; measure it again")
    card = render(folder, record)
    (folder / CARD_FILE).write_text(str(card), encoding="utf-8")
    for name, title in NAMES.items():
        row = record["rows"][name]
        print(f"{title}: {row['printed_kept'][0]:.2f} % of the printed cells, {row['kept'][0]:.1f} % of all")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
