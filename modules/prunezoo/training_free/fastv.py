"""FastV: behind the first layers of the language model, keep the image tokens that the last word attends to.

An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration for Large Vision-Language Models,
Chen et al., ECCV 2024, https://arxiv.org/abs/2403.06764, code https://github.com/pkunlp-icler/FastV.

The attention is that of the layer before, mean over heads, from the prompt's last token. So does the official code; the
paper speaks of the mean over all rows. The official ratio R leaves N (1 - R) tokens: here `keep`. Positions stay.
Unlike the official code nothing is switched to eager attention, batches and padding work, and the KV cache is shorter.
"""

from dataclasses import dataclass

from torch import Tensor

from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, Pruner
from ..core.errors import PruneZooError
from ..core.registry import register_pruner


@dataclass(frozen=True)
class FastVConfig(PrunerConfig):
    """Config of `fastv`."""

    layer: int = 2  # in front of which decoder layer tokens go, K of the paper; at least 1

    def __post_init__(self) -> None:
        """Check the range."""
        if self.layer < 1:
            raise PruneZooError(f"layer={self.layer}: there must be a layer before the one where tokens go, at least 1")


@register_pruner("fastv")
class FastV(Pruner):
    """Top tokens by the last word's attention, once, between two layers."""

    stage = "layer"
    criteria = ("attention",)
    needs = ("last_attention@previous",)
    config_class = FastVConfig
    config: FastVConfig

    def stages(self, depth: int) -> tuple[int, ...]:
        """The configured layer."""
        return (self.config.layer,)

    def score(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)``: the attention weight from the last word to each image token."""
        return inputs.signal("last_attention@previous")
