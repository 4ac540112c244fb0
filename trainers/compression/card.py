"""The card of a tokenizer, from what `trainers.codec` measured and from the record of its training."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from PIL import Image
from sklearn.datasets import load_sample_images

from prunezoo.core.errors import PruneZooError
from prunezoo.core.files import read_object
from prunezoo.tokenizers.base import load_tokenizer
from trainers.cards.about import about
from trainers.cards.cards import templates
from trainers.cards.parts import CARD_FILE, METRICS_FILE, weights_digest
from trainers.cli.text import shown_path
from trainers.data.photographs import centre_square, to_tensor
from trainers.evaluation.record import write_record
from trainers.training.run_record import RUN_FILE, read_run

from .figures import draw_curves, draw_pictures
from .measure import Row, shown_lengths
from .quality import METRICS
from .rivals import RIVALS

CURVES, PICTURES = "curves.png", "pictures.webp"
DIGITS = {"psnr": 2, "ssim": 3, "ms_ssim": 3, "vif": 3}  # after the point


def write_card(folder: Path, quality: Mapping[str, Any], speed: Mapping[str, Any], photographs: str) -> list[Path]:
    """Write card, metrics and figures into a tokenizer's folder.

    Args:
        folder: What `save_pretrained` wrote, with the training's `run.json` where there is one.
        quality: What `trainers.codec measure` wrote; this tokenizer is the first in it.
        speed: What `trainers.codec speed` wrote.
        photographs: What was trained and measured on, in a few words.

    Returns:
        The files that were written.

    Raises:
        PruneZooError: Other weights were measured, or not the held-out split.
    """
    metrics = {"photographs": photographs, "quality": dict(quality), "speed": dict(speed)}
    if measured_weights(metrics) != {weights_digest(folder)}:
        raise PruneZooError(f"{folder}: other weights were measured than lie there now; measure it again")
    if quality["split"] != "test":
        raise PruneZooError(f"{folder}: a card needs the held-out test split, not {quality['split']!r}")
    write_record(metrics, folder / METRICS_FILE)
    (folder / CARD_FILE).write_text(str(render_card(folder, metrics)), encoding="utf-8")
    draw_curves(quality, folder / CURVES)
    tokenizer = load_tokenizer(folder).float()
    squares = [to_tensor(square) for square in sample_squares(tokenizer.config.image_size)]
    draw_pictures(tokenizer, squares, shown_lengths(tokenizer)).save(folder / PICTURES, quality=90)
    return [folder / file for file in (CARD_FILE, METRICS_FILE, CURVES, PICTURES)]


def read_measurement(path: Path) -> dict[str, Any]:
    """What `trainers.codec measure` or `speed`, or :func:`write_card`, wrote; PruneZooError if it is none."""
    return read_object(path, what="a measurement", remedy="measure again with `python -m trainers.codec`")


def measured_weights(metrics: Mapping[str, Any]) -> set[str]:
    """SHA-256 of the tokenizer's weights, by the records of its quality, where it is the first, and of its speed."""
    return {next(iter(metrics["quality"]["weights"].values())), metrics["speed"]["weights"]}


def sample_squares(size: int) -> list[Image.Image]:
    """The left and right squares of scikit-learn's two photographs: a card may show them, and none was trained on."""
    squares = []
    for array in load_sample_images().images:
        side = min(array.shape[:2])
        squares += [centre_square(Image.fromarray(part), size) for part in (array[:, :side], array[:, -side:])]
    return squares


def render_card(folder: Path, metrics: Mapping[str, Any], repo: str | None = None) -> ModelCard:
    """The card of the tokenizer in a folder.

    Args:
        folder: What `save_pretrained` wrote, with the training's `run.json` where there is one.
        metrics: What :func:`write_card` put into its `metrics.json`.
        repo: Its Hub id, where it is rendered for the Hub.
    """
    tokenizer = load_tokenizer(folder)
    run_path = folder / RUN_FILE
    run = read_run(run_path) if run_path.is_file() else None
    quality = metrics["quality"]
    name, *others = quality["weights"]
    method = about(type(tokenizer))
    data = ModelCardData(
        license="apache-2.0",
        library_name="prunezoo",
        pipeline_tag="image-to-image",
        tags=[
            "prunezoo",
            "image-tokenizer",
            "image-compression",
            tokenizer.name,
            *(f"arxiv:{paper}" for paper in method.papers),
        ],
        model_name=folder.resolve().name,
        eval_results=eval_results(quality, name),
    )
    text = (
        templates()
        .get_template("tokenizer.md")
        .render(
            card_data=data.to_yaml(),
            name=folder.resolve().name,
            source=repo or shown_path(folder.resolve()),
            about=method.text,
            papers=method.references,
            parameters=f"{sum(p.numel() for p in tokenizer.parameters()):,}",
            config=tokenizer.config,
            cls=type(tokenizer).__name__,
            numbers=tokenizer.numbers(tokenizer.config.tokens),
            dtype=str(tokenizer.key_weight.dtype).removeprefix("torch."),
            metrics=metrics,
            titles=METRICS,
            own=own_table(quality, name),
            falls=falls(quality, name),
            rivals={rival: pair_table(quality, name, rival) for rival in RIVALS},
            verdicts={rival: verdicts(quality, rival) for rival in RIVALS},
            tallies=[tally(quality, rival) for rival in RIVALS],
            others=[
                {
                    "name": Path(other).name,
                    "trained": quality["trained"][other],
                    "furthest": furthest(quality, other),
                    "lines": pair_table(quality, name, other),
                }
                for other in others
            ],
            speed=metrics["speed"],
            run=run,
        )
    )
    return ModelCard(text)


