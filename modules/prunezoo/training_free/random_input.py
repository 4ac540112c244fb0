"""Random cells in front of the vision tower: what a choice by pixels has to beat. Seeded, and independent of the batch.

As `random`, on the pixels of each cell: the same picture with the same question keeps the same cells.
"""

from dataclasses import replace

from torch import Tensor

from ..core.contract import PruneInputs
from ..core.registry import register_pruner
from .random import RandomPruner


@register_pruner("random_input")
class RandomInput(RandomPruner):
    """Uniform scores from a generator per image, before the tower."""

    stage = "input"

    def score(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)`` float32 in [0, 1), by the first frame, since a picture beside clips is repeated in each."""
        frames = inputs.pixels[0] if inputs.pixels else 1
        return super().score(replace(inputs, features=inputs.features.unflatten(-1, (frames, -1))[..., 0, :]))
