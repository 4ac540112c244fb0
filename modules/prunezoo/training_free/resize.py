"""Resize: bilinear interpolation of the grid of projected features down to K tokens.

Said plainly: this is **not** a smaller picture. Giving the vision tower fewer pixels happens before the tower, changes
what it computes, and few towers take other sizes; scaling a picture down and up again keeps the token count. What a
pruner can resize is the feature grid that the projector gives, and this does. It is what interpolating models do (as
`torch.nn.functional.interpolate(mode="bilinear", align_corners=False)`, without antialiasing: each new token mixes the
four old ones around its centre, so unlike `pool` it does not see every patch).

The coarse grid has about square cells and exactly K of them: its rows may differ by one in length.
"""

import torch
from torch import Tensor

from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.errors import PruneZooError
from ..core.registry import register_pruner
from ._grid import Part, reduce_by, row_count, share


@register_pruner("resize")
class ResizePruner(Pruner):
    """Bilinear samples at the centres of a coarser grid; each takes the position of the nearest patch."""

    criteria = ("position",)

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """Interpolate to K tokens."""
        return reduce_by(bilinear, inputs, keep, merge=True)


def bilinear(cells: Tensor, count: int) -> list[Part]:
    """``count`` interpolated points on a rectangular tile with ``cells (n, 3)``."""
    rows, columns = cells[:, 1].unique(), cells[:, 2].unique()
    height, width = len(rows), len(columns)
    if height * width != len(cells):
        raise PruneZooError(
            "resize needs tiles that are whole rectangles of patches; use 'pool', which takes any outline"
        )
    at = torch.empty(height, width, dtype=torch.long)
    at[torch.searchsorted(rows, cells[:, 1].contiguous()), torch.searchsorted(columns, cells[:, 2].contiguous())] = (
        torch.arange(len(cells))
    )
    coarse = row_count(height, width, count)
    parts: list[Part] = []
    for i, k in enumerate(share(count, [width] * coarse)):
        up, down, drop, near_row = _between(i, coarse, height)
        for j in range(k):
            left, right, shift, near_column = _between(j, k, width)
            corners: dict[int, float] = {}
            for row, by_row in ((up, 1 - drop), (down, drop)):
                for column, by_column in ((left, 1 - shift), (right, shift)):
                    token = int(at[row, column])
                    corners[token] = corners.get(token, 0.0) + by_row * by_column
            used = {token: weight for token, weight in corners.items() if weight > 0}
            parts.append((torch.tensor(list(used)), torch.tensor(list(used.values())), int(at[near_row, near_column])))
    return parts


def _between(i: int, parts: int, size: int) -> tuple[int, int, float, int]:
    """Where the centre of part ``i`` of ``parts`` falls among ``size`` cells: low and high neighbour, how far it is
    towards the high one, and the nearest. Distinct parts have distinct nearest cells, since a part is >= 1 cell wide.
    """
    place = (i + 0.5) * size / parts - 0.5
    low = int(place)
    return low, min(low + 1, size - 1), place - low, (2 * i + 1) * size // (2 * parts)
