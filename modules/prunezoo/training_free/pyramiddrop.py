"""PyramidDrop: drop image tokens step by step as the language model goes deeper, by what the last word attends to.

PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction, Xing et al.,
CVPR 2025, https://arxiv.org/abs/2410.17247, code https://github.com/Cooperx521/PyramidDrop.

In front of the layers at 1/4, 1/2 and 3/4 of the depth the last word of the instruction rates the tokens with that
layer's own queries and keys, mean over heads. Every stage leaves the same share of what it finds, so that `keep` = 1/8
is the published 1/2, 1/4, 1/8 of all tokens. Counts are rounded, not cut off. The official code numbers the positions
of what is left anew at every stage; here survivors keep theirs, as under all methods, and
`attach(..., positions="compact")` numbers as the official code does.
"""

from dataclasses import dataclass

from torch import Tensor

from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, Pruner
from ..core.errors import PruneZooError
from ..core.registry import register_pruner


@dataclass(frozen=True)
class PyramidDropConfig(PrunerConfig):
    """Config of `pyramiddrop`."""

    layers: tuple[int, ...] | None = (
        None  # in front of which decoder layers tokens go; None: 1/4, 1/2, 3/4 of the depth
    )


@register_pruner("pyramiddrop")
class PyramidDrop(Pruner):
    """Top tokens by the last word's attention, at several depths."""

    stage = "layer"
    criteria = ("attention",)
    needs = ("last_attention",)
    config_class = PyramidDropConfig
    config: PyramidDropConfig

    def stages(self, depth: int) -> tuple[int, ...]:
        """The configured layers, or those at the quarters of the depth."""
        if self.config.layers is None and depth < 4:
            raise PruneZooError(f"pyramiddrop: a decoder of {depth} layers has no quarters: set layers")
        return self.config.layers or tuple(depth * quarter // 4 for quarter in (1, 2, 3))

    def score(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)``: the attention weight from the last word to each image token."""
        return inputs.signal("last_attention")
