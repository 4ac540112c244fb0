"""Values that stand out from those near them: the local outlier factor (Breunig et al., SIGMOD 2000) of single numbers.

Letters: B images, N values of an image (padded).
"""

import torch
from torch import Tensor

LIMIT = 1.5
"""Above which factor a value is an outlier: the paper's, and what scikit-learn takes where it is told nothing."""


def local_outliers(values: Tensor, valid: Tensor, neighbours: int) -> Tensor:
    """Which values have a local outlier factor above 1.5.

    The density of a value is one over the mean distance that it has to its nearest others, where no distance counts for
    less than that of the other one to the last of its own nearest; its factor is the mean density of its nearest over
    its own. Computed in double precision.

    Args:
        values: ``(B, N)`` float; padding may hold anything finite.
        valid: ``(B, N)`` bool.
        neighbours: How many are the nearest, at least 1; all others, where there are not so many.

    Returns:
        ``(B, N)`` bool, False on padding, and for a value that is alone.
    """
    alone = torch.eye(values.shape[1], dtype=torch.bool, device=values.device)
    numbers = values.double().masked_fill(~valid, 0)
    distance = (numbers[:, :, None] - numbers[:, None]).abs().masked_fill(alone | ~valid[:, None], torch.inf)
    count = (valid.sum(1, keepdim=True) - 1).clamp(0, neighbours)  # (B, 1)
    near, index = distance.topk(min(neighbours, values.shape[1]), largest=False)  # (B, N, k)
    counts = (torch.arange(near.shape[2], device=values.device) < count)[:, None]  # (B, 1, k)
    reach = near.masked_fill(~counts, 0).amax(2)  # (B, N): to the last of its nearest
    others = index.flatten(1)
    reached = reach.gather(1, others).view_as(near).maximum(near).masked_fill(~counts, 0)
    many = count.clamp_min(1).double()
    density = 1 / (reached.sum(2) / many + 1e-10)
    around = density.gather(1, others).view_as(near).masked_fill(~counts, 0).sum(2) / many
    return (around / density > LIMIT) & valid
