"""Train the gates of token routing (arXiv 2308.03409) beside a frozen vision-language model: see `gated_tower.py`.

What a patch receives of attention, which gates read, counts the looks of patches that have stopped; in use those are
not there.
"""

from prunezoo.core.errors import PruneZooError
from prunezoo.learned.token_routing import TokenRouting

from .frozen import Dtype
from .gated_tower import GatedTowerModule


class RoutingModule(GatedTowerModule):
    """Frozen model, gates, two losses.

    Args:
        vlm: As in :class:`GatedTowerModule`.
        pruner: The gates.
        vlm_dtype: See there, as for what is not said here.
        target: See there.
        cost_weight: See there; the ancestor's 0.8.
        settling: Share in [0, 1] of the steps in which that weight rises from 0.
        kl_weight: See there.
        lr: See there.
        warm_up: See there.
        weight_decay: See there.
        measure: See there.
    """

    pruner: TokenRouting

    def __init__(
        self,
        vlm: str,
        pruner: TokenRouting,
        vlm_dtype: Dtype = "auto",
        target: float = 0.5,
        cost_weight: float = 0.8,
        settling: float = 0.2,
        kl_weight: float = 1.0,
        lr: float = 1e-3,
        warm_up: float = 0.05,
        weight_decay: float = 0.01,
        measure: tuple[float, ...] = (1 / 2, 1 / 9),
    ) -> None:
        if not 0.0 <= settling <= 1.0:
            raise PruneZooError(f"settling={settling} must lie in [0, 1]")
        super().__init__(vlm, pruner, vlm_dtype, target, cost_weight, kl_weight, lr, warm_up, weight_decay, measure)
        self.settling = settling

    def pressure(self) -> float:
        """Rises while the gates settle."""
        return min((self.global_step + 1) / max(self.settling * self.total_steps, 1), 1.0)
