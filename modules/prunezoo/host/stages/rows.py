"""Which patches of a tower's rows are left, where they stand, and what a token has of those that it is made of.

A row is a picture that the tower sees (a tile, a crop), or, of a packed tower, all patches of a batch.
Letters: R rows, N patches of one, W of them left (padded), B images, M tokens of an image, k patches of a token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...core.budgets import upload
from ...core.plan import gather_rows, mask_to_index


class Rows:
    """Rows of which patches go, step by step; at first all are there."""

    def __init__(self, rows: int, patches: int, device: torch.device) -> None:
        """Of ``rows`` R and ``patches`` N."""
        self.alive = torch.ones(rows, patches, dtype=torch.bool, device=device)
        self.slot = torch.arange(rows * patches, device=device).view(rows, patches)
        """``(R, N)``: where each patch stands among the ``R * W``; 0 for what has gone."""
        self.index = torch.arange(patches, device=device).expand(rows, -1)
        """``(R, W)``: the patches that are left, ascending, then filler."""
        self.valid = self.alive

    def shorten(self, values: Tensor, alive: Tensor, width: int) -> Tensor:
        """``(R, W', ...)`` for ``values (R, W, ...)``: those that are ``alive (R, N)``, at most ``width`` W' a row."""
        self.index, self.valid = mask_to_index(alive, width)
        taken = values.flatten(0, 1)[self.slot.gather(1, self.index)]
        first = torch.arange(len(alive), device=alive.device)[:, None] * width
        self.slot, self.alive = (alive.cumsum(1) - 1 + first).masked_fill(~alive, 0), alive
        return taken

    def whole(self, values: Tensor, joined: int = 1, gone: Tensor | None = None) -> Tensor:
        """``(R, N / joined, ...)`` for ``values (R, W / joined, ...)``: each in its place.

        Args:
            values: Of what is left; one for each ``joined`` patches that follow one another.
            joined: See there.
            gone: ``(R, N / joined, ...)``, what the others have; None: 0.
        """
        flat = values.flatten(0, 1)
        found = flat[self.slot[:, ::joined] // joined]
        alive = self.alive[:, ::joined].reshape(*found.shape[:2], *[1] * (found.dim() - 2))
        return found.where(alive, flat.new_zeros(()) if gone is None else gone)

    def of_tokens(self, values: Tensor, members: Tensor) -> Tensor:
        """``(B, M, ...)``: the mean of ``values (R, W, ...)`` over ``members (B, M, k)``, numbers of patches."""
        own = values.flatten(0, 1)[self.slot.flatten()[members]]
        return own[:, :, 0] if own.shape[2] == 1 else own.float().mean(2).to(values.dtype)

    def maps_of_tokens(self, maps: Sequence[Tensor], members: Tensor) -> Tensor:
        """``(B, M, M, ...)``: means over the patches of both tokens; 0 between what does not see one another.

        Args:
            maps: ``(R, W, W, ...)``; or, of one packed row, ``(1, s, s, ...)`` for each part that sees itself alone,
                in which the patches of a token follow one another.
            members: As above.
        """
        many, packed = members.shape[2], len(self.alive) == 1
        slots = self.slot.flatten()[members]  # (B, M, k)
        if packed:
            lengths = [own.shape[1] // many for own in maps]
            pooled = [_means(own, torch.arange(own.shape[1], device=own.device).view(1, -1, many)) for own in maps]
            token = slots[..., 0] // many
        else:
            width = maps[0].shape[1]
            lengths = [width // many] * len(self.alive)
            columns, token = self._columns(slots, width)
            pooled = [_means(maps[0], columns)]
        sizes = upload(lengths, slots.device)
        ends = sizes.cumsum(0)
        part = torch.searchsorted(ends, token, right=True).clamp_max(len(lengths) - 1)
        place = token - (ends - sizes)[part]
        starts = (sizes.square().cumsum(0) - sizes.square())[part] + place * sizes[part]  # of the row of each token
        same = part[:, :, None] == part[:, None]
        where = (starts[:, :, None] + place[:, None]).masked_fill(~same, 0)
        found = torch.cat([own.flatten(0, 2) for own in pooled])[where]
        return found.masked_fill(~same.view(*same.shape, *[1] * (found.dim() - 3)), 0)

    def _columns(self, slots: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Tokens of each row, one after the other: ``(R, T, k)`` columns of ``slots (B, M, k)`` among ``width`` W; and
        ``(B, M)``, which of the ``R * T`` a token is.
        """
        many, rows = slots.shape[2], len(self.alive)
        first = torch.zeros(rows * width, dtype=torch.long, device=slots.device)
        first = first.index_fill(0, slots[..., 0].flatten(), 1).view(rows, width)
        row, column = slots[..., 0] // width, slots[..., 0] % width
        token = row * (width // many) + (first.cumsum(1) - 1).flatten()[row * width + column]
        columns = torch.zeros(rows * (width // many), many, dtype=torch.long, device=slots.device)
        columns = columns.index_put((token.flatten(),), slots.flatten(0, 1) % width)
        return columns.view(rows, -1, many), token


def _means(maps: Tensor, columns: Tensor) -> Tensor:
    """``(R, T, T, ...)``: of ``maps (R, W, W, ...)`` means over ``columns (R or 1, T, k)``."""
    for _ in range(2):
        taken = gather_rows(maps, columns.flatten(1).expand(len(maps), -1))
        maps = taken.unflatten(1, columns.shape[1:]).mean(2).transpose(1, 2)
    return maps
