"""Draw which tokens of a picture are kept: they stay in colour, the rest fades."""

import base64
import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

SIDE = 216
"""Longest side of a drawn picture, in pixels."""
PAPER = np.array([246.0, 246.0, 244.0])
FADE = 0.78
"""How far a dropped token goes towards the paper, in [0, 1]."""
EDGE = (230, 60, 30)


def enlarge(image: Image.Image) -> Image.Image:
    """The picture, RGB, with `SIDE` pixels on its longer side."""
    scale = SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """One picture of all, from left to right."""
    if len(pictures) == 1:
        return pictures[0]
    whole = Image.new("RGB", (sum(picture.width for picture in pictures), max(picture.height for picture in pictures)))
    left = 0
    for picture in pictures:
        whole.paste(picture, (left, 0))
        left += picture.width
    return whole


def draw_kept(image: Image.Image, grid: tuple[int, int], kept: NDArray[np.int64], anchors: bool = False) -> Image.Image:
    """The picture with its kept tokens.

    Args:
        image: the picture.
        grid: rows and columns of its tokens; they are taken to cover the whole picture.
        kept: (K, 2) row and column of each kept token.
        anchors: the tokens were merged or made anew and only stand where `kept` says: the whole picture goes into them,
            so it does not fade, and dots mark the places.
    """
    large = enlarge(image)
    if anchors:
        return _draw_anchors(large, grid, kept)
    chosen = np.zeros(grid, dtype=bool)
    chosen[kept[:, 0], kept[:, 1]] = True
    rows = np.arange(large.height) * grid[0] // large.height
    columns = np.arange(large.width) * grid[1] // large.width
    mask = chosen[rows[:, None], columns[None]]
    pixels = np.asarray(large, dtype=np.float64)
    grey = pixels.mean(axis=-1, keepdims=True)
    faded = (1 - FADE) * grey + FADE * PAPER
    pixels = np.where(mask[..., None], pixels, faded)
    pixels[_edge(mask)] = EDGE
    return Image.fromarray(pixels.astype(np.uint8))


def data_uri(image: Image.Image) -> str:
    """The picture as text that an `img` of a page can hold."""
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=88)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _edge(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels of the kept area that touch a dropped one."""
    inner = mask.copy()
    inner[1:] &= mask[:-1]
    inner[:-1] &= mask[1:]
    inner[:, 1:] &= mask[:, :-1]
    inner[:, :-1] &= mask[:, 1:]
    return mask & ~inner


def _draw_anchors(image: Image.Image, grid: tuple[int, int], kept: NDArray[np.int64]) -> Image.Image:
    faded = Image.blend(image, Image.new("RGB", image.size, tuple(int(v) for v in PAPER)), 0.35)
    draw = ImageDraw.Draw(faded)
    for row, column in kept:
        x, y = (column + 0.5) * image.width / grid[1], (row + 0.5) * image.height / grid[0]
        draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=EDGE, outline="white")
    return faded
