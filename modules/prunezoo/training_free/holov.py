"""HoloV: each crop of the picture has its share of the budget, however little of the attention it gets.

Don't Just Chase "Highlighted Tokens" in MLLMs: Revisiting Visual Holistic Context Retention, Zou et al., NeurIPS 2025,
https://arxiv.org/abs/2510.02912, code https://github.com/obananas/HoloV.

The tokens are cut in raster order into crops of equal length, the first ones longer by one where they must be: with 16
crops of 576 tokens each is a row and a half, no window. In a crop of M tokens, S are the cosines with a zero diagonal;
the variance of token i is the mean over j of (S_ij - mean_i)^2, both means over M - 1. Its score is 1000 * attention +
`factor` * g * variance, where g brings the mean variance of its crop to the mean of 1000 * attention there. A crop's
weight is its mean score over the sum of all; it keeps floor(weight * T) tokens, and what is left goes one each to the
heaviest crops.

As released, then, the variance does nothing: it is brought to a fixed share of the attention of each crop, so the
weights are those of the attention alone, by which tokens are chosen too. With `scale="image"`, g is of the whole image,
and crops of uneven tokens weigh more; with `select_by="score"` such tokens are chosen first.

| | authors' code | paper | ours |
|---|---|---|---|
| tokens of a crop are chosen by | attention | score | `select_by="attention"`, or `"score"` |
| g is of | the crop | – | `scale="crop"`, or `"image"` |
| variance in the score | 0.09 of it | all | `factor=0.09` |
| weight of a crop | mean score | to a power | `power=1.0` |
| crops | LLaVA 16 for all tiles, Qwen floor(1024 / 576 * N / T) | – | `crops=16`, or `"auto"` for Qwen's rule |
| towers without CLS | – | – | `attention="received"`: mean over heads and rows |
| weight of a crop of one token | a thousandth of it | – | like others |
| a crop earns more than it has | rows of zeros | others have it | `overflow="share"`, or `"lose"`: fewer than T |
| more is left than there are crops | rows of zeros | – | likewise |
| order | crop by crop, by attention | – | raster |
| positions | renumbered, for Qwen kept | – | kept |

`overflow="share"` gives what would be lost, token by token, to the crop with the most weight for each token that it
would then have. The paper's refetching of visual context in middle layers is not released, and not here.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.budgets import upload
from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.errors import PruneZooError
from ..core.gates import topk_mask
from ..core.plan import group_sum, mask_to_index
from ..core.registry import register_pruner
from ..core.select import rank_in_groups
from ..core.signals import TOWER_ATTENTION

KNOWN = {
    "select_by": ("attention", "score"),
    "attention": tuple(TOWER_ATTENTION),
    "scale": ("crop", "image"),
    "overflow": ("share", "lose"),
}
EPS = 1e-6


@dataclass(frozen=True)
class HoloVConfig(PrunerConfig):
    """Settings of HoloV."""

    crops: int | str = 16  # parts of the token sequence, at least 1; "auto": floor(1024 / 576 * N / T)
    select_by: str = "attention"  # what tokens of a crop are chosen by: "attention", or "score", with the variance
    attention: str = "cls"  # "cls", or "received" for vision towers without CLS
    scale: str = "crop"  # what brings the variance to the attention's size is of each "crop", or of the whole "image"
    factor: float = 0.09  # of the variance in the score, in [0, 10]
    power: float = 1.0  # of a crop's mean score in its weight, in [0, 8]
    overflow: str = "share"  # what a crop cannot take goes to others, or with "lose" is missing

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.crops != "auto" and (isinstance(self.crops, str) or self.crops < 1):
            raise PruneZooError(f"crops={self.crops} of holov is none: a number, at least 1, or 'auto'")
        self.check_choices("holov", **KNOWN)
        for name, most in (("factor", 10), ("power", 8)):
            if not 0 <= getattr(self, name) <= most:
                raise PruneZooError(f"{name}={getattr(self, name)} of holov is out of range: in [0, {most}]")


@register_pruner("holov")
class HoloV(Pruner):
    """Top tokens of each crop, as many as its attention and variance earn it."""

    criteria = ("attention", "position")
    config_class = HoloVConfig
    config: HoloVConfig

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a class attribute where it is not configured
        """Attention of the block whose output is projected."""
        return (TOWER_ATTENTION[self.config.attention],)

    @property
    def exact(self) -> bool:  # type: ignore[override]  # a class attribute where it is not configured
        """Unless what is over is lost."""
        return self.config.overflow == "share"

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """Choose in all crops of all images at once."""
        assert inputs.asked is not None  # `forward` has set it
        counts = [self.crops(n, k) for n, k in zip(inputs.counts, inputs.asked, strict=True)]
        longest = max(-(-n // c) for n, c in zip(inputs.counts, counts, strict=True))
        crop, place, sizes = cut(inputs.valid, upload(counts, keep.device), max(counts))

        attention = inputs.signal(self.needs[0]).float().masked_fill(~inputs.valid, 0.0)
        variance = crop_variance(inputs, crop * longest + place, sizes, longest)
        score = 1000 * attention + self.config.factor * self.level(attention, variance, crop, sizes) * variance
        worth = crop_mean(score, crop, sizes) ** self.config.power
        worth = worth.masked_fill(sizes == 0, 0.0)
        weights = worth / (worth.sum(1, keepdim=True) + EPS)
        quotas = (weights * keep[:, None]).floor().long()
        left = (keep - quotas.sum(1)).minimum((sizes > 0).sum(1))
        quotas += topk_mask(weights, sizes > 0, left)

        rank = rank_in_groups(attention if self.config.select_by == "attention" else score, crop, inputs.valid)
        chosen = inputs.valid & (rank < quotas.gather(1, crop))
        if self.config.overflow == "share":
            bids = weights.gather(1, crop) / (rank + 1)
            chosen |= topk_mask(bids, inputs.valid & ~chosen, keep - chosen.sum(1))
        return PruneOutput(*mask_to_index(chosen, inputs.most_asked))

    def level(self, attention: Tensor, variance: Tensor, crop: Tensor, sizes: Tensor) -> Tensor:
        """``(B, N)`` or ``(B, 1)``: 1000 times the mean attention over the mean variance."""
        if self.config.scale == "crop":
            return (1000 * crop_mean(attention, crop, sizes) / (crop_mean(variance, crop, sizes) + EPS)).gather(1, crop)
        count = sizes.sum(1, keepdim=True).clamp_min(1)
        return 1000 * attention.sum(1, keepdim=True) / count / (variance.sum(1, keepdim=True) / count + EPS)

    def crops(self, count: int, keep: int) -> int:
        """Those of an image of ``count`` tokens that keeps ``keep``: never more than it has tokens, at least one."""
        wanted = 16 * count // (9 * max(keep, 1)) if self.config.crops == "auto" else int(self.config.crops)
        return max(min(wanted, count), 1)


def cut(valid: Tensor, counts: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut images into crops of equal length, the first ones longer by one where they cannot be.

    Args:
        valid: ``(B, N)`` bool.
        counts: ``(B,)`` long, crops of each image, at most its tokens.
        most: The largest of them.

    Returns:
        The crop of each token ``(B, N)`` long and its place in it ``(B, N)`` long, both 0 on padding, and the tokens of
        each crop ``(B, most)`` long, 0 where an image has fewer crops.
    """
    number, whole, counts = valid.cumsum(1) - 1, valid.sum(1, keepdim=True), counts[:, None]
    size, longer = whole // counts, whole % counts
    behind = number - longer * (size + 1)  # places behind the longer crops
    crop = torch.where(behind < 0, number // (size + 1), longer + behind // size.clamp_min(1)).masked_fill(~valid, 0)
    which = torch.arange(most, device=valid.device)
    sizes = torch.where(which < counts, size + (which < longer).long(), 0)
    place = number - (sizes.cumsum(1) - sizes).gather(1, crop)
    return crop, place.masked_fill(~valid, 0), sizes


def crop_mean(values: Tensor, crop: Tensor, sizes: Tensor) -> Tensor:
    """``(B, C)``: of ``values (B, N)``, 0 on padding, in each crop."""
    return group_sum(values, crop, sizes.shape[1]) / sizes.clamp_min(1)


def crop_variance(inputs: PruneInputs, cell: Tensor, sizes: Tensor, longest: int) -> Tensor:
    """How unevenly a token is like the others of its crop.

    Args:
        inputs: The images.
        cell: ``(B, N)`` long, number of the crop times ``longest``, and place in it.
        sizes: ``(B, C)`` long, tokens of each crop.
        longest: The largest of them.

    Returns:
        ``(B, N)`` float32, 0 on padding.
    """
    tokens = inputs.features.float().masked_fill(~inputs.valid[..., None], 0.0)
    unit = tokens / (tokens.norm(dim=-1, keepdim=True) + EPS)
    # each crop a matrix: (B, C, longest, D)
    unit = group_sum(unit, cell, sizes.shape[1] * longest).unflatten(1, (-1, longest))
    likeness = unit @ unit.transpose(2, 3)
    likeness.diagonal(dim1=2, dim2=3).zero_()
    others = (sizes - 1).clamp_min(1)[..., None]
    mean = likeness.sum(-1) / others
    real = torch.arange(longest, device=sizes.device) < sizes[..., None]
    spread = (likeness - mean[..., None]).square().masked_fill(~real[:, :, None], 0.0).sum(-1) / others
    return spread.flatten(1).gather(1, cell).masked_fill(~inputs.valid, 0.0)
