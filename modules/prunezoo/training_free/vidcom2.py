"""VidCom²: of a clip, keep what stands out from its frame and from the clip, more of the frames that stand out.

Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language Models, Liu et al.,
EMNLP 2025, https://arxiv.org/abs/2505.14454, code https://github.com/xuyang-liu16/VidCom2.

Of the channels the half that varies least over the clip is looked at. A token is compared with the mean of the clip and
with the mean of its frame, by Gaussian kernels of five widths; what is least like both stays. A frame is given the more
the less its tokens are like the clip.

| | authors' code | ours |
|---|---|---|
| how many | of each frame its share, rounded, at least one; the sum is what it is | `keep`, exactly: see :func:`fill` |
| batches | one clip | any |
| still pictures | – | one frame |
"""

import torch
from torch import Tensor

from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.plan import mask_to_index
from ..core.registry import register_pruner

WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)
TEMPERATURE = 0.01
"""Of the softmax over frames; so low that nearly all of what is dealt out unevenly goes to one of them."""


@register_pruner("vidcom2")
class VidCom2(Pruner):
    """Keeps what is least like its frame and its clip; budgets by frame."""

    criteria = ("diversity",)
    needs = ("frame",)

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """Image by image, since frames differ."""
        mask = torch.zeros_like(inputs.valid)
        frames = inputs.signal("frame").long().clamp_min(0)
        for row, count in enumerate(inputs.asked or ()):
            slots = inputs.valid[row].nonzero()[:, 0]
            frame = frames[row, slots].unique(return_inverse=True)[1]
            if len(slots):
                like_clip, like_frame = likeness(inputs.features[row, slots].float(), frame)
                shares = frame_shares(like_clip, frame, count / len(slots))
                sizes = frame.bincount()
                budgets = fill(torch.minimum(published_counts(shares, sizes), sizes), shares * sizes, sizes, count)
                mask[row, slots] = choose(like_clip + like_frame, frame, budgets)
        index, valid = mask_to_index(mask, inputs.most_asked)
        return PruneOutput(index, valid)


def likeness(tokens: Tensor, frame: Tensor) -> tuple[Tensor, Tensor]:
    """How like the tokens of a clip are to its mean, and to that of their frame.

    Args:
        tokens: ``(n, D)`` float32.
        frame: ``(n,)`` long, from 0.

    Returns:
        ``(n,)`` each, between 0 and the number of widths.
    """
    half = tokens.shape[1] // 2
    if half and len(tokens) > 1:
        tokens = tokens[:, tokens.var(0).argsort(stable=True)[:half].sort().values]
    tokens = torch.nn.functional.normalize(tokens, dim=-1)
    sums = tokens.new_zeros(int(frame.max()) + 1, tokens.shape[1]).index_add(0, frame, tokens)
    means = sums / frame.bincount()[:, None]
    return gaussians(tokens, tokens.mean(0)), gaussians(tokens, means[frame])


def gaussians(tokens: Tensor, middle: Tensor) -> Tensor:
    """``(n,)``: the sum over widths a of exp(-distance² / 2a)."""
    apart = (tokens - middle).square().sum(-1)
    return torch.stack([(-apart / (2 * width)).exp() for width in WIDTHS]).sum(0)


def frame_shares(like_clip: Tensor, frame: Tensor, share: float) -> Tensor:
    """``(F,)``: what share of its tokens each frame is to keep.

    Args:
        like_clip: ``(n,)``.
        frame: ``(n,)`` long, from 0.
        share: Of the clip.
    """
    sizes = frame.bincount()
    outstanding = -like_clip.new_zeros(len(sizes)).index_add(0, frame, like_clip) / sizes
    apart = (outstanding / TEMPERATURE).softmax(0)
    return (share * (1 + apart - 1 / len(sizes))).clamp_max(1.0)


def published_counts(shares: Tensor, sizes: Tensor) -> Tensor:
    """``(F,)`` long: the shares of the frames' ``sizes (F,)``, rounded half to even, at least one."""
    return (shares * sizes).round().long().clamp_min(1)


def fill(counts: Tensor, wanted: Tensor, sizes: Tensor, total: int) -> Tensor:
    """``(F,)`` long, ``total`` together: ``counts`` brought to it one at a time, where they are furthest from it.

    Args:
        counts: ``(F,)`` long.
        wanted: ``(F,)`` float, what each frame should have.
        sizes: ``(F,)`` long, what it has.
        total: At most all; may be fewer than one for each frame.
    """
    counts = counts.clone()
    while (missing := total - int(counts.sum())) != 0:
        step = 1 if missing > 0 else -1
        room = (counts < sizes) if step > 0 else (counts > 0)
        counts[((wanted - counts) * step).masked_fill(~room, -torch.inf).argmax()] += step
    return counts


def choose(like: Tensor, frame: Tensor, counts: Tensor) -> Tensor:
    """``(n,)`` bool: of each frame so many, those that are least like; of equals the first."""
    order = like.argsort(stable=True)
    order = order[frame[order].argsort(stable=True)]  # frame by frame
    starts = frame.bincount().cumsum(0) - frame.bincount()
    rank = torch.arange(len(order), device=order.device) - starts[frame[order]]
    kept = torch.zeros_like(frame, dtype=torch.bool)
    kept[order] = rank < counts[frame[order]]
    return kept
