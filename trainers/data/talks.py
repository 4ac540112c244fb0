"""Conversations about pictures, wherever these are kept: what all sources have in common.

Every answer becomes one item, with the turns before it as its history, because which tokens matter differs from
question to question. A source says what its entries are and opens a picture; `llava_json.py`, `hub_dataset.py` and
`web_shards.py` are sources.
"""

import logging
import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, TypeVar
from zlib import crc32

from PIL import Image

from prunezoo.core.errors import PruneZooError

from .pictures import BrokenImage
from .suite import Item, Items

PLACEHOLDER = "<image>"
LONE = re.compile("[\ud800-\udfff]")
log = logging.getLogger("prunezoo.data")
Self = TypeVar("Self", bound="Talks")
Turns = tuple[tuple[str, str], ...]
"""(question, answer) pairs."""
Wrong = Callable[[str], PruneZooError]
"""Makes an error of what is wrong with an entry."""
Reader = Callable[[Mapping[str, Any], Wrong], tuple[Turns, int, Any]]
"""From an entry as it is written to its turns, the turn that the picture stands in, and what else is to be noted."""


@dataclass(frozen=True)
class Entry:
    """A picture and a conversation about it."""

    name: str  # for messages and ids
    picture: str  # where it is, in the source's own words
    turns: Turns
    picture_turn: int = 0  # the pair whose question the picture stands in; nothing is asked before it is there
    asked: Any = field(default=None, repr=False)  # what else its reader noted of it


class Talks(Items):
    """Items of a source; pictures are opened when their item is asked for.

    Args:
        source: Its name, for messages.
        entries: In order; at least one.
    """

    def __init__(self, source: str, entries: list[Entry]) -> None:
        if not entries:
            raise PruneZooError(f"{source}: holds no entry with a picture; there is nothing to ask")
        self.source, self.entries = source, entries
        self.places = [
            (number, turn)
            for number, entry in enumerate(entries)
            for turn in range(entry.picture_turn, len(entry.turns))
        ]

    @abstractmethod
    def open(self, picture: str) -> Image.Image:
        """A picture; see `pictures.py`.

        Raises:
            BrokenImage: It cannot be read.
        """

    def split_by(self, entry: Entry) -> str:
        """What decides an entry's split: the same for all entries of one picture, and wherever the data is moved."""
        return entry.picture

    def part(self: Self, split: str, validation_share: float, limit: int | None = None) -> Self:
        """The items of one split; all items of one picture fall into the same one, by a hash of ``split_by``.

        Of few pictures a small share is none: then the one with the least hash makes the validation split.

        Args:
            split: ``train`` or ``validation``.
            validation_share: Share of the pictures in (0, 1) that make the validation split.
            limit: Only the first so many items.
        """
        if not 0 < validation_share < 1:
            raise PruneZooError(f"validation_share must lie in (0, 1), got {validation_share}")
        # names of files that are not UTF-8 come as halves of surrogate pairs
        hashes = [crc32(self.split_by(entry).encode(errors="surrogatepass")) for entry in self.entries]
        threshold = max(validation_share * 2**32, min(hashes) + 1)
        held_out = [value < threshold for value in hashes]
        chosen = copy(self)
        chosen.places = [p for p in self.places if held_out[p[0]] == (split == "validation")]
        if not chosen.places:
            raise PruneZooError(f"{self.source}: no picture falls into the {split} split; change validation_share")
        return chosen.first(limit)

    def first(self: Self, limit: int | None) -> Self:
        """Only the first so many items; None: all."""
        chosen = copy(self)
        chosen.places = self.places[:limit]
        return chosen

    def pick(self: Self, numbers: Sequence[int]) -> Self:
        """Only the items of these numbers, in this order."""
        chosen = copy(self)
        chosen.places = [self.places[number] for number in numbers]
        return chosen

    def lengths(self) -> list[int]:
        """Characters of each item's text: by how much more one item is to be read than another."""
        ends = []
        for number, turn in self.places:
            ends.append(sum(len(question) + len(answer) for question, answer in self.entries[number].turns[: turn + 1]))
        return ends

    def id_of(self, index: int) -> str:
        """The id of an item, without opening its picture."""
        number, turn = self.places[index]
        return f"{self.entries[number].name}/{turn}"

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
            picture = self.open(entry.picture)
        except BrokenImage as error:
            raise BrokenImage(
                f"{entry.picture}: broken image of entry '{entry.name}' in {self.source} ({error}); replace it or drop "
                "the entry"
            ) from error
        turns = entry.turns[: turn + 1]
        return Item(self.id_of(index), picture, turns, group="all", picture_turn=entry.picture_turn)


def read_turns(conversation: Any, wrong: Wrong) -> tuple[Turns, int]:
    """(question, answer) pairs of a LLaVA-style list of turns, without the placeholder; and the number of the pair
    whose question it stood in, which is where the picture belongs: 0, if it stood in none.

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
    questions, answers = ([whole_text(turn["value"]) for turn in conversation[start::2]] for start in (0, 1))
    if sum(question.count(PLACEHOLDER) for question in questions) > 1:
        raise wrong(f"several times {PLACEHOLDER} for one image; keep one")
    if not all(answer.strip() for answer in answers):
        raise wrong("an answer is empty; fill it or drop the entry")
    pairs = zip(questions, answers, strict=True)
    place = next((number for number, question in enumerate(questions) if PLACEHOLDER in question), 0)
    return tuple((question.replace(PLACEHOLDER, "").strip(), answer.strip()) for question, answer in pairs), place


def read_conversation(entry: Mapping[str, Any], wrong: Wrong) -> tuple[Turns, int, Any]:
    """A :data:`Reader` of LLaVA-style entries."""
    return *read_turns(entry.get("conversations"), wrong), None


def whole_text(text: str) -> str:
    """A text with a replacement character for each half of a surrogate pair, which no tokenizer takes."""
    return LONE.sub("\N{REPLACEMENT CHARACTER}", text)


def tell_skipped(source: str, names: Sequence[str]) -> None:
    """Say how many entries are left out because they have several pictures."""
    if names:
        shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
        log.warning("%s: %d entries with several pictures are left out: %s", source, len(names), shown)
