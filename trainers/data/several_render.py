"""Small pictures for questions about several of them: shapes over photographic texture, in the looks of `scenes`.

A picture is 48×48 pixels, 6×6 patches of 8. The texture comes from the photographs of `scenes`, split by region, so
that no split shares a pixel with another.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from PIL import Image

from .scenes_render import COLORS, load_assets, shape_mask, texture

SIDE = 48
PATCH = 8
SHAPES = ("circle", "square", "triangle", "cross", "ring")  # no star: in 10 pixels it looks like a cross
ACROSS = (10, 13)  # pixels across a thing, both ends included
EDGE = 7  # pixels from the border to the centre of a thing, at least
WAYS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y)
SEEDS = {"train": 11, "validation": 23, "test": 37}
SIZES = {"train": 1_000_000, "validation": 2_400, "test": 4_800}
_NOISE = 2.0  # deviation of the camera's noise, of 255


@dataclass(frozen=True)
class Piece:
    """A thing at a place. Lengths in pixels, (x, y) its centre."""

    color: str
    shape: str
    across: int
    turn: int  # × 15 degrees
    tone: tuple[float, float, float]  # added to the colour, of 255
    x: int = 0
    y: int = 0

    def at(self, x: int, y: int) -> Self:
        """The same thing at another place."""
        return replace(self, x=x, y=y)

    def clear_of(self, other: "Piece") -> bool:
        """Whether the squares around the two are at least a pixel apart."""
        return max(abs(self.x - other.x), abs(self.y - other.y)) > (self.across + other.across + 1) // 2

    @property
    def inside(self) -> bool:
        """Whether it is far enough from the border."""
        return min(self.x, self.y) >= EDGE and max(self.x, self.y) <= SIDE - EDGE


def new_piece(rng: np.random.Generator, color: str, shape: str) -> Piece:
    """A thing of that colour and shape, of any size and tone."""
    tone = rng.normal(0, 9, 3)
    turn, across = int(rng.integers(-1, 2)), int(rng.integers(ACROSS[0], ACROSS[1] + 1))
    return Piece(color, shape, across, turn, (float(tone[0]), float(tone[1]), float(tone[2])))


def scatter(rng: np.random.Generator, pieces: Sequence[Piece]) -> list[Piece]:
    """The things at places where they do not touch."""
    while True:
        places = rng.integers(EDGE, SIDE - EDGE + 1, (len(pieces), 2))
        placed = [piece.at(int(x), int(y)) for piece, (x, y) in zip(pieces, places, strict=True)]
        if all(a.clear_of(b) for number, a in enumerate(placed) for b in placed[:number]):
            return placed


def background(rng: np.random.Generator, split: str) -> np.ndarray:
    """(48, 48, 3) float32: photographic texture of a split."""
    return texture(load_assets(split), rng)[:SIDE, :SIDE]


def draw(pieces: Sequence[Piece], behind: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """The picture of things over a background; later ones lie above."""
    canvas = behind.copy()
    for piece in pieces:
        left, top = piece.x - piece.across // 2, piece.y - piece.across // 2
        mask = shape_mask(piece.shape, piece.across, piece.turn)[..., None]
        patch = canvas[top : top + piece.across, left : left + piece.across]
        patch += mask * (np.asarray(COLORS[piece.color], np.float32) + np.asarray(piece.tone, np.float32) - patch)
    canvas += rng.normal(0, _NOISE, canvas.shape).astype(np.float32)
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))


def about(pieces: Sequence[Piece], weight: float = 1.0) -> np.ndarray:
    """How much a question about these things is about each pixel, (48, 48) float32: the centres most, 0 off them."""
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    value = np.zeros((SIDE, SIDE), np.float32)
    for piece in pieces:
        inside = (abs(columns - piece.x) <= piece.across / 2) & (abs(rows - piece.y) <= piece.across / 2)
        near = np.exp(-((columns - piece.x) ** 2 + (rows - piece.y) ** 2) / 32)
        value[inside] = np.maximum(value, weight * (1 + near))[inside]
    return value


def some(rng: np.random.Generator, choices: Sequence[str], count: int, but: Sequence[str] = ()) -> list[str]:
    """So many different ones, none of ``but``."""
    left = [choice for choice in choices if choice not in but]
    return [left[int(i)] for i in rng.permutation(len(left))[:count]]
