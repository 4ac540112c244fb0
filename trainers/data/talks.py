"""Conversations about pictures, wherever these are kept: what all sources have in common.

Every answer becomes one item, with the turns before it as its history, because which tokens matter differs from
question to question. A source says what its entries are and opens a picture; `llava_json.py`, `hub_dataset.py` and
`web_shards.py` are sources.
"""

import logging
import multiprocessing
from abc import abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, TypeVar
from zlib import crc32

from PIL import Image, UnidentifiedImageError

from prunezoo.core.errors import PruneZooError

from .suite import Item, Items

PLACEHOLDER = "<image>"
log = logging.getLogger("prunezoo.data")
Self = TypeVar("Self", bound="Talks")


@dataclass(frozen=True)
class Entry:
    """A picture and a conversation about it."""

    name: str  # for messages and ids
    picture: str  # where it is, in the source's own words
    turns: tuple[tuple[str, str], ...]  # (question, answer) pairs


class BrokenImage(PruneZooError):
    """A picture that cannot be read."""


class Talks(Items):
    """Items of a source; pictures are opened when their item is asked for.

    Args:
        source: Its name, for messages.
        entries: In order; at least one.
    """

    def __init__(self, source: str, entries: list[Entry]) -> None:
        if not entries:
            raise PruneZooError(f"{source}: holds no entry with a picture; nothing to train on")
        self.source, self.entries = source, entries
        self.places = [(number, turn) for number, entry in enumerate(entries) for turn in range(len(entry.turns))]

    @abstractmethod
    def open(self, picture: str) -> Image.Image:
        """A picture, decoded, in any mode.

        Raises:
            OSError: It cannot be read; so do PIL's own errors.
        """

    def split_by(self, entry: Entry) -> str:
        """What decides an entry's split: the same for all entries of one picture, and wherever the data is moved."""
        return entry.picture

    def part(self: Self, split: str, validation_share: float, limit: int | None = None) -> Self:
        """The items of one split; all items of one picture fall into the same one, by a hash of ``split_by``.

        Args:
            split: ``train`` or ``validation``.
            validation_share: Share of the pictures in (0, 1) that make the validation split.
            limit: Only the first so many items.
        """
        if not 0 < validation_share < 1:
            raise PruneZooError(f"validation_share must lie in (0, 1), got {validation_share}")
        held_out = [crc32(self.split_by(entry).encode()) / 2**32 < validation_share for entry in self.entries]
        chosen = copy(self)
        chosen.places = [p for p in self.places if held_out[p[0]] == (split == "validation")][:limit]
        if not chosen.places:
            raise PruneZooError(f"{self.source}: no picture falls into the {split} split; change validation_share")
        return chosen

    def lengths(self) -> list[int]:
        """Characters of each item's text: by how much more one item is to be read than another."""
        ends = []
        for number, turn in self.places:
            ends.append(sum(len(question) + len(answer) for question, answer in self.entries[number].turns[: turn + 1]))
        return ends

    def __len__(self) -> int:
        return len(self.places)

    def picture_stamp(self, picture: str) -> str | None:
        """What changes whenever a picture does, without opening it; None: it cannot be said so."""
        return None

    def mark(self, index: int) -> str:
        """An item's name, text, and where its picture is."""
        number, turn = self.places[index]
        return repr((turn, self.entries[number]))

    def stamp(self, index: int) -> str | None:
        """See Items."""
        picture = self.picture_stamp(self.entries[self.places[index][0]].picture)
        return None if picture is None else f"{self.mark(index)} {picture}"

    def item(self, index: int) -> Item:
        """One answer, with the turns before it.

        Raises:
            BrokenImage: Its picture cannot be read.
        """
        number, turn = self.places[index]
        entry = self.entries[number]
        try:
            picture = self.open(entry.picture).convert("RGB")
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise BrokenImage(
                f"{entry.picture}: broken image of entry '{entry.name}' in {self.source} ({error}); replace it or drop "
                "the entry, or allow some: data.broken_share"
            ) from error
        return Item(id=f"{entry.name}/{turn}", image=picture, turns=entry.turns[: turn + 1], group="all")


class SkipBroken(Items):
    """The same items, but in place of one whose picture is broken comes the next one whose picture is not.

    Args:
        items: Of which some may be broken.
        share: Of all items that may be, in [0, 1]; beyond it the first broken one is an error.

    Each broken item is counted and logged once for all loader workers of a process.
    """

    def __init__(self, items: Sequence[Item], share: float) -> None:
        if not 0 <= share < 1:
            raise PruneZooError(f"broken_share must lie in [0, 1), got {share}")
        self.items, self.share = items, share
        # shared with the workers, however these are started
        self.known = multiprocessing.get_context("spawn").Array("b", len(items))

    @property
    def broken(self) -> int:
        """Broken items so far."""
        return sum(self.known.get_obj())

    def lengths(self) -> list[int]:
        """See Talks."""
        return self.items.lengths()  # type: ignore[attr-defined]

    def mark(self, index: int) -> str:
        """See Talks."""
        return self.items.mark(index)  # type: ignore[attr-defined]

    def stamp(self, index: int) -> str | None:
        """See Items. What comes in place of a broken one is known only when it has been opened."""
        return None if self.known[index] else self.items.stamp(index)  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.items)

    def item(self, index: int) -> Item:
        """The item, or the next one whose picture is whole.

        Raises:
            PruneZooError: There are too many broken ones.
        """
        for step in range(len(self)):
            number = (index + step) % len(self)
            try:
                return self.items[number]
            except BrokenImage as error:
                self.note(number, error)
        raise AssertionError("unreachable: a share below 1 is passed before all are broken")

    def note(self, number: int, error: BrokenImage) -> None:
        """Note a broken item.

        Raises:
            PruneZooError: There are too many.
        """
        with self.known.get_lock():
            if self.known[number]:
                return
            if self.broken + 1 > self.share * len(self):
                if not self.share:
                    raise error
                raise PruneZooError(
                    f"{self.broken + 1} of {len(self)} items have broken images, more than broken_share={self.share} "
                    f"allows; the last: {error}"
                )
            self.known[number] = 1
            log.warning("skipped, %d so far: %s", self.broken, error)


def read_turns(conversation: Any, wrong: Callable[[str], PruneZooError]) -> tuple[tuple[str, str], ...]:
    """(question, answer) pairs of a LLaVA-style list of turns, without placeholders.

    Args:
        conversation: ``[{"from": "human", "value": …}, {"from": "gpt", "value": …}, …]``.
        wrong: Makes an error of what is wrong.
    """
    if not isinstance(conversation, list):
        raise wrong("key 'conversations' with a list of turns is missing; add it or drop the entry")
    for number, turn in enumerate(conversation):
        speaker = ("human", "gpt")[number % 2]
        if not isinstance(turn, dict) or turn.get("from") != speaker or not isinstance(turn.get("value"), str):
            raise wrong(f"turn {number} must be {{'from': '{speaker}', 'value': text}}; mend it or drop the entry")
    if not conversation or len(conversation) % 2:
        raise wrong("conversations must be pairs of a human and a gpt turn; mend it or drop the entry")
    if sum(turn["value"].count(PLACEHOLDER) for turn in conversation) > 1:
        raise wrong(f"several times {PLACEHOLDER} for one image; keep one")
    texts = [turn["value"].replace(PLACEHOLDER, "").strip() for turn in conversation]
    if not all(texts[1::2]):
        raise wrong("an answer is empty; fill it or drop the entry")
    return tuple(zip(texts[::2], texts[1::2], strict=True))
