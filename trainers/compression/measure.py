"""Tokenizers at several lengths beside JPEG and WebP within the same bytes, on held-out photographs.

Letters: I pictures.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from prunezoo.tokenizers.base import Tokenizer
from trainers.data.photographs import Photographs, to_tensor
from trainers.evaluation.statistics import interval

from .quality import METRICS, Floats, quality
from .rivals import attempts, best_within
from .texts import Texts

SHOWN = (1, 4, 16, 64, 256)  # lengths that are drawn and timed

Row = dict[str, Any]


@dataclass
class Figures:
    """Quality of every picture at one length or within so many bytes; NaN where a codec cannot go so low."""

    size: int  # bytes of a file, its header included
    tokens: int | None  # of a tokenizer, where one fits
    values: dict[str, Floats] = field(default_factory=dict)  # by metric, (I,)


def shown_lengths(tokenizer: Tokenizer) -> list[int]:
    """Those of 1, 4, 16, 64 and 256 that are below the whole row of the tokenizer, and the whole row."""
    whole = tokenizer.config.tokens
    return [*(length for length in SHOWN if length < whole), whole]


def measure_tokenizer(
    tokenizer: Tokenizer, pictures: Photographs, sizes: Sequence[int], texts: Texts, advance: Callable[[], None]
) -> list[Figures]:
    """For each size of a file the longest row that fits into it; each picture is encoded once."""
    lengths = [tokenizer.length_within(size) for size in sizes]
    figures = [Figures(size, length or None) for size, length in zip(sizes, lengths, strict=True)]
    for start in range(0, len(pictures), 32):
        places = range(start, min(start + 32, len(pictures)))
        images = torch.stack([pictures[i] for i in places])
        text = texts(tokenizer, places)
        codes = tokenizer.encode(images, text)
        found = {0: _nothing(len(places))}
        for length in {*lengths} - {0}:
            painted = tokenizer.decode(codes[:, : tokenizer.numbers(length)], text)
            found[length] = quality((painted * 255).round() / 255, images)  # 8 bits a channel, as a file gives it
        for one, length in zip(figures, lengths, strict=True):
            _append(one, found[length])
        for _ in images:
            advance()
    return figures


def measure_rival(
    rival: str, pictures: Photographs, sizes: Sequence[int], advance: Callable[[], None]
) -> list[Figures]:
    """JPEG or WebP, for each size its best file that is no bigger."""
    figures = [Figures(size, None) for size in sizes]
    for i in range(len(pictures)):
        image = pictures.picture(i)
        found = attempts(rival, image)
        for one in figures:
            best = best_within(found, one.size)
            _append(one, _nothing(1) if best is None else _compare(best.picture, image))
        advance()
    return figures


def rows_of(codec: str, figures: Sequence[Figures]) -> list[Row]:
    """`{codec, tokens, bytes, fits, psnr, ssim, ms_ssim, vif}`: means over the pictures.

    `fits` is the share of the pictures that the codec can bring into so many bytes; the means are None unless it is 1,
    since those that fit are the easy ones.
    """
    rows = []
    for one in figures:
        fits = float(np.isfinite(one.values["psnr"]).mean())
        means = {name: _number(values.mean()) if fits == 1 else None for name, values in one.values.items()}
        rows.append({"codec": codec, "tokens": one.tokens, "bytes": one.size, "fits": fits, **means})
    return rows


def paired_of(name: str, own: Sequence[Figures], rivals: Mapping[str, Sequence[Figures]], seed: int = 0) -> list[Row]:
    """`{codec, rival, tokens, bytes, metric, difference, ci}`: over the same pictures, 95 % bootstrap intervals."""
    rows = []
    rng = np.random.default_rng(seed)
    items = len(own[0].values["psnr"])
    draws = rng.integers(items, size=(2000, items))
    for rival, figures in rivals.items():
        for one, other in zip(own, figures, strict=True):
            for metric in METRICS:
                difference = one.values[metric] - other.values[metric]
                if np.isfinite(difference).all():
                    row = {"codec": name, "rival": rival, "tokens": one.tokens, "bytes": one.size, "metric": metric}
                    low, high = interval(difference[draws].mean(1))
                    rows.append({**row, "difference": _number(difference.mean()), "ci": [_number(low), _number(high)]})
    return rows


def _nothing(pictures: int) -> dict[str, Floats]:
    return {name: np.full(pictures, np.nan) for name in METRICS}


def _append(figures: Figures, found: Mapping[str, Floats]) -> None:
    for name, values in found.items():
        figures.values[name] = np.concatenate([figures.values.get(name, np.empty(0)), values])


def _compare(picture: Image.Image, image: Image.Image) -> dict[str, Floats]:
    return quality(to_tensor(picture)[None], to_tensor(image)[None])


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 5)
