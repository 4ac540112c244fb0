"""Greedy coverage: choose tokens one by one, each the one that covers most of what is not covered yet.

Row i is covered by a set as well as by the best of it, and a token's gain is what it adds to that, over all rows. A
gain is a sum over all rows, so all values must be there; but a choice changes it only by the rows that the chosen one
covers better than any before, and these soon are few: N of N in the first step, some N / k in step k. On a host the
gains are kept, and lowered by those rows. An accelerator would have to be asked which they are, and the host would wait
for it in every step; there the gains are summed anew. Pure functions; no state, no host.

Letters: B images, R rows to be covered (padded), N image tokens (padded), K tokens kept.
"""

from collections.abc import Callable

import torch
from torch import Tensor

ROUNDING = 1e-6
"""Of an image's largest gain: what is below is the rounding of float32, and counts as nothing."""
BLOCK = 1024  # rows that are looked at together


@torch.no_grad()
def cover(
    values: Tensor, open_: Tensor, most: int, rate: Callable[[Tensor], Tensor] | None = None, kept: bool | None = None
) -> Tensor:
    """Choose one token of each image a step, in all images at once.

    Args:
        values: ``(B, R, N)`` float32, how well a token covers a row; nothing covers less than 0. All 0 in rows that
            are padding.
        open_: ``(B, N)`` bool, the tokens that may be chosen.
        most: K. What stands behind as many choices as an image has open tokens means nothing.
        rate: From gains ``(B, N)``, at least 0, to what the best is chosen by; the gains themselves by default. Ties go
            to the lower slot.
        kept: Whether gains are kept and lowered; by default on a host.

    Returns:
        ``(B, K)`` long slots in the order of choice.
    """
    kept = values.device.type == "cpu" if kept is None else kept
    covered = values.new_zeros(values.shape[:2])
    closed = torch.zeros_like(values[:, 0]).masked_fill(~open_, -torch.inf)
    picks = open_.new_empty(len(values), most, dtype=torch.long)
    gains = values.clamp_min(0).sum(1, dtype=torch.float64 if kept else None)
    floor = ROUNDING * gains.masked_fill(~open_, 0).amax(1, keepdim=True)
    for step in range(most):
        real = torch.where(gains > floor, gains, 0.0)
        best = ((real if rate is None else rate(real)) + closed).argmax(1, keepdim=True)
        picks[:, step : step + 1] = best
        closed.scatter_(1, best, -torch.inf)
        better = values.gather(2, best[:, None].expand(-1, values.shape[1], 1))[..., 0].maximum(covered)
        if kept:
            _lower(gains, values, covered, better)
        else:
            gains = (values - better[..., None]).clamp_min_(0).sum(1)
        covered = better
    return picks


def _lower(gains: Tensor, values: Tensor, covered: Tensor, better: Tensor) -> None:
    """Take from ``gains (B, N)`` what the rows that are ``better (B, R)`` covered than before no longer give."""
    changed = torch.from_numpy((better > covered).flatten().numpy().nonzero()[0])
    flat, before, now = values.flatten(0, 1), covered.flatten(), better.flatten()
    images = torch.arange(len(values))[:, None]
    for rows in changed.split(BLOCK):
        own = (images == rows // values.shape[1]).double()  # (B, rows), which are whose
        gains.addmm_(own, flat[rows].clamp(before[rows, None], now[rows, None]).double(), alpha=-1)
        gains += own @ before[rows, None].double()
