"""Curves of quality against bytes, and pictures painted from ever longer prefixes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib import pyplot
from matplotlib.ticker import ScalarFormatter
from PIL import Image, ImageDraw
from torch import Tensor

from prunezoo.tokenizers.base import Text, Tokenizer
from trainers.cli.text import in_figure

from .quality import METRICS

matplotlib.use("Agg")
GAP, LABEL = 4, 14  # pixels


def draw_curves(record: Mapping[str, Any], path: Path) -> None:
    """One panel a metric, one line a codec, against bytes."""
    figure, panels = pyplot.subplots(1, len(METRICS), figsize=(4 * len(METRICS), 3.6), layout="constrained")
    for panel, (metric, title) in zip(panels, METRICS.items(), strict=True):
        for codec in dict.fromkeys(row["codec"] for row in record["rows"]):
            points = [(r["bytes"], r[metric]) for r in record["rows"] if r["codec"] == codec and r[metric] is not None]
            if points:
                panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=in_figure(Path(codec).name))
        panel.set(xlabel="bytes of the file", title=title)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(ScalarFormatter())
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_pictures(
    tokenizer: Tokenizer, squares: Sequence[Tensor], lengths: Sequence[int], text: Text | None = None
) -> Image.Image:
    """A row for each picture ``(3, S, S)``: painted from each length, and the picture itself.

    Args:
        tokenizer: Which paints.
        squares: The pictures, in [0, 1].
        lengths: Tokens.
        text: Of the pictures, where the tokenizer reads one.
    """
    images = torch.stack(list(squares))
    codes = tokenizer.encode(images, text)
    columns = [tokenizer.decode(codes[:, : tokenizer.numbers(length)], text) for length in lengths] + [images]
    titles = [f"{length}: {tokenizer.file_size(length)} bytes" for length in lengths] + ["photograph"]
    step = images.shape[-1] + GAP
    sheet = Image.new("RGB", (len(columns) * step - GAP, len(images) * step - GAP + LABEL), "white")
    for x, (column, title) in enumerate(zip(columns, titles, strict=True)):
        ImageDraw.Draw(sheet).text((x * step + 2, 1), title, fill="black")
        for y, painted in enumerate(column):
            pixels = (painted.permute(1, 2, 0) * 255).round().byte().numpy()
            sheet.paste(Image.fromarray(pixels), (x * step, LABEL + y * step))
    return sheet
