"""The card of a patch classifier, from what `trainers.upkeep.cells` measured and from the record of its training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from prunezoo.core.files import read_object
from prunezoo.learned.patch_classifier import PatchClassifier
from trainers.cli.text import shown_path
from trainers.training.run_record import RUN_FILE, read_run

from .about import about
from .markdown import bibtex, fence

NAMES = {
    "classifier": "chosen cells and their neighbours",
    "alone": "chosen cells alone, `?grow=false`",
    "sure": "the same from a probability of 0.02, `?grow=false&least=0.02`",
    "energy": "`energy`, as many cells as that",
    "pixelprune": "`pixelprune`, as many cells as that",
    "random": "`random_input`, as many cells as that",
    "pixelprune_auto": '`pixelprune`, `keep="auto"`',
}
"""Rows of the table, in its order. Of 0.5, 0.2, 0.1, 0.05 and 0.02 the last is the first that keeps 99 % of the printed
cells of the validation split without their neighbours."""


def read_measurement(path: Path) -> dict[str, Any]:
    """What `trainers.upkeep.cells` wrote; PruneZooError if it is none."""
    remedy = "measure again with `python -m trainers.upkeep.cells`"
    return read_object(path, "weights", "rows", what="a measurement of cells", remedy=remedy)


def measured_weights(record: Mapping[str, Any]) -> set[str]:
    """SHA-256 of the weights that were measured."""
    return {record["weights"]}


def render_card(folder: Path, record: Mapping[str, Any], repo: str | None = None) -> ModelCard:
    """The card of a folder.

    Args:
        folder: what `save_pretrained` wrote, with the training's `run.json`.
        record: what `trainers.upkeep.cells` measured.
        repo: its Hub id, where it is rendered for the Hub.
    """
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
            f'with attach(vlm, "{repo or shown_path(folder)}", keep="auto"):\n    vlm.generate(**inputs)',
            "python",
        ),
        f"## What it keeps\n\n{record['sheets']} drawn sheets of {record['cells']} cells each, of the test split, "
        "whose fonts were not trained on. A cell is printed on if it has ink for two pixels or more.",
        "\n".join(lines),
        "In brackets: 95 % bootstrap intervals over sheets. This says which cells stay, not what a model then answers. "
        "Where the number of cells is given, the variance of a cell ranks about as well: what training adds is that it "
        "knows how many cells to keep.",
        fence(record["command"], ""),
        f"## Training\n\n{run['steps']:,} steps, {run['seconds'] / 60:.0f} minutes, {run['device']}.\n",
        fence(run["recipe"], "yaml"),
        "## Limits\n\nIt has seen drawn sheets only: no scans, no photographs, no handwriting. It reads no question.",
        "## Citation\n\n" + fence(bibtex(said.references), "bibtex"),
    ]
    return ModelCard("\n\n".join(parts) + "\n")
