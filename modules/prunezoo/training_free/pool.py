"""Average pooling: K means over parts of equal area instead of K tokens picked out. Every patch has its say.

A baseline of many token-reduction papers; M3 (arXiv 2405.17430) trains a model with it. There K is a square that
divides the grid; here the grid is cut into K parts of as equal an area as whole cells allow, so every K is met exactly,
and where K divides the grid squarely it is plain average pooling. Each mean takes the position of the patch nearest to
the middle of its part.
"""

from torch import Tensor

from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.registry import register_pruner
from ._grid import equal_areas, reduce_by


@register_pruner("pool")
class PoolPruner(Pruner):
    """Means of K equal parts of the grid."""

    criteria = ("position",)

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """The mean over each of K equal parts."""
        return reduce_by(equal_areas, inputs, keep, merge=True)
