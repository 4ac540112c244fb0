"""FoPru: keep what the patches of the picture attend to, token by token or by whole rows of the grid.

FoPru: Focal Pruning for Efficient Large Vision-Language Models, Jiang et al., 2024, https://arxiv.org/abs/2411.14164.
Reconstructed: no code is published, and the evidence is second-hand, the abstract and a port by others.

A token's significance is the attention that it receives in the block whose output is projected, mean over heads and
rows. Of two vectors that the port makes of the map, the mean over its rows and that over its columns, it takes the one
that varies more; with CLS among the columns a row sums to 1, so that the first always wins. `significance="larger"`
looks at the map of the patches alone, CLS cut off, where either may.

`strategy="rank"` keeps the tokens of the largest significance; `strategy="row"` the rows of the grid whose sum is
largest, whole, and of the row for which there is no room the best tokens. Order and positions are kept.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, Pruner
from ..core.plan import group_sum
from ..core.registry import register_pruner

SIGNALS = {"received": "received_attention", "larger": "vision_attention"}
CHOICES = {"strategy": ("rank", "row"), "significance": SIGNALS}


@dataclass(frozen=True)
class FoPruConfig(PrunerConfig):
    """Config of `fopru`."""

    strategy: str = "rank"  # "rank": single tokens; "row": rows of the grid
    significance: str = "received"  # attention "received"; or of the patches' map what varies more, "larger"

    def __post_init__(self) -> None:
        """Check the names."""
        self.check_choices("fopru", **CHOICES)


@register_pruner("fopru")
class FoPru(Pruner):
    """Top tokens, or top rows, by the attention among patches."""

    criteria = ("attention",)
    config_class = FoPruConfig
    config: FoPruConfig

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a class attribute where it is not configured
        """Attention of the block whose output is projected."""
        return (SIGNALS[self.config.significance],)

    def score(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)``: significance; or minus the place of the token when rows are taken one after the other."""
        significance = self.significance(inputs).masked_fill(~inputs.valid, 0)
        if self.config.strategy == "rank":
            return significance
        tile, row, _ = inputs.cells.clamp_min(0).unbind(-1)
        count = inputs.valid.shape[1]
        line = (tile * count + row).masked_fill(~inputs.valid, -1)  # a number for each row of each tile
        number = (line[:, :, None] > line[:, None]).sum(2)  # tokens in lines before: the same within a line
        total = group_sum(significance, number, count).gather(1, number)
        order = significance.argsort(dim=1, descending=True, stable=True)
        for key, falling in ((number, False), (total, True)):  # of equal sums the upper row, in it the best first
            order = order.gather(1, key.gather(1, order).argsort(dim=1, descending=falling, stable=True))
        return -order.argsort(dim=1).to(significance.dtype)

    def significance(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)`` float32."""
        if self.config.significance == "received":
            return inputs.signal(self.needs[0]).float()
        both = inputs.valid[:, None] & inputs.valid[..., None]
        weights = inputs.signal(self.needs[0]).float().masked_fill(~both, 0)
        count = inputs.valid.sum(1, keepdim=True).clamp_min(1)
        received, given = weights.sum(1) / count, weights.sum(2) / count

        def spread(values: Tensor) -> Tensor:
            mean = values.sum(1, keepdim=True) / count
            return (values - mean).square().masked_fill(~inputs.valid, 0).sum(1, keepdim=True)

        return torch.where(spread(received) >= spread(given), received, given)
