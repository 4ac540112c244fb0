"""Cutting the grid of an image into exactly K parts: shared by `uniform`, `pool` and `resize`.

All depends on the cells and on K alone, so each layout is worked out once. Letters: n tokens of an image.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ..core.contract import PruneInputs, PruneOutput

# One part: which tokens it reads (m,), with which weights (m,), and the token whose slot it takes.
Part = tuple[Tensor, Tensor, int]
Layout = Callable[[Tensor, int], list[Part]]  # from the cells (m, 3) of one tile and a count to that many parts


def share(total: int, weights: list[int]) -> list[int]:
    """Deal ``total`` out in proportion to ``weights``, none above its weight; what is left goes to the largest rests.

    Args:
        total: At most ``sum(weights)``.
        weights: >= 0.
    """
    whole = max(sum(weights), 1)
    shares = [total * weight // whole for weight in weights]
    by_rest = sorted(range(len(weights)), key=lambda i: (-(total * weights[i] % whole), i))
    for i in by_rest[: total - sum(shares)]:
        shares[i] += 1
    return shares


def row_count(height: int, width: int, count: int) -> int:
    """How many rows of parts make ``count`` parts about square on a grid of ``height`` x ``width`` cells."""
    return min(max(round((count * height / width) ** 0.5), -(-count // width), 1), height)


def equal_areas(cells: Tensor, count: int) -> list[Part]:
    """Cut a tile, of any outline, into ``count`` parts of as equal an area as whole cells allow.

    Bands of rows first, then each band from left to right. A part is anchored at its token nearest to its centre.
    """
    rows, columns = cells[:, 1].unique(), cells[:, 2].unique()
    bands = row_count(len(rows), len(columns), count)
    band = torch.searchsorted(rows, cells[:, 1].contiguous()) * bands // len(rows)
    members = [(band == b).nonzero()[:, 0] for b in range(bands)]
    parts: list[Part] = []
    for tokens, k in zip(members, share(count, [len(m) for m in members]), strict=True):
        across = tokens[(cells[tokens, 2] * (int(rows.max()) + 1) + cells[tokens, 1]).argsort()]
        for i in range(k):
            own = across[i * len(across) // k : (i + 1) * len(across) // k]
            place = cells[own, 1:].double()
            anchor = (place - place.mean(0)).square().sum(1).argmin()
            parts.append((own, torch.full((len(own),), 1 / len(own)), int(own[anchor])))
    return parts


@lru_cache(maxsize=256)
def cut(cells: bytes, count: int, layout: Layout) -> tuple[Tensor, Tensor]:
    """Cut an image into ``count`` parts.

    Tiles share the count in proportion to their patches.

    Args:
        cells: The bytes of ``(n, 3)`` int64, so that equal grids are cut once.
        count: At most n.
        layout: How to cut a tile.

    Returns:
        Anchors ``(count,)``, ascending, and the weights ``(count, n)`` of the tokens in each part.
    """
    grid = torch.frombuffer(bytearray(cells), dtype=torch.long).view(-1, 3)
    tiles = [(grid[:, 0] == tile).nonzero()[:, 0] for tile in grid[:, 0].unique()]
    parts: list[Part] = []
    for tile, k in zip(tiles, share(count, [len(t) for t in tiles]), strict=True):
        if k:
            parts += [(tile[own], weights, int(tile[anchor])) for own, weights, anchor in layout(grid[tile], k)]
    parts.sort(key=lambda part: part[2])
    weight = torch.zeros(count, len(grid))
    for row, (tokens, weights, _) in zip(weight, parts, strict=True):
        row[tokens] = weights
    return torch.tensor([anchor for _, _, anchor in parts], dtype=torch.long), weight


def divide(layout: Layout, inputs: PruneInputs, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cut each image into the parts of a layout.

    Args:
        layout: How to cut a tile.
        inputs: The images.
        keep: ``(B,)`` parts of each, as ``inputs.asked``.

    Returns:
        The slots of the anchors ``(B, K)``, ascending; which of them are no filler ``(B, K)`` bool; and the weights
        ``(B, K, N)`` float32 of the tokens in each part, zero on padding and filler.
    """
    assert inputs.asked is not None  # `forward` has set it
    width, grids = inputs.most_asked, inputs.host_grids
    index = torch.zeros(len(keep), width, dtype=torch.long)
    valid = torch.arange(width) < torch.tensor(inputs.asked, dtype=torch.long)[:, None]
    weight = torch.zeros(len(keep), width, inputs.valid.shape[1])
    for row, ((slots, cells), k) in enumerate(zip(grids, inputs.asked, strict=True)):
        anchors, weights = cut(cells.tobytes(), k, layout)
        index[row, :k] = torch.from_numpy(slots)[anchors]
        weight[row, :k, torch.from_numpy(slots)] = weights
    device = inputs.valid.device
    return index.to(device), valid.to(device), weight.to(device)


def reduce_by(layout: Layout, inputs: PruneInputs, keep: Tensor, merge: bool) -> PruneOutput:
    """Bring each image to the parts of a layout: the weighted mean of each part, or its anchor as it is.

    Args:
        layout: How to cut a tile.
        inputs: The images.
        keep: ``(B,)`` parts of each.
        merge: Whether to average; else the anchors are kept.
    """
    index, valid, weight = divide(layout, inputs, keep)
    return PruneOutput(index=index, valid=valid, features=average(inputs, weight) if merge else None)


def average(inputs: PruneInputs, weight: Tensor) -> Tensor:
    """Weighted sums ``(B, K, D)`` of the tokens, in their own type, by weights ``(B, K, N)`` float32."""
    tokens = inputs.features.masked_fill(~inputs.valid[..., None], 0)
    return (weight @ tokens.float()).to(tokens.dtype)
