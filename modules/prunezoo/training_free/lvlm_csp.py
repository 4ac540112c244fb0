"""LVLM_CSP: few image tokens in the first layers of the language model, all in the middle, few of them at the end.

LVLM_CSP: Accelerating Large Vision Language Models via Clustering, Scattering, and Pruning for Reasoning Segmentation,
Chen et al., 2025, https://arxiv.org/abs/2504.10854. No code is published; this is reconstructed from a description of
the phases:

* Clustering: every n-th token, the paper's uniform variant, `share` of them and never fewer than `keep`.
* Scattering: all are there again, by default as they entered the language model.
* Pruning: `keep` by the attention that the prompt's last word pays them (the paper's [SEG] is no word of other models).

The layers are ours too: at 13/32 and 20/32 of the depth, which gives about the published saving at a share of 1/4. The
first phase begins in front of layer 1, since the cache of layer 0 tells the model how long the conversation is.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.errors import PruneZooError
from ..core.gates import topk_mask
from ..core.plan import mask_to_index
from ..core.registry import register_pruner


@dataclass(frozen=True)
class LVLMCSPConfig(PrunerConfig):
    """Config of `lvlm_csp`."""

    layers: tuple[int, ...] | None = None  # where the three phases begin, ascending; None: 1, 13/32, 20/32 of the depth
    share: float = 0.25  # of the tokens, in the first phase, in (0, 1]
    states: str = "raw"  # in which tokens come back: "raw", as they entered the language model, or "last", as they left

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.layers is not None and len(self.layers) != 3:
            raise PruneZooError(f"layers={self.layers} of lvlm_csp: give three, where few, all and few tokens begin")
        if not 0 < self.share <= 1:
            raise PruneZooError(f"share={self.share} of lvlm_csp is out of range: it is a share in (0, 1]")
        self.check_choices("lvlm_csp", states=("raw", "last"))


@register_pruner("lvlm_csp")
class LVLMCSP(Pruner):
    """Evenly spread tokens, then all, then those that the last word attends to; `keep` is of the last phase."""

    stage = "layer"
    needs = ("last_attention",)
    config_class = LVLMCSPConfig
    config: LVLMCSPConfig

    @property
    def comes_back(self) -> Literal["raw", "last"]:  # type: ignore[override]  # a class attribute where not configured
        """As configured."""
        return "raw" if self.config.states == "raw" else "last"

    def stages(self, depth: int) -> tuple[int, ...]:
        """The configured layers, or those of the default."""
        if self.config.layers is None and depth < 4:
            raise PruneZooError(f"lvlm_csp: a decoder of {depth} layers is too shallow for three phases: set layers")
        middle = max(depth * 13 // 32, 2)
        return self.config.layers or (1, middle, max(depth * 20 // 32, middle + 1))

    def schedule(self, keep: Tensor, available: Tensor, depth: int) -> list[Tensor]:
        """A share, all, and ``keep``."""
        few = (available.double() * self.config.share).round().to(keep.dtype)
        return [torch.maximum(few, keep), available, keep]

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """At first every n-th token, n as large as it can be; later the best by attention."""
        if inputs.step == 0:
            stride = (inputs.valid.sum(1) // keep.clamp_min(1)).clamp_min(1)
            number = inputs.valid.cumsum(1) - 1
            scores = (number % stride[:, None] == 0).float()  # of equals the first are kept
        else:
            scores = inputs.signal("last_attention")
        return PruneOutput(*mask_to_index(topk_mask(scores, inputs.valid, keep), inputs.most_asked))
