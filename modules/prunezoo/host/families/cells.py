"""Cells of tiles, patches that are joined, and the runs of placeholders that an image is.

Letters: B rows of the batch, L prompt tokens, R pictures that the tower sees, N patches of one, C channels.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad


@lru_cache(maxsize=256)  # each call asks for the same ones; nobody writes into them
def grid(rows: int, columns: int, tile: int = 0) -> Tensor:
    """``(rows, columns, 3)`` long: the cells of one tile; to be read only."""
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.full_like(row, tile), row, column], dim=-1)


def tiles(count: int, side: int) -> Tensor:
    """``(count * side * side, 3)`` long: the cells of square tiles, one after the other."""
    return torch.cat([grid(side, side, tile).flatten(0, 1) for tile in range(count)])


def blocks(values: Tensor, factor: int) -> Tensor:
    """The ``factor`` by ``factor`` patches of squares ``(R, N, C)``: ``(R * N / factor ** 2, factor ** 2, C)``."""
    side = math.isqrt(values.shape[1]) // factor
    return values.unflatten(1, (side, factor, side, factor)).transpose(2, 3).flatten(3, 4).flatten(0, 2)


def runs(mask: Tensor) -> list[tuple[int, int, int]]:
    """The unbroken runs of a mask ``(B, L)`` on the host: row, first column and length of each, in reading order."""
    edges = pad(mask.long(), (1, 1)).diff(dim=1)
    start, end = ((edges == edge).numpy().nonzero() for edge in (1, -1))
    return [(int(row), int(first), int(last - first)) for row, first, last in zip(*start, end[1], strict=True)]
