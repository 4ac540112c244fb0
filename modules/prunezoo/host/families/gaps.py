"""Towers that run on some of their patches: which patches a token is made of, and where the others come back.

Letters: R pictures that the tower sees, N patches of one, n tokens of all images, k patches of a token, C channels,
T frames, p pixels along a patch.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from ...core.errors import PruneZooError
from ..parts.tower import Tower
from .spread import Dealing, Values

Kind = Literal["image", "video"]
PIXELS: dict[Kind, str] = {"image": "pixel_values", "video": "pixel_values_videos"}
"""The input that brings the pixels of each kind."""


@dataclass(frozen=True)
class Short:
    """How a tower gets shorter: its blocks run on what is left, and behind `ends` there is a row for every patch again.

    Rows of what was dropped are zeros there. So all behind (splitting by image, the order of windows, pixel shuffle,
    pooling, grids) runs untouched, and nothing of what is left is mixed with a zero.
    """

    tower: Tower
    ends: tuple[nn.Module, ...]
    packed: bool = False  # the patches of all pictures stand in one row
    joined: int = 1  # patches that one row behind `ends` is made of, next to one another in the tower

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Those that run on what is left."""
        return self.tower.blocks[: self.tower.depth] if self.at_block else self.tower.blocks

    @property
    def at_block(self) -> bool:
        """Whether the places come back behind the last block that is read, not behind what follows the tower."""
        return self.ends[0] is self.tower.blocks[self.tower.depth - 1]


class Shortening:
    """The part of a family's adapter that tells how its tower runs on some of the patches."""

    title: ClassVar[str]  # how people call the family

    def pictures(self, kind: Kind, batch: Mapping[str, Any]) -> Tensor:
        """What the tower is given: R pictures ``(R, C, height, width)``, or single patches ``(N, C * T * p * p)``."""
        return batch[PIXELS[kind]]

    def short(self) -> Short:
        """How the tower gets shorter, for the input stage.

        Raises:
            PruneZooError: It cannot.
        """
        raise PruneZooError(
            "this vision tower cannot be given some of its patches only: use a pruner of the prompt or layer stage"
        )

    def check_gaps(self, kind: Kind, batch: Mapping[str, Any]) -> None:
        """Raise PruneZooError where tokens of a batch are made of several cells, of which some might be left out."""


def before_joining(tower: Tower) -> Short:
    """Of a family that joins neighbouring patches: places come back behind the last block that is read."""
    return Short(tower, (tower.blocks[tower.depth - 1],))


class Gap(Protocol):
    """A run of a tower with patches left out."""

    def whole(self, values: Values) -> Values:
        """A signal of what was left, ``(R', K, ...)``, as one of all patches, ``(R, N, ...)``, 0 where none was left;
        likewise maps.
        """


Gaps = Callable[[Kind, Mapping[str, Any]], AbstractContextManager[Gap]]
"""Entered around the run of a tower on a kind of pictures of a batch."""


class NoGap:
    """Nothing is left out."""

    def whole(self, values: Values) -> Values:
        """As they are."""
        return values


def no_gaps(_kind: Kind, _batch: Mapping[str, Any]) -> AbstractContextManager[Gap]:
    """Leaves nothing out."""
    return nullcontext(NoGap())


def alive_patches(
    family: Dealing, kind: Kind, batch: Mapping[str, Any], kept: Tensor, shape: tuple[int, int]
) -> Tensor:
    """Which patches stay in the tower.

    Args:
        family: Whose.
        kind: What runs.
        batch: On what.
        kept: ``(n,)`` bool, by token, on the host.
        shape: R and N.

    Returns:
        ``(R, N)`` bool on the host, in the tower's own order. Patches that no token is made of, as those of a
        margin that the model cuts off behind the tower, stay: others see them.
    """
    count = shape[0] * shape[1]
    numbers = torch.arange(1, count + 1).view(*shape, 1)
    patches = family.deal(kind, batch, numbers)[..., 0]  # (n, k), 0 for none
    alive = kept.new_ones(count + 1)
    alive[patches] = kept[:, None].expand_as(patches)
    return alive[1:].view(shape)


def cut_patches(pictures: Tensor, high: int, wide: int) -> Tensor:
    """``(R, N, C, p, p)`` of ``(R, C, height, width)``: patches row by row."""
    patches = pictures.unfold(2, high, high).unfold(3, wide, wide)  # (R, C, rows, columns, p, p)
    return patches.movedim(1, 3).flatten(1, 2)


def given_patches(tower: Tower, pictures: Tensor) -> tuple[Tensor, int]:
    """What a tower is given, by patch.

    Args:
        tower: The tower.
        pictures: ``(R, C, height, width)``; or single patches, ``(N, C * T * p * p)``.

    Returns:
        ``(R, N, T * C, p, p)``, in the order in which they are given; and T.
    """
    frames, (high, wide) = 1, tower.patch_embedding.kernel_size[-2:]
    if pictures.dim() == 2:
        frames = tower.patch_embedding.kernel_size[0]
        patches = pictures.view(len(pictures), -1, frames, high, wide)
        return patches.transpose(1, 2).flatten(1, 2)[None], frames
    return cut_patches(pictures, high, wide), frames
