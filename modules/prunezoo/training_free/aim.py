"""AIM: merge tokens that are alike in front of the language model; inside, drop by PageRank, down to none.

AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning, Zhong et al., ICCV 2025,
https://arxiv.org/abs/2412.03248, code https://github.com/LaVi-Lab/AIM.

In front of the language model tokens are matched as in ToMe: those at even places of the list are linked to the most
similar one at an odd place, the strongest links are merged into plain means, whatever tokens stand for already, and the
list becomes the even ones that are left, by falling likeness, then the odd ones. At most half go in one matching.

Inside, from half the depth to three quarters, an even share leaves in front of each layer, and in front of the last of
these all that is left. Who stays is said by PageRank over words and image tokens: each step hands on what a token has
by the softmax of the layer's attention logits over 0.1, five steps from an even start, of each head; a token's
importance is the root of the mean square over heads. Words stay.

`keep` = T is what the layers of the language model read **in the mean**: 1.6 T tokens enter, which with the layers of
the default makes T. Where 1.6 T is more than there are, all enter, and fewer leave inside, so that `keep` = 1.0 is the
model as it is.

| | authors' code | paper | ours |
|---|---|---|---|
| compared | keys of the block behind the projected one; tokens (LLaVA-OV) | tokens | tokens; `metric="keys"` |
| frames of a clip | each by itself | each by itself | all tokens of a clip together |
| dropped inside | masked | dropped | dropped: layers behind are really shorter |
| layers | from 14 to 21 of 28 | 13 to 21 of 32 for pictures | 1/2 to 3/4 of the depth; `first`, `last` |
| PageRank of several pictures | over all of the sequence | – | of each picture with the words |
| at the end | none | none | none, a single one that would be left among them |
| order, positions | even ones, odd ones, anew | – | raster, each where what it stands for is in the middle |
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..core.budgets import Keep, upload
from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.errors import PruneZooError
from ..core.gates import topk_mask
from ..core.merge import matching_rounds, place_groups
from ..core.plan import gather_rows, group_sum, mask_to_index
from ..core.registry import register_pruner

METRICS = {"features": (), "keys": ("vision_keys@next",)}
MAPS = (
    "layer_head_attention",
    "seen_word_head_attention",
    "word_head_attention",
    "among_words_head_attention",
)


@dataclass(frozen=True)
class AIMConfig(PrunerConfig):
    """Config of `aim`."""

    metric: str = "features"  # what is compared: "features", or "keys" of the vision block behind the projected one
    enter: float = 1.6  # tokens that enter the language model, for each of `keep`, at least 1
    first: int | None = None  # in front of which decoder layer tokens begin to leave, at least 1; None: half the depth
    last: int | None = None  # in front of which the last ones leave, at least `first`; None: 3/4 of the depth
    temperature: float = 0.1  # that attention logits are divided by, above 0
    steps: int = 5  # of PageRank, at least 1

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check_choices("aim", metric=METRICS)
        if self.enter < 1:
            raise PruneZooError(f"enter={self.enter} of aim must be at least 1")
        if self.first is not None and self.first < 1:
            raise PruneZooError(f"first={self.first} of aim: there must be a layer before it, at least 1")
        if self.last is not None and self.last < (self.first or 1):
            raise PruneZooError(f"last={self.last} of aim must not be in front of first={self.first or 1}")
        if self.temperature <= 0 or self.steps < 1:
            raise PruneZooError(
                f"temperature={self.temperature}, steps={self.steps} of aim: above 0, and at least 1 step"
            )


class Merge(Pruner):
    """The first stage: bipartite matching, by plain means; in front of the language model."""

    name = "aim"
    config_class = AIMConfig
    config: AIMConfig

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a class attribute where it is not configured
        """Keys, if they are what is compared."""
        return METRICS[self.config.metric]

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """Match and merge, in all images at once, until ``keep`` tokens are left."""
        assert inputs.asked is not None  # `forward` has set it
        valid = inputs.valid
        tokens = inputs.features.float().masked_fill(~valid[..., None], 0)
        metric = inputs.signal(self.needs[0]).float().flatten(2) if self.needs else tokens
        metric = metric.masked_fill(~valid[..., None], 0)
        width, alive = valid.shape[1], valid
        leader = torch.arange(width, device=valid.device).expand_as(valid)
        place = valid.cumsum(1) - 1  # in the list
        for step in matching_rounds(inputs.counts, inputs.asked):
            merged, partner, strength = match(metric, alive, place, upload(step, valid.device))
            leader = torch.where(merged.gather(1, leader), partner.gather(1, leader), leader)
            groups = torch.where(merged, partner, leader).masked_fill(~alive, -1)
            count = group_sum(alive.float(), groups, width).clamp_min(1)[..., None]
            tokens, metric = (group_sum(values, groups, width) / count for values in (tokens, metric))
            even = alive & (place % 2 == 0)
            alive = alive & ~merged
            left = even & ~merged
            falling = strength.masked_fill(~left, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(1)
            place = torch.where(left, falling, left.sum(1, keepdim=True) + place // 2)
        groups = leader.masked_fill(~valid, -1)
        index, kept, groups = place_groups(groups, inputs.cells, valid.float(), width, inputs.most_asked)
        columns = torch.where(groups < 0, index.shape[1], groups)  # all of a group write the same slot
        chief = functional.pad(torch.zeros_like(index), (0, 1)).scatter(1, columns, leader)[:, :-1]
        made = gather_rows(tokens, chief)
        alone = (group_sum(valid.float(), groups, index.shape[1]) == 1)[..., None]
        features = torch.where(alone, gather_rows(inputs.features, index), made.to(inputs.features.dtype))
        return PruneOutput(index, kept, features, groups=groups)


def match(metric: Tensor, alive: Tensor, place: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One bipartite matching.

    Args:
        metric: ``(B, N, C)``.
        alive: ``(B, N)`` bool, the tokens in the list.
        place: ``(B, N)`` long, of each in the list, from 0.
        count: ``(B,)`` long, links to choose: the strongest.

    Returns:
        Which are merged ``(B, N)`` bool, all at even places; and of each token at an even place the slot of the most
        similar one at an odd place ``(B, N)`` long, and their cosine ``(B, N)``.
    """
    even = alive & (place % 2 == 0)
    unit = functional.normalize(metric, dim=-1)
    links = (unit @ unit.mT).masked_fill(~(alive & ~even)[:, None], -torch.inf)
    strength, partner = links.max(2)
    return topk_mask(strength, even, count), partner, strength


