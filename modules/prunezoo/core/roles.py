"""What each word of a prompt is: the user's question, an instruction, an earlier answer, or what a chat template adds.

Ids alone do not say so: the same words may be asked or be part of a template. But a template puts the same ids around
every text of a role; these are its markers, and with them the roles can be read off any prompt that it made.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

Ids = tuple[int, ...]
TextEncoder = Callable[[Tensor, Tensor], Tensor]
"""Of somebody's own: from ids ``(B, L)`` and which of them are the question ``(B, L)`` bool to features ``(B, E)``."""


@runtime_checkable
class JointEncoder(Protocol):
    """A text encoder with a space that pictures have a place in, too; such as CLIP's."""

    def __call__(self, ids: Tensor, asked: Tensor) -> Tensor:
        """As a TextEncoder."""

    def image_features(self, states: Tensor) -> Tensor:
        """Bring what a vision block puts out for each image token, ``(R, N, C)``, to features ``(R, N, E)``."""


class Role(IntEnum):
    """What a word is."""

    QUESTION = 0  # the user's text, in all turns; and every word where it cannot be told
    INSTRUCTION = 1  # the system's text
    ANSWER = 2  # the assistant's text in earlier turns
    TEMPLATE = 3  # what stands around them


@dataclass(frozen=True)
class ChatMarkers:
    """The ids that a chat template puts in front of and behind texts."""

    opens: Mapping[Ids, Role]  # what stands right before the text of a role
    closes: tuple[Ids, ...]  # what stands right behind one; a longer one may end in what opens the next
    special: frozenset[int] = field(default_factory=frozenset)  # ids that no text turns into

    def roles(self, ids: Tensor, real: Tensor) -> Tensor:
        """Read the roles off.

        Args:
            ids: ``(B, L)``.
            real: ``(B, L)`` bool, False for padding.

        Returns:
            ``(B, L)`` long, of :class:`Role`. All of a row are questions where nothing opens the user's text, since the
            row is then no prompt of this template; padding counts as template.
        """
        rows = [self._row(own, shown) for own, shown in zip(ids.tolist(), real.tolist(), strict=True)]
        return torch.tensor(rows, dtype=torch.long, device=ids.device).view(ids.shape)

    def _row(self, ids: Sequence[int], real: Sequence[bool]) -> list[int]:
        """Of one prompt."""
        marks = [*self.opens, *self.closes]
        found, role, asked, at = [Role.TEMPLATE] * len(ids), Role.TEMPLATE, False, 0
        while at < len(ids):
            here = [mark for mark in marks if real[at] and tuple(ids[at : at + len(mark)]) == mark]
            mark = max(here, key=len, default=())
            if mark:
                # A mark that ends in what opens a role opens it.
                ends = [opener for opener in self.opens if mark[-len(opener) :] == opener]
                role = self.opens[max(ends, key=len)] if ends else Role.TEMPLATE
                asked |= role == Role.QUESTION
            elif real[at] and ids[at] not in self.special:
                found[at] = role
            at += len(mark) or 1
        if asked:
            return [int(one) for one in found]
        return [int(Role.QUESTION if shown else Role.TEMPLATE) for shown in real]
