"""The list of chosen items: a JSON file of `trainers.select`, which every recipe takes as `data.only`."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prunezoo.core.bounds import MOST_RECORD_BYTES, parse_json
from prunezoo.core.errors import PruneZooError
from prunezoo.core.files import read_json
from trainers.cli.errors import whole_file

from ..suite import Item, Items

REMEDY = "write it by `python -m trainers.select`"


@dataclass(frozen=True)
class Chosen:
    """What was chosen.

    Attributes:
        source: what the items are taken from, as the data module says it.
        total: number of items that it was chosen from.
        how: the method, and all that it depends on, as JSON values.
        numbers: of the chosen items, ascending.
        ids: of these, in the same order.
    """

    source: Mapping[str, Any]
    total: int
    how: Mapping[str, Any]
    numbers: tuple[int, ...]
    ids: tuple[str, ...]

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        with whole_file(path) as scratch:
            scratch.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> "Chosen":
        """Read a file.

        Raises:
            PruneZooError: it is not there, or not such a list.
        """
        found = read_json(path, MOST_RECORD_BYTES, REMEDY)
        keys = cls.__dataclass_fields__.keys()
        if not isinstance(found, dict) or found.keys() != keys:
            raise PruneZooError(f"{path}: not a list of chosen items, which has {', '.join(keys)}; {REMEDY}")
        numbers, ids, total = found["numbers"], found["ids"], found["total"]
        are_right = (
            isinstance(found["source"], dict)
            and isinstance(found["how"], dict)
            and type(total) is int
            and isinstance(numbers, list)
            and isinstance(ids, list)
            and len(numbers) == len(ids) > 0
            and all(type(number) is int and 0 <= number < total for number in numbers)
            and numbers == sorted(set(numbers))
            and all(isinstance(name, str) for name in ids)
        )
        if not are_right:
            raise PruneZooError(f"{path}: needs as many ids as ascending numbers below its total; {REMEDY}")
        return cls(found["source"], total, found["how"], tuple(numbers), tuple(ids))

    def check(self, path: Path, source: Mapping[str, Any], total: int) -> None:
        """Refuse a list that was chosen from something else.

        Raises:
            PruneZooError: the first thing that differs.
        """
        if self.total != total:
            raise PruneZooError(
                f"data.only={path}: chosen from {self.total} items, and here are {total}; set data.train_items, or "
                "choose anew"
            )
        written = parse_json(json.dumps(source))
        for key in (*self.source, *written):
            was, now = self.source.get(key), written.get(key)
            if was != now:
                raise PruneZooError(f"data.only={path}: chosen from {key}={was}, and here it is {now}; choose anew")

    def check_ids(self, path: str, now: Iterable[str], start: int = 0) -> None:
        """Refuse items that are not those that were chosen.

        Args:
            path: Of the list, for the message.
            now: Ids of the items at the chosen numbers, from the ``start``-th on.
            start: See there.

        Raises:
            PruneZooError: The first one that is another.
        """
        for place, name in enumerate(now, start):
            if name != self.ids[place]:
                raise PruneZooError(
                    f"data.only={path}: item {self.numbers[place]} is {name!r}, and {self.ids[place]!r} was chosen; "
                    "the data have changed: choose anew"
                )

    @property
    def digest(self) -> str:
        """Of what is chosen: another one for other items."""
        return hashlib.sha256(repr((self.numbers, self.ids)).encode()).hexdigest()


class ChosenItems(Items):
    """Only the chosen ones of some items.

    Args:
        items: All.
        chosen: Which.
        path: Of the list, for messages.
    """

    def __init__(self, items: Sequence[Item], chosen: Chosen, path: str) -> None:
        self.items, self.chosen, self.path = items, chosen, path

    def __len__(self) -> int:
        return len(self.chosen.numbers)

    def item(self, index: int) -> Item:
        """One of them.

        Raises:
            PruneZooError: it is not the one that was chosen.
        """
        item = self.items[self.chosen.numbers[index]]
        self.chosen.check_ids(self.path, [item.id], index)
        return item

    def stamp(self, index: int) -> str | None:
        """See Items."""
        return self.items.stamp(self.chosen.numbers[index]) if isinstance(self.items, Items) else None
