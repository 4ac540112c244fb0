"""Uniform grid: tokens spread evenly over the image, whatever is in it. Sampling without a score.

The grid is cut into K parts of equal area, and the token at the middle of each is kept. Exact for every K and any grid.
"""

from torch import Tensor

from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.registry import register_pruner
from ._grid import equal_areas, reduce_by


@register_pruner("uniform")
class UniformPruner(Pruner):
    """Evenly spread tokens, by their cells; the same for every image with the same grid and budget."""

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """The anchors of K equal parts."""
        return reduce_by(equal_areas, inputs, keep, merge=False)
