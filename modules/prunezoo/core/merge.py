"""Index algebra of merging tokens: what a group averages to, and where it sits. Nothing here knows a model.

Letters: B images, N tokens of an image (padded), K groups of an image (padded).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .contract import PruneInputs, PruneOutput
from .plan import group_sum, mask_to_index


def group_mean(values: Tensor, groups: Tensor, sizes: Tensor, count: int) -> Tensor:
    """The mean of each group's tokens, weighted by their sizes; a token that is alone in its group comes out unchanged.

    Args:
        values: ``(B, N, ...)``.
        groups: ``(B, N)`` long, from 0 to ``count - 1``; -1 for tokens of no group.
        sizes: ``(B, N)`` > 0, patches that a token stands for.
        count: K.

    Returns:
        ``(B, K, ...)`` in the type of ``values``, computed in float32; 0 for an empty group.
    """
    sizes = sizes.float()
    total = group_sum(sizes, groups, count)
    weights = sizes / total.gather(1, groups.clamp_min(0)).clamp_min(torch.finfo(torch.float32).tiny)
    weights = weights.view(weights.shape + (1,) * (values.dim() - 2))
    return group_sum(values.float() * weights, groups, count).to(values.dtype)


def place_groups(
    groups: Tensor, cells: Tensor, sizes: Tensor, count: int, most: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Give each group the slot of its member that is nearest to its mean position, and number the groups by slot.

    Members weigh as their sizes; among equally near ones the first is taken. No two groups have a member in common, so
    no two get the same slot.

    Args:
        groups: As in :func:`group_mean`.
        cells: ``(B, N, 3)`` long, as in :class:`PruneInputs`.
        sizes: ``(B, N)``, whole numbers.
        count: Upper end of the numbers in ``groups``.
        most: K, where it is known; else the device is asked for it.

    Returns:
        ``index (B, K)`` and ``valid (B, K)`` as in :class:`PruneOutput`, and ``groups (B, N)`` in the new numbers.
    """
    own = groups.clamp_min(0)
    position, weight = cells[..., 1:].double(), sizes.double()[..., None]
    # Distance times the size of the group: whole numbers, so that equal distances are equal on every device.
    total = group_sum(weight, groups, count)
    middle = group_sum(position * weight, groups, count)
    offset = position * total.gather(1, own[..., None]) - middle.gather(1, own[..., None].expand(-1, -1, 2))
    distance = offset.square().sum(-1).masked_fill(groups < 0, torch.inf)  # (B, N)
    nearest = torch.full((len(groups), count), torch.inf, dtype=torch.double, device=groups.device)
    nearest = nearest.scatter_reduce(1, own, distance, "amin")
    width = groups.shape[1]
    columns = torch.arange(width, device=groups.device).expand_as(groups)
    first = torch.full((len(groups), count), width, device=groups.device)
    first = first.scatter_reduce(1, own, columns.masked_fill(distance > nearest.gather(1, own), width), "amin")
    slot = first.gather(1, own)  # (B, N): of the group that a token belongs to
    is_slot = (columns == slot) & (groups >= 0)
    index, valid = mask_to_index(is_slot, most)
    number = (is_slot.cumsum(1) - 1).gather(1, slot.clamp_max(width - 1))
    return index, valid, number.masked_fill(groups < 0, -1)


def matching_rounds(counts: Sequence[int], asked: Sequence[int], most: float = 0.5) -> list[list[int]]:
    """How many tokens of each image each bipartite matching merges, until ``asked`` are left.

    Args:
        counts: (B) tokens of each image.
        asked: (B) tokens wanted of each, at least 1.
        most: Share of the tokens that one matching may merge, in (0, 0.5]; at least one token.

    Returns:
        (B) numbers a matching.
    """
    left, rounds = list(counts), []
    while left != list(asked):
        able = [min(max(int(n * most), 1), n // 2) for n in left]
        rounds.append([min(n - k, m) for n, k, m in zip(left, asked, able, strict=True)])
        left = [n - merged for n, merged in zip(left, rounds[-1], strict=True)]
    return rounds


def kept_groups(output: PruneOutput, width: int) -> Tensor:
    """The groups of an output that only keeps and drops: ``(B, N)`` for ``width`` N, -1 for what is dropped."""
    columns = torch.arange(output.index.shape[1], device=output.index.device).expand_as(output.index)
    groups = torch.full((len(columns), width + 1), -1, device=columns.device)  # the last column takes the filler
    return groups.scatter(1, output.index.masked_fill(~output.valid, width), columns)[:, :-1]


def merge_tokens(inputs: PruneInputs, leader: Tensor) -> PruneOutput:
    """Merge the tokens that have the same leader into their mean, weighted by size, at the slot nearest to its place.

    Args:
        inputs: The images.
        leader: ``(B, N)`` long, a column for each valid token; tokens with the same one are merged.
    """
    groups = leader.masked_fill(~inputs.valid, -1)
    sizes = inputs.valid.float() if inputs.sizes is None else inputs.sizes
    most = None if inputs.asked is None else inputs.most_asked
    index, valid, groups = place_groups(groups, inputs.cells, sizes, leader.shape[1], most)
    return PruneOutput(index, valid, group_mean(inputs.features, groups, sizes, index.shape[1]), groups=groups)
