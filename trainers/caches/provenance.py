"""Of which items a cache was made, so that what was said of other items is never taken for theirs.

Each shard holds a digest of every item that it was computed for: of its id, its turns, and its picture pixel by pixel.
Before a cache is used all items are opened and compared with these. Where a source can tell without opening a picture
that it is still the one of before (`Items.stamp`), a shard that was compared is not compared again until that changes.

Letter: M items.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from safetensors import safe_open
from torch import Tensor

from prunezoo.core.errors import PruneZooError
from trainers.data.digest import digest_of
from trainers.data.shards import ShardedCache
from trainers.data.suite import Item, Items

DIGESTS = "digests"
"""Name of the tensor (M, BYTES) of a shard that holds them."""
BYTES = 32


class Seen(Sequence[Item]):
    """Items, of which a digest is noted when they are asked for."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items
        self.digests: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> Item:  # type: ignore[override]  # no slices
        item = self.items[number]
        self.digests[number] = digest_of(item)
        return item

    def of(self, numbers: range) -> Tensor:
        """The digests of some items that have all been asked for, (M, BYTES) uint8."""
        return torch.tensor([list(self.digests.pop(number)) for number in numbers], dtype=torch.uint8)


def stamp_of(items: Sequence[Item], numbers: range) -> str | None:
    """What stays the same only while all of some items do; None where only opening them can tell."""
    stamps = [items.stamp(number) if isinstance(items, Items) else None for number in numbers]
    return None if None in stamps else hashlib.sha256(repr(stamps).encode()).hexdigest()


def check_items(cache: ShardedCache, items: Sequence[Item], advance: Callable[[int], None]) -> dict[str, str | None]:
    """Look whether a cache's finished shards were computed of these items.

    Args:
        cache: Its manifest is told which shards need not be compared again.
        items: As they are now.
        advance: Told how many items have been looked at since the last time.

    Returns:
        The stamp of every shard's items, taken before any was opened.

    Raises:
        PruneZooError: Some were computed of others; the message names shard and item.
    """
    stamps = {name: stamp_of(items, cache.range_of(name)) for name in cache.names}
    missing = set(cache.missing())
    for name in cache.names:
        if name not in missing and (stamps[name] is None or stamps[name] != cache.shards[name].stamp):
            compare(cache, name, items)
        advance(len(cache.range_of(name)))
    keep_stamps(cache, items, stamps, set(cache.names) - missing)
    return stamps


def keep_stamps(cache: ShardedCache, items: Sequence[Item], before: dict[str, str | None], names: set[str]) -> None:
    """Note the stamps of shards whose items were read after these stamps were taken, unless they changed meanwhile."""
    new = {name: before[name] for name in names if before[name] not in (None, cache.shards[name].stamp)}
    told = {name: stamp for name, stamp in new.items() if stamp_of(items, cache.range_of(name)) == stamp}
    if told:
        cache.shards |= {name: replace(cache.shards[name], stamp=stamp) for name, stamp in told.items()}
        cache.write_manifest()


def compare(cache: ShardedCache, name: str, items: Sequence[Item]) -> None:
    """Open the items of a shard, and compare them with those that it was computed of.

    Raises:
        PruneZooError: One is another.
    """
    with safe_open(cache.folder / name, "pt") as file:
        known = file.get_tensor(DIGESTS)
    for number, digest in zip(cache.range_of(name), known, strict=True):
        item = items[number]
        if digest_of(item) != bytes(digest.tolist()):
            raise PruneZooError(
                f"{cache.folder / name} was made of other data: its item {number}, '{item.id}' now, was another or "
                f"had another text or picture; name another folder, or delete {cache.folder} to have it made anew"
            )
