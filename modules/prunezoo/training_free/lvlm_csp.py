"""LVLM_CSP: few image tokens in the first layers of the language model, all in the middle, few of them at the end.

LVLM_CSP: Accelerating Large Vision Language Models via Clustering, Scattering, and Pruning for Reasoning Segmentation,
Chen et al., 2025, https://arxiv.org/abs/2504.10854. No code is published; this is reconstructed from a description of
the phases:

* Clustering: every n-th token, the paper's uniform variant, `share` of them and never fewer than `keep`; or those that
  CLS attends to most, another of its variants (`few="cls"`). Its variant by a segmenter is not here.
* Scattering: all are there again, by default as they entered the language model.
* Pruning: `keep` by the attention that the prompt's last word pays them (the paper's [SEG] is no word of other models).

The layers are ours too: at 13/32 and 20/32 of the depth, which gives about the published saving at a share of 1/4. The
first phase begins in front of layer 1, since the cache of layer 0 tells the model how long the conversation is.

With `mean` the schedule is solved for what layers read in the mean: as many layers in the middle phase as come nearest
to it, the others halved around them, and of the first phase the tokens that are then wanting.
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
from ..core.signals import TOWER_ATTENTION

FEW = {"uniform": (), **{name: (signal,) for name, signal in TOWER_ATTENTION.items()}}
"""What the tokens of the first phase are chosen by, and the signals that it takes."""


@dataclass(frozen=True)
class LVLMCSPConfig(PrunerConfig):
    """Config of `lvlm_csp`."""

    layers: tuple[int, ...] | None = None  # where the three phases begin, ascending; None: 1, 13/32, 20/32 of the depth
    share: float = 0.25  # of the tokens, in the first phase, in (0, 1]
    mean: float | None = None  # share of the tokens that layers read in the mean, in (0, 1); None: as layers, share say
    few: str = "uniform"  # of the first phase: every n-th, "uniform"; by "cls" attention, or "received" without CLS
    states: str = "raw"  # in which tokens come back: "raw", as they entered the language model, or "last", as they left

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.layers is not None and len(self.layers) != 3:
            raise PruneZooError(f"layers={self.layers} of lvlm_csp: give three, where few, all and few tokens begin")
        if not 0 < self.share <= 1:
            raise PruneZooError(f"share={self.share} of lvlm_csp is out of range: it is a share in (0, 1]")
        if self.mean is not None and not 0 < self.mean < 1:
            raise PruneZooError(f"mean={self.mean} of lvlm_csp is out of range: it is a share in (0, 1)")
        self.check_choices("lvlm_csp", states=("raw", "last"), few=FEW)


@register_pruner("lvlm_csp")
class LVLMCSP(Pruner):
    """Evenly spread tokens, then all, then those that the last word attends to; `keep` is of the last phase."""

    stage = "layer"
    criteria = ("position", "attention")
    config_class = LVLMCSPConfig
    config: LVLMCSPConfig

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a class attribute where it is not configured
        """Attention of the last word, and what the first phase looks at."""
        return ("last_attention", *FEW[self.config.few])

    @property
    def comes_back(self) -> Literal["raw", "last"]:  # type: ignore[override]  # a class attribute where not configured
        """As configured."""
        return "raw" if self.config.states == "raw" else "last"

    def stages(self, depth: int) -> tuple[int, ...]:
        """The configured layers, or those of the default."""
        if self.config.layers is None and depth < 4:
            raise PruneZooError(f"lvlm_csp: a decoder of {depth} layers is too shallow for three phases: set layers")
        if self.config.layers is None and self.config.mean is not None:
            return self.solved(self.config.mean, depth)
        middle = max(depth * 13 // 32, 2)
        return self.config.layers or (1, middle, max(depth * 20 // 32, middle + 1))

    def solved(self, mean: float, depth: int) -> tuple[int, ...]:
        """The layers whose mean is nearest to ``mean`` if the last phase has a quarter of what the first one has."""
        share, plans = self.config.share, []
        for middle in range(1, depth - 2):
            first = -(-(depth - middle) // 2)
            read = 1 + (first - 1) * share + middle + (depth - first - middle) * share / 4
            plans.append((abs(read / depth - mean), (1, first, first + middle)))
        return min(plans)[1]

    def schedule(self, keep: Tensor, available: Tensor, depth: int) -> list[Tensor]:
        """A share, or what is wanting for the mean; all; and ``keep``."""
        few = available.double() * self.config.share
        if self.config.mean is not None:
            begin, middle, last = self.stages(depth)
            whole = begin + last - middle  # layers that read everything
            rest = available.double() * (self.config.mean * depth - whole) - (depth - last) * keep
            few = rest / (middle - begin)
        few = few.round().to(keep.dtype)
        return [torch.maximum(few, keep).minimum(available), available, keep]

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """At first every n-th token, n as large as it can be, or the best for CLS; later the best by attention."""
        if inputs.step == 0 and self.config.few != "uniform":
            scores = inputs.signal(self.needs[1])
        elif inputs.step == 0:
            stride = (inputs.valid.sum(1) // keep.clamp_min(1)).clamp_min(1)
            number = inputs.valid.cumsum(1) - 1
            scores = (number % stride[:, None] == 0).float()  # of equals the first are kept
        else:
            scores = inputs.signal("last_attention")
        return PruneOutput(*mask_to_index(topk_mask(scores, inputs.valid, keep), inputs.most_asked))
