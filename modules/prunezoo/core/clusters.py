"""Clusters of tokens by density peaks (DPC-KNN: Du et al., Knowledge-Based Systems 2016), in all images at once.

Letters: B images, N tokens of an image (padded), C width, M clusters of an image (padded).
"""

import torch
from torch import Tensor


def density_peaks(
    tokens: Tensor, valid: Tensor, count: Tensor, most: int, neighbours: int | None = None
) -> tuple[Tensor, Tensor]:
    """Take dense tokens that are far from any denser one as centres, and put each token into the nearest one's cluster.

    Distance is that of Euclid over the root of C. Density is exp(- mean squared distance to the nearest tokens, as many
    as there are clusters or ``neighbours``, itself among them); a centre has the largest product of density and
    distance to the nearest denser token (for the densest: the largest distance there is). Of equally dense tokens,
    which two that are nearest to each other are where two are counted, the first is the denser; of equal products and
    distances the first is taken.

    Args:
        tokens: ``(B, N, C)``; padding may hold anything finite.
        valid: ``(B, N)`` bool.
        count: ``(B,)`` long, clusters of each image, at most the number of its valid tokens.
        most: M, the largest of them, at most N.
        neighbours: How many are the nearest, at least 1; all, where there are fewer. None: ``count``.

    Returns:
        The centres ``(B, M)`` long, the largest product first, and the cluster of each token ``(B, N)`` long. What an
        image has beyond its ``count`` and its valid tokens is arbitrary.
    """
    wide = tokens.float().masked_fill(~valid[..., None], 0)
    middle = wide.sum(1, keepdim=True) / valid.sum(1).clamp_min(1)[:, None, None]
    wide = wide - middle  # distances stay, and lose less of their digits
    distance = torch.cdist(wide, wide) / tokens.shape[-1] ** 0.5  # (B, N, N)
    itself = torch.eye(distance.shape[1], dtype=torch.bool, device=tokens.device)
    distance = ((distance + distance.transpose(1, 2)) / 2).masked_fill(itself, 0)  # as rounding may not leave it
    both = valid[:, None] & valid[..., None]
    used = torch.arange(most, device=tokens.device) < count[:, None]  # (B, M)

    near = count if neighbours is None else valid.sum(1).clamp_max(neighbours)
    width = most if neighbours is None else min(neighbours, tokens.shape[1])
    nearest = distance.masked_fill(~both, torch.inf).topk(width, largest=False).values  # (B, N, width)
    counted = torch.arange(width, device=tokens.device) < near[:, None]
    squares = nearest.square().masked_fill(~counted[:, None], 0).sum(-1)
    density = (-squares / near.clamp_min(1)[:, None]).exp().masked_fill(~valid, -1)
    before = torch.ones_like(itself).tril(-1)
    other, own = density[:, None], density[..., None]
    denser = both & ((other > own) | ((other == own) & before))
    farthest = distance.masked_fill(~both, 0).amax((1, 2))[:, None, None]
    lead = distance.where(denser, farthest).amin(2)
    peaks = (lead * density).masked_fill(~valid, -1).argsort(dim=1, descending=True, stable=True)[:, :most]

    to_peaks = distance.gather(1, peaks[..., None].expand(-1, -1, distance.shape[2])).masked_fill(
        ~used[..., None], torch.inf
    )
    cluster = to_peaks.argmin(1)  # (B, N)
    numbers = torch.arange(most, device=tokens.device).expand_as(peaks)
    return peaks, cluster.scatter(1, peaks, torch.where(used, numbers, cluster.gather(1, peaks)))
