"""ToDRE: tokens unlike each other, from the one that CLS attends to most; deep inside all go if the words look away.

ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance, Li et al., 2025,
https://arxiv.org/abs/2505.18757. Written from the paper: no code is published.

In front of the language model `keep` tokens stay. The first is the one that CLS attends to most in the block whose
output is projected; then, one after the other, the token whose cosines to those chosen add up to least (version 2 of
the paper), or whose nearest chosen one is farthest (version 1, `version="v1"`).

In front of the layer at 7/8 of the depth all that is left of an image leaves if the words behind it give it less than
`threshold` of their attention in that layer, mean over words and heads. The paper asks the same of what image tokens
attend to of the words, which is nothing where the words stand behind, so that it decides nothing.

| | paper | ours |
|---|---|---|
| first token, of several crops | of the thumbnail | of all crops |
| first token, no CLS | at random | `attention="received"`: what a token receives, mean over heads and rows |
| words look away | from all pictures of a prompt | from each picture |
| positions | – | kept |
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.budgets import Keep
from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.cosines import Cosines
from ..core.errors import PruneZooError
from ..core.plan import gather_rows, mask_to_index, picks_mask
from ..core.registry import register_pruner
from ..core.signals import TOWER_ATTENTION


@dataclass(frozen=True)
class ToDREConfig(PrunerConfig):
    """Config of `todre`."""

    version: str = "v2"  # of the paper: "v2", the least sum of cosines to those chosen; "v1", the least of the largest
    attention: str = "cls"  # what the first token is chosen by: "cls", or "received" for vision towers without CLS
    threshold: float = 0.1  # share of the words' attention below which an image leaves, in [0, 1]; 0: it never does
    layer: int | None = None  # in front of which decoder layer it may, at least 1; None: 7/8 of the depth

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check_choices("todre", version=("v1", "v2"), attention=TOWER_ATTENTION)
        if not 0 <= self.threshold <= 1:
            raise PruneZooError(f"threshold={self.threshold} of todre is out of range: it is a share in [0, 1]")
        if self.layer is not None and self.layer < 1:
            raise PruneZooError(f"layer={self.layer} of todre: tokens can leave from layer 1 on")


class Choose(Pruner):
    """The first stage: greedy, in front of the language model."""

    name = "todre"
    config_class = ToDREConfig
    config: ToDREConfig

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a class attribute where it is not configured
        """Attention of the block whose output is projected."""
        return (TOWER_ATTENTION[self.config.attention],)

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """Choose one token of each image per step, in all images at once."""
        valid, most, by_sum = inputs.valid, inputs.most_asked, self.config.version == "v2"
        cosines = Cosines(inputs.features, valid, most)
        free = valid.clone()
        near = inputs.signal(self.needs[0]).float().neg()  # the least is next
        picks = valid.new_empty(len(valid), most, dtype=torch.long)
        for step in range(most):
            best = near.masked_fill(~free, torch.inf).argmin(1, keepdim=True)
            picks[:, step : step + 1] = best
            free.scatter_(1, best, False)
            row = cosines.rows(best)[:, 0]
            near = row if step == 0 else near + row if by_sum else near.maximum(row)
        return PruneOutput(*mask_to_index(picks_mask(picks, keep, valid.shape[1]), most))


class Leave(Pruner):
    """The second stage: all of an image, or nothing."""

    name = "todre"
    stage = "layer"
    exact = False
    needs = ("prompt_attention",)
    config_class = ToDREConfig
    config: ToDREConfig

    def stages(self, depth: int) -> tuple[int, ...]:
        """The configured layer, or that at 7/8 of the depth."""
        if self.config.layer is None and depth < 2:
            raise PruneZooError(f"todre: a decoder of {depth} layer has none behind its first: set threshold=0")
        return (self.config.layer or depth * 7 // 8,)

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """By what the words' attention adds up to."""
        share = inputs.signal("prompt_attention").float().masked_fill(~inputs.valid, 0).sum(1, keepdim=True)
        return PruneOutput(*mask_to_index(inputs.valid & (share >= self.config.threshold)))


@register_pruner("todre")
class ToDRE(Pruner):
    """Diverse tokens in front of the language model, and none at all where words look away from them."""

    stage = "layer"
    criteria = ("diversity", "attention")
    exact = False
    config_class = ToDREConfig
    config: ToDREConfig

    def __init__(self, config: ToDREConfig | None = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        self.choose_first, self.leave = Choose(self.config), Leave(self.config)

    @classmethod
    def tiny_config(cls, feature_dim: int, text_dim: int) -> dict[str, Any]:
        """So that words of small models, which look everywhere alike, look away."""
        return {"threshold": 1.0}

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a class attribute where it is not configured
        """Those of both stages."""
        return (*self.choose_first.needs, *self.leave.needs)

    def stages(self, depth: int) -> tuple[int, ...]:
        """That of the second one."""
        return self.leave.stages(depth)

    def parts(self, keep: Keep) -> list[tuple[Pruner, Keep]]:
        """Both stages; the second finds what the first one left."""
        self.check_keep(keep)
        return [(self.choose_first, keep), (self.leave, 1.0)]

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """Both stages on the same inputs, as if they stood at one place; in a host each acts at its own."""
        first = self.choose_first(inputs, keep)
        second = self.leave(inputs.after(first), 1.0)
        return PruneOutput(gather_rows(first.index, second.index).masked_fill(~second.valid, 0), second.valid)
