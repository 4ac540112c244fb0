"""VFlowOpt: importance by what attended patches attend to; the least important recycled into a mean for each region.

VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization, Yang et al., ICCV 2025,
https://arxiv.org/abs/2508.05211, code https://github.com/sihany077/VFlowOpt.

In the block whose output is projected the voters are the patches that receive more than `threshold` times the mean;
a token's importance is what voters attend to it, mean over heads, and `alpha` times the softmax over the image of the
entropy of its grey values. In front of the language model the least important tokens are recycled: those in one region
of `cell` x `cell` tokens become their mean, weighted by importance, at the slot of the most important of them. In front
of two layers, at 9/28 and 18/28 of the depth, the least important of what is left go.

`keep` = T is what the layers read **in the mean**: `first` T enter, `second` of these pass the first cut, and the last
one leaves what makes the mean T; where that cannot be, both cuts leave the same. So `keep` = 1.0 is the model as it
is. The authors search threshold, cell, alpha, first and second for each T, by 300 trials on 30 prompts, for the cosine
of the last word's final state with all tokens and with few; `python -m trainers.search vflowopt` searches them and the
layers for the least KL to the full model at the answer, on training items, and only among trials that read no more
tokens than was asked for. On the embedded model at 1/9, `--limit 256 --trials 60` took that from 0.733 to 0.439 nats;
what it found (`hub_cards/search/vflowopt.json`) keeps 4.3 points more (0.8 to 7.5, paired) of the full model's accuracy
on 420 validation questions, and 7.1 more (5.6 to 8.6), 81.8 against 74.7 %, on 2,100 of the test split (command:
`trainers.evaluate --pruner 'vflowopt?options=hub_cards/search/vflowopt.json' vflowopt --equal-tokens --keep 1/9
--limit 2100`). For LLaVA-OneVision 7B they ship 39.3, 17.4, 0, 1.17, 1 at 10 %, 34.8, 15.6, 0, 1.06, 0.983 at 25 %,
and 28.7, 11.8, 0, 1.446, 0.749 at 50 %; the defaults are where a search begins, and every patch votes.

| | authors' code | ours |
|---|---|---|
| count | not what is asked for (261 for 256) | as many recycled as leave T; `count="code"` |
| fewer tokens than regions | – | the least important means go, too |
| regions | of the thumbnail and of the large picture | of each crop |
| single pictures | plain top-k, without recycling | as crops |
| nobody votes | NaN | what a patch receives from all |
| entropy | of normalised values that wrap around | 256 bins from the image's least to its largest grey |
| positions | kept | kept |
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.errors import PruneZooError
from ..core.gates import topk_mask
from ..core.plan import gather_rows, group_sum, mask_to_index
from ..core.registry import register_pruner
from ..core.select import rank_in_groups

PLACES = (9 / 28, 18 / 28)  # of the depth
BINS = 256


@dataclass(frozen=True)
class VFlowOptConfig(PrunerConfig):
    """Config of `vflowopt`."""

    threshold: float = 0.0  # of voters, in means of what a patch receives, at least 0; 0: all patches vote
    cell: float = 6.0  # side of the regions that are recycled into one token, in tokens, at least 1
    alpha: float = 0.0  # of the patches' entropy in their importance
    first: float = 1.25  # tokens that enter the language model, for each of `keep`, at least 1
    second: float = 0.9  # share of these that the first cut leaves, in (0, 1]
    layers: tuple[int, ...] | None = None  # in front of which the two cuts are, from 1 on; None: 9/28, 18/28
    count: str = "exact"  # of recycled ones: "exact"; "code": so many that there are about as many as asked for

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check_choices("vflowopt", count=("exact", "code"))
        for name, least in (("threshold", 0), ("cell", 1), ("first", 1)):
            if getattr(self, name) < least:
                raise PruneZooError(f"{name}={getattr(self, name)} of vflowopt must be at least {least}")
        if not 0 < self.second <= 1:
            raise PruneZooError(f"second={self.second} of vflowopt is out of range: it is a share in (0, 1]")
        layers = self.layers
        if layers is not None and (len(layers) != 2 or not 1 <= layers[0] < layers[1]):
            raise PruneZooError(f"layers={list(layers)} of vflowopt: name two layers, ascending, from 1 on")


@register_pruner("vflowopt")
class VFlowOpt(Pruner):
    """Recycling in front of the language model, and two cuts inside by the same importance; `keep` is the mean."""

    stage = "layer"
    criteria = ("attention",)
    exact = False
    config_class = VFlowOptConfig
    config: VFlowOptConfig

    @classmethod
    def search_space(cls, depth: int) -> dict[str, tuple[Any, ...]]:
        """The authors' five, around a mean of any size, and the layers of the cuts, in sevenths of a deep model."""
        places = sorted({max(1, round(depth * part / 7)) for part in range(1, 7)} if depth > 8 else range(1, depth))
        layers = tuple([a, b] for a in places for b in places if a < b)
        space: dict[str, tuple[Any, ...]] = {
            "threshold": (0.0, 50.0),
            "cell": (3.0, 24.0),
            "alpha": (-1.0, 1.0),
            "first": (1.0, 1.5),
            "second": (0.2, 1.0),
        }
        return {**space, "layers": (None, *layers)} if layers else space

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a class attribute where it is not configured
        """Attention of the block whose output is projected, whole only where not all vote; and pixels."""
        attention = "vision_attention" if self.config.threshold > 0 else "received_attention"
        return (attention, "pixels") if self.config.alpha else (attention,)

    def stages(self, depth: int) -> tuple[int, ...]:
        """In front of all layers, and the two cuts."""
        if self.config.layers is None and depth < 3:
            raise PruneZooError(f"vflowopt: a decoder of {depth} layers has no room for two cuts: set layers")
        return (0, *(self.config.layers or (max(round(depth * place), i) for i, place in enumerate(PLACES, 1))))

    def schedule(self, keep: Tensor, available: Tensor, depth: int) -> list[Tensor]:
        """What enters, and what the cuts leave for a mean of ``keep``."""
        _, early, late = self.stages(depth)
        entering = (keep * self.config.first).round().long().minimum(available)
        rest = (depth * keep - early * entering).double()  # for all layers behind the first cut
        middle = (entering * self.config.second).round().long().clamp_min(1)
        last = ((rest - (late - early) * middle) / (depth - late)).round().long()
        even = (rest / (depth - early)).round().long().clamp_min(1).minimum(entering)
        able = (last >= 1) & (last <= middle)
        return [entering, torch.where(able, middle, even), torch.where(able, last, even)]

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """Recycle at first; later the most important stay."""
        importance = inputs.carry["importance"] if "importance" in inputs.carry else self.importance(inputs)
        if inputs.step:
            index, valid = mask_to_index(topk_mask(importance, inputs.valid, keep))
            return PruneOutput(index, valid, carry={"importance": importance})
        return self.recycle(inputs, importance, keep)

    def importance(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)``, 0 on padding."""
        valid, weights = inputs.valid, inputs.signal(self.needs[0]).float()
        if self.config.threshold == 0:
            found = weights.masked_fill(~valid, 0)
        else:
            weights = weights.masked_fill(~(valid[:, None] & valid[..., None]), 0)
            voters = self.voters(weights, valid)
            voters = torch.where(voters.any(1, keepdim=True), voters, valid)
            found = (voters.float()[:, None] @ weights)[:, 0] / voters.sum(1, keepdim=True).clamp_min(1)
        if self.config.alpha:
            surprise = entropy(inputs.signal("pixels").float(), valid).masked_fill(~valid, -torch.inf)
            found = found + self.config.alpha * surprise.softmax(1)
        return found

    def voters(self, weights: Tensor, valid: Tensor) -> Tensor:
        """``(B, N)`` bool: the patches that receive more than the threshold by the map ``weights (B, N, N)``."""
        count = valid.sum(1, keepdim=True).clamp_min(1)
        received = weights.sum(1) / count
        return valid & (received > self.config.threshold * received.sum(1, keepdim=True) / count)

    def recycle(self, inputs: PruneInputs, importance: Tensor, keep: Tensor) -> PruneOutput:
        """The least important as a mean for each region."""
        valid, whole = inputs.valid, inputs.valid.sum(1)
        tile, row, column = inputs.cells.clamp_min(0).unbind(-1)
        row, column = (along.div(self.config.cell, rounding_mode="floor").long() for along in (row, column))
        width = valid.shape[1]
        region = ((tile * width + row) * width + column).masked_fill(~valid, -1)

        falling = importance.masked_fill(~valid, -torch.inf)
        order = torch.where(valid, -importance, -torch.inf).argsort(dim=1, descending=True, stable=True)  # least first
        place = order.argsort(1)
        if self.config.count == "code":
            many = (whole - keep + (whole / self.config.cell**2).long()).minimum(whole) * (keep < whole)
            gone = valid & (place < many[:, None])
        else:  # the first of its region makes a token of its own, every other one less
            more = (valid & (rank_in_groups(-importance, region, valid) > 0)).gather(1, order).long()
            fewer = (more.cumsum(1) - more).gather(1, place)
            gone = valid & (fewer < (whole - keep)[:, None])
        best = gone & (rank_in_groups(falling.masked_fill(~gone, -torch.inf), region, valid) == 0)
        kept = (valid & ~gone) | best
        if self.config.count == "exact":  # of more regions than tokens asked for the least important ones go
            kept = topk_mask(importance, kept, keep.minimum(kept.sum(1)))
        index, there = mask_to_index(kept)

        # The slot of each recycled token's region, through a number for each region of the image.
        number = (region[:, :, None] > region[:, None]).sum(2)  # tokens in regions before
        slots = torch.arange(width, device=valid.device).expand_as(number)
        chief = torch.full_like(number, -1).scatter_reduce(1, number, torch.where(best & kept, slots, -1), "amax")
        target = torch.where(gone, chief.gather(1, number), slots).masked_fill(~valid, -1)
        column = kept.cumsum(1) - 1
        groups = torch.where(target < 0, -1, column.gather(1, target.clamp_min(0)))
        groups = torch.where(kept | gone, groups, -1)
        weight = torch.where(gone, importance.clamp_min(torch.finfo(importance.dtype).tiny), 1.0)
        total = group_sum(weight, groups, index.shape[1])
        share = weight / total.gather(1, groups.clamp_min(0)).clamp_min(torch.finfo(weight.dtype).tiny)
        made = group_sum(inputs.features.float() * share[..., None], groups, index.shape[1])
        alone = (group_sum((groups >= 0).long(), groups, index.shape[1]) == 1)[..., None]
        features = torch.where(alone, gather_rows(inputs.features, index), made.to(inputs.features.dtype))
        return PruneOutput(index, there, features, groups=groups, carry={"importance": importance})


def entropy(pixels: Tensor, valid: Tensor) -> Tensor:
    """``(B, N)`` in nats: of the grey values of each token's ``pixels (B, N, C, p, p)``, in 256 bins of the image."""
    grey = pixels.mean(2).flatten(2)
    shown = valid[..., None].expand_as(grey)
    low = grey.masked_fill(~shown, torch.inf).amin((1, 2), keepdim=True)
    high = grey.masked_fill(~shown, -torch.inf).amax((1, 2), keepdim=True)
    bins = ((grey - low) / (high - low).clamp_min(1e-12) * BINS).clamp(0, BINS - 1).long()
    counts = grey.new_zeros(*grey.shape[:2], BINS).scatter_add(2, bins, torch.ones_like(grey))
    share = counts / grey.shape[2]
    return -torch.special.xlogy(share, share).sum(2)
