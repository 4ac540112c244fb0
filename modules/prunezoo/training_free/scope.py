"""SCOPE: keep salient tokens that cover what the ones already kept do not.

SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs, Deng et al., NeurIPS 2025,
https://arxiv.org/abs/2510.24214, code https://github.com/kinredon/SCOPE. Written from a reading of what the code
computes.

A set of tokens covers a token as well as its nearest member does, by cosine of the features before the projector. One
token a step is chosen: the one with the largest gain in coverage, summed over all tokens, times its saliency (the
attention of CLS, summed over heads) to the power of `alpha`. In the first step nothing is covered.

| | authors' code | paper | ours |
|---|---|---|---|
| combination | gain times saliency^alpha; `COMBINED=add` adds them | product | product; `combine="add"` adds them |
| nothing left to gain (copies of few tokens) | lowest index | – | highest saliency |
| count | several tiles: the same of each, rests lost | T | T, over all tiles together |
| cost of a step | an N x N difference | – | rows whose coverage changed (on a host) |
| towers without CLS | – | – | `attention="received"` |
| positions | numbered anew | – | kept; `positions="compact"` of `attach` |
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.coverage import cover
from ..core.errors import PruneZooError
from ..core.plan import mask_to_index, picks_mask
from ..core.registry import register_pruner

ATTENTION = {"cls": "cls_head_attention", "received": "received_attention"}
COMBINES = ("product", "add")


@dataclass(frozen=True)
class ScopeConfig(PrunerConfig):
    """Settings of SCOPE."""

    alpha: float = 1.0  # exponent of the saliency, at least 0; 0 looks at coverage alone
    combine: str = "product"  # "product": gain * saliency^alpha; "add": gain + saliency^alpha
    attention: str = "cls"  # "cls": sum over heads; "received": mean over heads, for vision towers without CLS

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.alpha < 0:
            raise PruneZooError(f"alpha={self.alpha} of scope is out of range: it must be at least 0")
        self.check_choices("scope", combine=COMBINES, attention=ATTENTION)


@register_pruner("scope")
class Scope(Pruner):
    """Greedy choice by saliency and coverage."""

    criteria = ("diversity", "attention")
    config_class = ScopeConfig
    config: ScopeConfig

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a class attribute where it is not configured
        """Output and attention of the block whose output is projected."""
        return ("vision_states", ATTENTION[self.config.attention])

    def picks(self, inputs: PruneInputs) -> Tensor:
        """``(B, K)`` long: the tokens in the order in which they are chosen."""
        saliency = inputs.signal(ATTENTION[self.config.attention]).double()
        saliency = saliency.sum(-1) if saliency.dim() == 3 else saliency
        weight = saliency**self.config.alpha

        def rate(gains: Tensor) -> Tensor:
            if self.config.combine == "add":
                return gains + weight
            return torch.where(gains > 0, gains * weight, -1 / (1 + saliency))  # of those without a gain, by saliency

        unit = functional.normalize(inputs.signal("vision_states").float(), dim=-1)
        unit = unit.masked_fill(~inputs.valid[..., None], 0.0)
        return cover(unit @ unit.mT, inputs.valid, inputs.most_asked, rate)

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """Choose in all images at once."""
        index, valid = mask_to_index(picks_mask(self.picks(inputs), keep, inputs.valid.shape[1]), inputs.most_asked)
        return PruneOutput(index, valid)