def eval_results(quality: Mapping[str, Any], name: str) -> list[EvalResult]:
    """Every metric at every length."""
    return [
        EvalResult(
            task_type="image-to-image",
            dataset_type=quality["images"],
            dataset_name=quality["images"],
            dataset_split=quality["split"],
            metric_type=metric,
            metric_name=f"{title}, {row['tokens']} tokens",
            metric_value=row[metric],
        )
        for row in rows_of(quality, name)
        for metric, title in METRICS.items()
        if row[metric] is not None
    ]


def own_table(quality: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """One line a length: tokens, bytes, and every metric."""
    return [
        {"tokens": row["tokens"] or "–", "bytes": row["bytes"], "cells": [shown(row[m], m) for m in METRICS]}
        for row in rows_of(quality, name)
    ]


def falls(quality: Mapping[str, Any], name: str) -> list[str]:
    """Where a longer prefix is the worse one, in the mean over the photographs; empty where quality only rises."""
    rows = rows_of(quality, name)
    return [
        f"{METRICS[m].split(',')[0]} from {a['tokens']} to {b['tokens']} tokens"
        for m in METRICS
        for a, b in pairwise(rows)
        if a[m] is not None and b[m] < a[m]
    ]


def pair_table(quality: Mapping[str, Any], name: str, rival: str) -> list[dict[str, Any]]:
    """One line a size: the rival's figures, and how far this tokenizer is above, with its interval."""
    lines = []
    for own, other in zip(rows_of(quality, name), rows_of(quality, rival), strict=True):
        pairs = {p["metric"]: p for p in quality["paired"] if p["rival"] == rival and p["bytes"] == own["bytes"]}
        cells = [f"{shown(other[m], m)}, {signed(pairs[m], m)}" if m in pairs else "–" for m in METRICS]
        lines.append(
            {"tokens": own["tokens"], "bytes": own["bytes"], "fits": f"{100 * other['fits']:.0f} %", "cells": cells}
        )
    return lines


def verdicts(quality: Mapping[str, Any], rival: str) -> list[dict[str, str]]:
    """For each metric the sizes at which the tokenizer is better, the rival is, or neither surely (95 %)."""
    lines = []
    for metric, title in METRICS.items():
        sizes: dict[str, list[str]] = {"tokenizer": [], "neither": [], "rival": []}
        for pair in quality["paired"]:
            if pair["rival"] == rival and pair["metric"] == metric:
                low, high = pair["ci"]
                sizes["tokenizer" if low > 0 else "rival" if high < 0 else "neither"].append(str(pair["bytes"]))
        lines.append({"title": title.split(",")[0], **{who: ", ".join(at) or "–" for who, at in sizes.items()}})
    return lines


def tally(quality: Mapping[str, Any], rival: str) -> str:
    """In words: from which size on the rival has a file of every photograph, and how often who is surely better."""
    cis = [pair["ci"] for pair in quality["paired"] if pair["rival"] == rival]
    if not cis:
        return f"`{rival}` has a file of every photograph at none of these sizes."
    least = min(pair["bytes"] for pair in quality["paired"] if pair["rival"] == rival)
    lost, won = sum(high < 0 for _, high in cis), sum(low > 0 for low, _ in cis)
    return (
        f"`{rival}` has a file of every photograph from {least} bytes on; of the {len(cis)} comparisons there it wins "
        f"{lost}, this tokenizer {won}."
    )


def furthest(quality: Mapping[str, Any], other: str) -> str:
    """In words: where this tokenizer is furthest above another, and below it, by PSNR."""
    pairs = [pair for pair in quality["paired"] if pair["rival"] == other and pair["metric"] == "psnr"]
    ends = (max(pairs, key=lambda pair: pair["difference"]), min(pairs, key=lambda pair: pair["difference"]))
    high, low = (f"{signed(pair, 'psnr')} dB at {pair['tokens']} tokens" for pair in ends)
    return f"By PSNR the difference is between {low} and {high}."


def rows_of(quality: Mapping[str, Any], codec: str) -> Sequence[Row]:
    """What was measured of a codec, by rising size."""
    return [row for row in quality["rows"] if row["codec"] == codec]


def shown(value: float | None, metric: str) -> str:
    """A figure with the digits that its metric is given."""
    return "–" if value is None else f"{value:.{DIGITS[metric]}f}"


def signed(pair: Mapping[str, Any], metric: str) -> str:
    """A difference and its interval."""
    digits = DIGITS[metric]
    low, high = pair["ci"]
    return f"{pair['difference']:+.{digits}f} ({low:+.{digits}f} … {high:+.{digits}f})"