def page_rank(weights: Tensor, real: Tensor, temperature: float, steps: int) -> Tensor:
    """How much of an even start each token has after some steps.

    Args:
        weights: ``(B, H, S, S)``, softmax weights of attention; 0 where a row does not see.
        real: ``(B, S)`` bool, False for padding.
        temperature: Of the logits, whose softmax is taken anew.
        steps: How many.

    Returns:
        ``(B, S)``: the root of the mean square over heads; 0 on padding.
    """
    seen = weights.masked_fill(~(real[:, None, :, None] & real[:, None, None]), 0)
    hands_on = (seen.log() / temperature).softmax(-1).nan_to_num(0.0)  # what sees nothing hands nothing on
    share = (real / real.sum(1, keepdim=True).clamp_min(1))[:, None, None].expand(-1, weights.shape[1], -1, -1)
    for _ in range(steps):
        share = share @ hands_on
    return share[:, :, 0].square().mean(1).sqrt()


class Rank(Pruner):
    """The second stage: PageRank; `keep` is the mean over the layers that it brings about."""

    name = "aim"
    stage = "layer"
    exact = False  # at the end nothing stays
    needs = MAPS
    config_class = AIMConfig
    config: AIMConfig

    def stages(self, depth: int) -> tuple[int, ...]:
        """The configured layers, or those from half to three quarters of the depth."""
        if depth < 2 and self.config.first is None:
            raise PruneZooError(f"aim: a decoder of {depth} layer has no half: use a pruner of the prompt stage")
        first = self.config.first or depth // 2
        return tuple(range(first, max(depth * 3 // 4 if self.config.last is None else self.config.last, first) + 1))

    def schedule(self, keep: Tensor, available: Tensor, depth: int) -> list[Tensor]:
        """Equal numbers leave in front of each layer: all in the end, or fewer if that makes the mean ``keep``."""
        stages = self.stages(depth)
        lost = sum((i + 1) / len(stages) * (end - at) for i, (at, end) in enumerate(pairwise((*stages, depth))))
        slope = ((available - keep).double() / (available * lost / depth).clamp_min(1e-9)).clamp(0, 1)
        shares = [1 - slope * (i + 1) / len(stages) for i in range(len(stages))]
        return [(available * share + 1e-6).long() for share in shares]

    def score(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)``: the importance of each image token."""
        return self.importance(inputs)[:, : inputs.valid.shape[1]]

    def importance(self, inputs: PruneInputs) -> Tensor:
        """``(B, N + T)``: of the image tokens, then of the words."""
        assert inputs.text_valid is not None  # the layer stage gives words
        among, seen, looked, words = (inputs.signal(name).float().movedim(-1, 1) for name in MAPS)
        weights = torch.cat([torch.cat([among, seen], 3), torch.cat([looked.mT, words], 3)], 2)
        real = torch.cat([inputs.valid, inputs.text_valid], 1)
        return page_rank(weights, real, self.config.temperature, self.config.steps)

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """The best; none where a single one would be left of several."""
        keep = keep.masked_fill((keep == 1) & (inputs.valid.sum(1) > 1), 0)
        scores = self.score(inputs).masked_fill(~inputs.valid, -torch.inf)
        return PruneOutput(*mask_to_index(topk_mask(scores, inputs.valid, keep)), scores=scores)


@register_pruner("aim")
class AIM(Pruner):
    """Merging in front of the language model, PageRank inside it; `keep` is the mean."""

    stage = "layer"
    criteria = ("similarity", "attention")
    exact = False
    config_class = AIMConfig
    config: AIMConfig

    def __init__(self, config: AIMConfig | None = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        self.merge, self.rank = Merge(self.config), Rank(self.config)

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a class attribute where it is not configured
        """Those of both stages."""
        return (*self.merge.needs, *self.rank.needs)

    @property
    def reads_prompt(self) -> bool:
        """Words are in the graph."""
        return True

    def stages(self, depth: int) -> tuple[int, ...]:
        """Those of the second one."""
        return self.rank.stages(depth)

    def parts(self, keep: Keep) -> list[tuple[Pruner, Keep]]:
        """Both stages: the first with its share, the second with the mean, as a share of what the first one left."""
        self.check_keep(keep)
        assert not isinstance(keep, str)  # it sets no budgets
        if isinstance(keep, Tensor):
            return [(self.merge, (keep * self.config.enter).round().long()), (self.rank, keep)]
        if isinstance(keep, int):
            return [(self.merge, round(keep * self.config.enter)), (self.rank, keep)]
        enter = min(1.0, keep * self.config.enter)
        return [(self.merge, enter), (self.rank, min(1.0, keep / enter))]

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """Both stages on the same inputs, as if half of the layers stood between; in a host each acts at its own."""
        assert inputs.asked is not None  # `forward` has set it
        (_, enter), _ = self.parts(torch.tensor(inputs.asked))
        first = self.merge(inputs, enter)
        found = inputs.after(first)
        entered = torch.tensor(first.counts)
        second = self.rank(found, (2 * torch.tensor(inputs.asked) - entered).clamp_min(1).minimum(entered))
        index = gather_rows(first.index, second.index).masked_fill(~second.valid, 0)
        return PruneOutput(index, second.valid, gather_rows(found.features, second.index))
