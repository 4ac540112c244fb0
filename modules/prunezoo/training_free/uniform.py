"""Uniform grid: tokens spread evenly over the image, whatever is in it. Sampling without a score.

The grid is cut into K parts of equal area, and the token at the middle of each is kept. Exact for every K and any grid.
Of a clip each frame has its part. With `frames` whole frames stay, evenly spaced in time and as few as hold K tokens;
of these what is too much leaves evenly.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.registry import register_pruner
from ._grid import equal_areas, reduce_by


@dataclass(frozen=True)
class UniformConfig(PrunerConfig):
    """Config of `uniform`."""

    frames: bool = False  # keep whole frames of a clip (or tiles of a picture) instead of some tokens of each


def whole_tiles(tile: np.ndarray, count: int) -> np.ndarray:
    """``(count,)``: tokens that stay, ascending; as few tiles as hold them, evenly spaced.

    Args:
        tile: ``(n,)`` the number of the tile of each token.
        count: At most n.
    """
    tiles = np.unique(tile)
    places, few = np.zeros(0, dtype=np.int64), 0
    while len(places) < count:
        few += 1
        places = np.isin(tile, tiles[(2 * np.arange(few) + 1) * len(tiles) // (2 * few)]).nonzero()[0]
    return places[(2 * np.arange(count) + 1) * len(places) // (2 * max(count, 1))]


@register_pruner("uniform")
class UniformPruner(Pruner):
    """Evenly spread tokens, by their cells; the same for every image with the same grid and budget."""

    criteria = ("position",)
    config_class = UniformConfig
    config: UniformConfig

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """The anchors of K equal parts, or whole frames."""
        if not self.config.frames:
            return reduce_by(equal_areas, inputs, keep, merge=False)
        assert inputs.asked is not None  # `forward` has set it
        index = torch.zeros(len(inputs.asked), inputs.most_asked, dtype=torch.long)
        for row, ((slots, cells), count) in enumerate(zip(inputs.host_grids, inputs.asked, strict=True)):
            index[row, :count] = torch.from_numpy(slots[whole_tiles(cells[:, 0], count)])
        valid = torch.arange(inputs.most_asked) < torch.tensor(inputs.asked, dtype=torch.long)[:, None]
        return PruneOutput(index.to(inputs.valid.device), valid.to(inputs.valid.device))
