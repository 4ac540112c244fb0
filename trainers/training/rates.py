"""Train DiffRate's rates beside a frozen vision-language model: see `gated_tower.py`.

DiffRate (arXiv 2305.17997) has labels in the place of the distillation, and GFLOPs of the tower alone in the second
term.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from prunezoo.core.errors import PruneZooError
from prunezoo.host import Encoded
from prunezoo.host.stages.vision_relaxed import RelaxedTower
from prunezoo.learned.diffrate import DiffRate

from .frozen import Dtype
from .gated_tower import GatedTowerModule


class RatesModule(GatedTowerModule):
    """Frozen model, rates, two losses.

    Args:
        vlm: As in :class:`GatedTowerModule`; a tower without CLS needs `attention: received` of the pruner.
        pruner: The rates.
        vlm_dtype: See there, as for what is not said here.
        target: See there.
        cost_weight: See there.
        free: Share in [0, 1) of the steps, at the beginning, in which that weight is 0.
        lr: See there.
        warm_up: See there.
        measure: See there.
    """

    pruner: DiffRate

    def __init__(
        self,
        vlm: str,
        pruner: DiffRate,
        vlm_dtype: Dtype = "auto",
        target: float = 0.6,
        cost_weight: float = 20.0,
        free: float = 0.0,
        lr: float = 0.01,
        warm_up: float = 0.0,
        measure: tuple[float, ...] = (1 / 3, 1 / 9),
    ) -> None:
        if not 0.0 <= free < 1.0:
            raise PruneZooError(f"free={free} must lie in [0, 1)")
        super().__init__(vlm, pruner, vlm_dtype, target, cost_weight, 1.0, lr, warm_up, 0.0, measure)
        self.free = free
        if self.tower.depth != pruner.config.blocks:
            raise PruneZooError(f"pruner.config.blocks={pruner.config.blocks}: the tower runs {self.tower.depth}")

    def tokens_of_a_picture(self, encoded: Encoded) -> int:
        """As many as there are rates for."""
        if set(encoded.inputs.counts) != {self.pruner.config.tokens}:
            raise PruneZooError(
                f"pruner.config.tokens={self.pruner.config.tokens}: pictures have {sorted(set(encoded.inputs.counts))}"
            )
        return self.pruner.config.tokens

    def left(self, relaxed: RelaxedTower) -> Sequence[Tensor]:
        """By the rates alone, without what rounding and few tokens make of them in a batch."""
        dropping, merging = self.pruner.numbers()
        found, left = dropping.new_tensor(float(self.pruner.config.tokens)), []
        for dropped, merged in zip(dropping, merging, strict=True):
            found = torch.minimum(torch.minimum(found.detach(), dropped), merged)
            left.append(found)
        return left

    def pressure(self) -> float:
        """None while they are free."""
        return float(self.global_step >= self.free * self.total_steps)
