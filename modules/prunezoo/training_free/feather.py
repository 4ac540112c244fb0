"""FEATHER: attention without rotary embedding, and an even grid besides; then, deeper, attention alone and sharper.

Feather the Throttle: Revisiting Visual Token Pruning for Vision-Language Model Acceleration, Endo et al., ICCV 2025,
https://arxiv.org/abs/2412.13180, code https://github.com/markendo/FEATHER.

The attention is that of the last word in the layer before, without rotary embedding, which favours the bottom of the
image. The softmax is over the image's tokens alone, as in the official code, so that heads which look at words weigh as
much as others; `softmax="all"` takes it over all that the word sees, as the layer does. Mean over heads.

In front of the layer at 1/4 of the depth the best share q of the tokens stays, together with every third row and
column; in front of the layer at 1/2 the best share q * q of those, the grid without protection. Here `keep` is what the
second stage leaves, and q follows from it: keep = N (q + (1 - q) / 9) q^2, where a token on the grid is as likely among
the best as any. The first stage leaves exactly N (q + (1 - q) / 9) tokens: the grid first, then the best of the others;
with fewer than the grid has, the best on the grid. The official code leaves as many as the two sets happen to have
together; asked for that many, this one leaves the same tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, Pruner
from ..core.errors import PruneZooError
from ..core.registry import register_pruner

HALVINGS = 60  # of [0, 1]; more than the bits of a double
ATTENTION = {"images": "last_attention@previous+norope+images", "all": "last_attention@previous+norope"}


@dataclass(frozen=True)
class FeatherConfig(PrunerConfig):
    """Config of `feather`."""

    layers: tuple[int, ...] | None = None  # in front of which two decoder layers tokens go; None: 1/4, 1/2 of the depth
    stride: int = 3  # rows and columns from one token of the grid to the next, at least 1
    softmax: str = "images"  # over which keys: "images", the image's own tokens; "all", whatever the last word sees

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.layers is not None and len(self.layers) != 2:
            raise PruneZooError(f"layers={list(self.layers)}: there are two stages, name two layers")
        if self.stride < 1:
            raise PruneZooError(f"stride={self.stride} must be at least 1")
        self.check_choices("feather", softmax=ATTENTION)


@register_pruner("feather")
class Feather(Pruner):
    """Top tokens by attention without rotary embedding, joined with a uniform grid in the first of two stages."""

    stage = "layer"
    criteria = ("attention", "position")
    config_class = FeatherConfig
    config: FeatherConfig

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a class attribute where it is not configured
        """The attention, over the keys that are configured."""
        return (ATTENTION[self.config.softmax],)

    def stages(self, depth: int) -> tuple[int, ...]:
        """The configured layers, or those at 1/4 and 1/2 of the depth."""
        if self.config.layers is None and depth < 4:
            raise PruneZooError(f"feather: no layer at 1/4 of a decoder of {depth} has one before it: set layers")
        return self.config.layers or (depth // 4, depth // 2)

    def schedule(self, keep: Tensor, available: Tensor, depth: int) -> list[Tensor]:
        """What the two sets of the first stage have together, and ``keep``."""
        target, total = keep.double(), available.double()
        on_grid = 1 / self.config.stride**2
        low, high = torch.zeros_like(target), torch.ones_like(target)
        for _ in range(HALVINGS):
            share = (low + high) / 2
            too_many = total * (share + (1 - share) * on_grid) * share**2 > target
            low, high = torch.where(too_many, low, share), torch.where(too_many, share, high)
        first = (total * (high + (1 - high) * on_grid)).round().long()
        return [torch.maximum(first, keep), keep]

    def score(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)``: the attention weight from the last word, in the first stage above all others on the grid."""
        attention = inputs.signal(ATTENTION[self.config.softmax])
        if inputs.step:
            return attention
        on_grid = (inputs.cells[..., 1:] % self.config.stride == 0).all(-1)
        return attention.float() + on_grid  # a weight is at most 1
