"""Broken pictures: how many a run puts up with, and what takes their place."""

import logging
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prunezoo.core.errors import PruneZooError

from .conversation import RefusedImage
from .pictures import BrokenImage
from .suite import Item, Items
from .talks import Talks

LONG, THIN = 20, 32
"""A picture so many times longer than wide, or with a side of fewer pixels, may be refused by a processor."""

log = logging.getLogger("prunezoo.data")


class Tally:
    """Which items of a run turned out to be broken, counted once for all its splits and loader workers.

    Args:
        items: Of all splits together.
        share: Of them that may be broken, in [0, 1); one beyond it is an error.
    """

    def __init__(self, items: int, share: float) -> None:
        if not 0 <= share < 1:
            raise PruneZooError(f"broken_share must lie in [0, 1), got {share}")
        self.items, self.share = items, share
        # shared with the workers, however these are started
        self.known = multiprocessing.get_context("spawn").Array("b", items)

    @property
    def broken(self) -> int:
        """Broken items so far."""
        return sum(self.known.get_obj())

    def note(self, number: int, error: BrokenImage) -> None:
        """Note that an item is broken, and log it, if that is news.

        Raises:
            PruneZooError: There are too many.
        """
        with self.known.get_lock():
            if self.known[number]:
                return
            if self.broken + 1 > self.share * self.items:
                if not self.share:
                    raise BrokenImage(f"{error}, or allow some: data.broken_share") from error
                raise PruneZooError(
                    f"{self.broken + 1} of {self.items} items have broken images, more than broken_share={self.share} "
                    f"allows; the last: {error}"
                )
            self.known[number] = 1
            log.warning("skipped, %d so far: %s", self.broken, error)


class SkipBroken(Items):
    """The items of a split, but in place of one whose picture is broken comes the next one whose picture is not.

    Args:
        items: Of which some may be broken.
        tally: Which are, of all splits.
        first: The number of the first item in the tally.
        try_out: Raises BrokenImage at an item whose picture a processor refuses; it is asked about odd shapes only.
    """

    def __init__(
        self, items: Talks, tally: Tally, first: int = 0, try_out: Callable[[list[Item]], Any] | None = None
    ) -> None:
        self.items, self.tally, self.first, self.try_out = items, tally, first, try_out

    def lengths(self) -> list[int]:
        """See Talks."""
        return self.items.lengths()

    def id_of(self, index: int) -> str:
        """See Talks."""
        return self.items.id_of(index)

    def mark(self, index: int) -> str:
        """See Talks."""
        return self.items.mark(index)

    def stamp(self, index: int) -> str | None:
        """See Items. What comes in place of a broken one is known only when it has been opened."""
        return None if self.tally.known[self.first + index] else self.items.stamp(index)

    def __len__(self) -> int:
        return len(self.items)

    def item(self, index: int) -> Item:
        """The item, or the next one whose picture is whole.

        Raises:
            PruneZooError: There are too many broken ones.
        """
        for step in range(len(self)):
            number = (index + step) % len(self)
            if self.tally.known[self.first + number]:
                continue
            try:
                item = self.items[number]
                if self.try_out and odd(*item.image.size):
                    self.try_out([item])
                return item
            except BrokenImage as error:
                self.tally.note(self.first + number, error)
        raise PruneZooError(f"{self.items.source}: all {len(self)} items of a split have broken images")

    def instead(self, refused: RefusedImage) -> Item:
        """The next item in place of one whose picture was refused when its batch was made.

        Raises:
            PruneZooError: There are too many of them.
        """
        assert refused.item is not None  # its collator has said so
        names = (number for number in range(len(self)) if self.id_of(number) == refused.item.id)
        number = next(number for number in names if not self.tally.known[self.first + number])
        self.tally.note(self.first + number, refused)
        return self.item(number + 1)


class SkipRefused:
    """A collator that takes another item for each whose picture the processor refuses.

    Args:
        collate: Makes the batches.
        items: What they are made of.
    """

    def __init__(self, collate: Callable[[Sequence[Item]], dict[str, Any]], items: SkipBroken) -> None:
        self.collate, self.items = collate, items

    def __call__(self, batch: Sequence[Item]) -> dict[str, Any]:
        """A batch of as many items."""
        items = list(batch)
        while True:
            try:
                return self.collate(items)
            except RefusedImage as error:
                (place,) = (number for number, item in enumerate(items) if item is error.item)
                items[place] = self.items.instead(error)


def odd(width: int, height: int) -> bool:
    """Whether a picture has a shape that processors have been seen to refuse."""
    short, long = sorted((width, height))
    return short < THIN or long > LONG * short


def skip_broken(
    splits: Mapping[str, Talks], share: float, try_out: Callable[[list[Item]], Any] | None = None
) -> dict[str, SkipBroken]:
    """The splits of a run, with one tally for all of them; see SkipBroken and Tally."""
    tally = Tally(sum(len(items) for items in splits.values()), share)
    made, first = {}, 0
    for split, items in splits.items():
        made[split] = SkipBroken(items, tally, first, try_out)
        first += len(items)
    return made
