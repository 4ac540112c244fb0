"""Index algebra of dropping tokens: masks to indices, and prompts to shorter prompts. Nothing here knows a model.

Letters: R images, N image tokens of an image (padded), B rows of the batch, L prompt tokens, S tokens left.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def mask_to_index(mask: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
    """The set columns of each row, ascending, then filler.

    Args:
        mask: ``(B, N)`` bool.
        width: The largest count of a row, where it is known; else the device is asked for it.

    Returns:
        ``index (B, K)`` long and ``valid (B, K)`` bool, where K is the largest count of a row. Filler stands last in
        its row, is not valid, and holds index 0, so that gathering by it is legal wherever N > 0.
    """
    count = mask.sum(1)
    if width is None:
        width = int(count.max()) if mask.shape[0] else 0
    order = torch.argsort(mask.logical_not().to(torch.uint8), dim=1, stable=True)[:, :width]
    valid = torch.arange(width, device=mask.device) < count[:, None]
    return order.masked_fill(~valid, 0), valid


def picks_mask(picks: Tensor, keep: Tensor, width: int) -> Tensor:
    """What greedy methods chose, one token of each image a step, of which the first ``keep`` count.

    Args:
        picks: ``(B, K)`` long slots in the order of choice; anything legal behind the first ``keep``.
        keep: ``(B,)`` long, at most K.
        width: N.

    Returns:
        ``(B, N)`` bool.
    """
    late = torch.arange(picks.shape[1], device=picks.device) >= keep[:, None]
    mask = torch.zeros(len(picks), width + 1, dtype=torch.bool, device=picks.device)
    return mask.scatter(1, picks.masked_fill(late, width), True)[:, :width]


def gather_rows(values: Tensor, index: Tensor) -> Tensor:
    """Take ``values (B, N, ...)`` at ``index (B, K)`` along dimension 1: ``(B, K, ...)``."""
    shape = index.shape + (1,) * (values.dim() - 2)
    return values.gather(1, index.view(shape).expand(*index.shape, *values.shape[2:]))


def group_sum(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """Add up ``values (B, N, ...)`` by ``groups (B, N)``, -1 for none of them: ``(B, count, ...)``."""
    where = torch.where(groups < 0, count, groups).view(groups.shape + (1,) * (values.dim() - 2)).expand_as(values)
    total = values.new_zeros(values.shape[0], count + 1, *values.shape[2:])
    return total.scatter_add(1, where, values)[:, :count]


@dataclass(frozen=True)
class KeepPlan:
    """Which positions of a padded batch of prompts survive, and where they move.

    Survivors keep their order and stand at the right end of the shorter batch; rows with fewer of them are filled on
    the left. So the last token of every row is in the last column, as generation needs it, whichever side was padded
    before. A plan that drops nothing is the identity, padding included: the model then sees its own inputs bit for bit.
    """

    index: Tensor  # (B, S) long: the old column of each new one (0 for filler)
    valid: Tensor  # (B, S) bool: False for filler
    identity: bool  # nothing was dropped
    counts: tuple[int, ...]  # (B) columns of each row that are no filler and no padding

    @classmethod
    def of_all(cls, real: Tensor, counts: Sequence[int]) -> "KeepPlan":
        """The identity; ``real`` and ``counts`` as in :meth:`from_mask`."""
        return cls(torch.arange(real.shape[1], device=real.device).expand_as(real), real, True, tuple(counts))

    @classmethod
    def from_mask(cls, keep: Tensor, real: Tensor, counts: Sequence[int], left: Sequence[int]) -> "KeepPlan":
        """Build the plan from what to keep.

        Args:
            keep: ``(B, L)`` bool, False for tokens that are to go.
            real: ``(B, L)`` bool, the attention mask: False for padding, which is left out of the shorter batch.
            counts: (B) real tokens of each row.
            left: (B) those of them that stay.
        """
        if tuple(left) == tuple(counts):
            return cls.of_all(real, counts)
        # Flipped twice: the filler that mask_to_index puts last comes first, and order is kept.
        index, valid = mask_to_index((keep & real).flip(1), max(left))
        index = (keep.shape[1] - 1 - index).masked_fill(~valid, 0)
        return cls(index.flip(1), valid.flip(1), False, tuple(left))

    def take(self, values: Tensor, filler: int | float) -> Tensor:
        """Shorten ``values (B, L, ...)`` to ``(B, S, ...)``; filler columns get the value ``filler``."""
        if self.identity:
            return values
        taken = gather_rows(values, self.index)
        return taken.masked_fill(~self.valid.view(self.valid.shape + (1,) * (taken.dim() - 2)), filler)

    def moved(self, columns: Tensor, rows: Tensor | None = None) -> Tensor:
        """Where surviving columns went.

        Args:
            columns: ``(B, T)`` old columns, or ``(R, T)`` with ``rows``; what is no survivor gives an arbitrary column.
            rows: ``(R,)`` the row of the batch that each row of ``columns`` belongs to.
        """
        if self.identity:
            return columns
        index = self.index.masked_fill(~self.valid, -1)  # ascending in each row, filler first
        index = index if rows is None else index[rows]
        return torch.searchsorted(index, columns.contiguous()).clamp_max(index.shape[1] - 1)
