"""From the patches that a tower sees to the tokens that the language model reads.

Letters: R pictures that the tower sees, N patches of one, n tokens of all images, k patches of a token, C channels.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ...core.signals import parse_signal

Values = Tensor | Sequence[Tensor]
"""A signal of the tower: ``(R, N, ...)``; or, of a map, what sees itself and nothing else: ``(R, s, s, ...)`` each, in
the order of the patches."""


class Dealing(Protocol):
    """A family, as far as it is needed here; see `Family.deal`."""

    def deal(self, kind: Any, batch: Mapping[str, Any], values: Tensor, order: Any = "tower") -> Tensor:
        """``(n, k, C)`` for ``(R, N, C)``."""


def spread(
    family: Dealing, kind: Any, batch: Mapping[str, Any], name: str, values: Values, sizes: Sequence[int]
) -> Sequence[Tensor]:
    """Deal a signal out to tokens.

    Args:
        family: Whose tokens.
        kind: What the tower ran on.
        batch: Likewise.
        name: Of the signal.
        values: It, as the tower has it.
        sizes: Tokens of each image.

    Returns:
        For each image ``(n, ...)``, of a map ``(n, n, ...)``: the mean over the patches of a token; of pixels, the
        square that they make.
    """
    if not isinstance(values, Tensor):
        return _spread_maps(family, kind, batch, values, sizes)
    rest, pixels = values.shape[2:], parse_signal(name).kind == "pixels"
    dealt = family.deal(kind, batch, values.reshape(*values.shape[:2], -1), "given" if pixels else "tower")
    if pixels:
        return _join(dealt.unflatten(2, rest)).split(list(sizes))
    mean = dealt[:, 0] if dealt.shape[1] == 1 else dealt.float().mean(1).to(values.dtype)
    return mean.reshape(-1, *rest).split(list(sizes))


def _join(squares: Tensor) -> Tensor:
    """``(n, k, C, p, p)`` to ``(n, C, q, q)``."""
    side = math.isqrt(squares.shape[1])
    return squares.unflatten(1, (side, side)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _spread_maps(
    family: Dealing, kind: Any, batch: Mapping[str, Any], maps: Sequence[Tensor], sizes: Sequence[int]
) -> list[Tensor]:
    """For each image its own map; no whole map of the batch is made, whose size would grow with its square."""
    alone = [own for several in maps for own in several]  # (s, s, ...) each
    starts = torch.tensor([0] + [len(own) for own in alone]).cumsum(0)
    numbers = torch.arange(1, int(starts[-1]) + 1, device=alone[0].device)
    found = family.deal(kind, batch, numbers.view(len(maps[0]), -1, 1))[..., 0] - 1  # (n, k), -1 for none
    return [_among(own, alone, starts.to(own.device)) for own in found.split(list(sizes))]


def _among(patches: Tensor, maps: Sequence[Tensor], starts: Tensor) -> Tensor:
    """``(n, n, ...)``: the map of an image whose tokens are made of ``patches (n, k)``; 0 between pictures."""
    out = maps[0].new_zeros(len(patches), len(patches), *maps[0].shape[2:])
    owner = torch.searchsorted(starts, patches[:, 0].contiguous(), right=True) - 1
    for number in owner[patches[:, 0] >= 0].unique().tolist():
        tokens = (owner == number).nonzero()[:, 0]
        own = patches[tokens] - starts[number]  # (m, k)
        out[tokens[:, None], tokens] = maps[number][own].mean(1)[:, own].mean(2)
    return out
