"""Withdraw: all image tokens leave in front of one deep layer of the language model.

Boosting Multimodal Large Language Models with Visual Tokens Withdrawal for Rapid Inference, Lin et al., AAAI 2025,
https://arxiv.org/abs/2405.05803, code https://github.com/lzhxmu/VTW. Written from the description.

Layers in front see every token, the others none; what the words have taken from the image stays with them. The paper
looks for the first layer at which a few calibration questions get nearly the same answers, which is half the depth for
its 7B models: so it is here, or as configured. Questions about fine print suffer most.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.errors import PruneZooError
from ..core.plan import mask_to_index
from ..core.registry import register_pruner


@dataclass(frozen=True)
class WithdrawConfig(PrunerConfig):
    """Config of `withdraw`."""

    layer: int | None = None  # in front of which decoder layer all tokens leave, at least 1; None: half the depth

    def __post_init__(self) -> None:
        """Check the range."""
        if self.layer is not None and self.layer < 1:
            raise PruneZooError(f"layer={self.layer}: tokens can leave from layer 1 on; without any, take `none`")


@register_pruner("withdraw")
class Withdraw(Pruner):
    """All tokens up to a layer, then none, whatever the budget.

    ``keep`` is not looked at, since the layer alone sets the cost: measured tokens, the mean over layers, are
    layer / depth of the image's. For 1/4 of them configure a quarter of the depth, as in ``withdraw?layer=8``.
    """

    stage = "layer"
    criteria = ("none",)
    exact = False
    config_class = WithdrawConfig
    config: WithdrawConfig

    def stages(self, depth: int) -> tuple[int, ...]:
        """The configured layer, or that at half the depth."""
        if self.config.layer is None and depth < 2:
            raise PruneZooError(f"withdraw: a decoder of {depth} layer has no half: use `none` or `full`")
        return (self.config.layer or depth // 2,)

    def schedule(self, keep: Tensor, available: Tensor, depth: int) -> list[Tensor]:
        """Nothing."""
        return [torch.zeros_like(keep)]

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """Nothing at all: K is 0."""
        return PruneOutput(*mask_to_index(torch.zeros_like(inputs.valid), 0), known=(0,) * len(inputs.valid))
