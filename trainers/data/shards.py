"""Tensors that are dear to compute, kept on disk: sharded safetensors and a manifest with the hash of every shard.

A shard holds what was computed for a fixed range of numbered items, and depends on nothing else. So one process or
many, unbroken or killed and begun again, leave the same bytes. A shard is written aside, put in place when it is whole,
and counts only once the manifest names it.
"""

import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from prunezoo.core.bounds import MOST_RECORD_BYTES, parse_json
from prunezoo.core.errors import PruneZooError
from prunezoo.core.files import read_json
from trainers.cli.errors import check_output, whole_file

from .loading import leave_with_parent

MANIFEST = "manifest.json"

Advance = Callable[[int], None]
"""Told how many items have been done."""

Compute = Callable[[range, Advance], dict[str, Tensor]]
"""From the numbers of some items to the tensors of their shard."""


@dataclass(frozen=True)
class Shard:
    """A finished shard, as the manifest knows it."""

    items: int  # that it was computed for
    rows: int  # items of which something was kept
    bytes: int  # of the file
    sha256: str  # likewise
    stamp: str | None = None  # what tells that its items are still those; see trainers/caches/provenance.py

    @classmethod
    def read(cls, known: Mapping[str, Any]) -> "Shard":
        """From a manifest.

        Raises:
            ValueError: A value is of another kind.
        """
        shard = cls(**known)
        for value, kind in zip(vars(shard).values(), (int, int, int, str, str | None), strict=True):
            if not isinstance(value, kind):
                raise ValueError(f"{value!r} in a shard's entry")
        return shard


class ShardedCache:
    """A folder of shards.

    Args:
        folder: Where it lies; it is made when the first shard is written.
        facts: All that the contents depend on but for the number of items, as JSON values.
        items: Number of items that it is for; with more of the same, what lies there is kept.
        shard_items: Items of one shard.
        remedy: What to do about a shard that is missing or damaged, for error messages.

    Raises:
        PruneZooError: The folder holds something else; the message names the fact that differs.
    """

    def __init__(self, folder: str | Path, facts: Mapping[str, Any], items: int, shard_items: int, remedy: str) -> None:
        if items < 1 or shard_items < 1:
            raise PruneZooError(f"{folder}: items={items} and shard_items={shard_items} must be at least 1")
        self.folder, self.remedy, self.items, self.shard_items = Path(folder), remedy, items, shard_items
        self.facts = parse_json(json.dumps({**facts, "shard_items": shard_items}))
        self.shards: dict[str, Shard] = {}
        self.verified: set[str] = set()
        check_output("cache", self.folder, folder=True)
        self.read_manifest()

    def read_manifest(self) -> None:
        """Learn what lies there.

        Raises:
            PruneZooError: It is something else, or the manifest is damaged.
        """
        path = self.folder / MANIFEST
        if not path.exists():
            return
        try:
            known = read_json(path, MOST_RECORD_BYTES)
            there, shards = known["facts"], known["shards"]
            others = sorted(name for name in {*there, *self.facts} if there.get(name) != self.facts.get(name))
            self.shards = {} if others else {name: Shard.read(shard) for name, shard in shards.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PruneZooError(
                f"{path}: not a manifest ({error!r:.200}); delete {self.folder} and {self.remedy}"
            ) from error
        for name in others:
            raise PruneZooError(
                f"{path}: was made with {name}={there.get(name)!r}, wanted is {self.facts.get(name)!r}; "
                "name another folder, or delete this one to have it made anew"
            )

    @property
    def names(self) -> list[str]:
        """File names of all shards, those that are still missing too."""
        return [f"{number:05d}.safetensors" for number in range(-(-self.items // self.shard_items))]

    @property
    def rows(self) -> int:
        """Items of which something was kept, in the shards so far."""
        return sum(self.shards[name].rows for name in self.names if name in self.shards)

    def range_of(self, name: str) -> range:
        """Numbers of a shard's items."""
        first = int(name.partition(".")[0]) * self.shard_items
        return range(first, min(first + self.shard_items, self.items))

    def wrong(self, name: str) -> str | None:
        """What is wrong with a shard's file, in words; None if it is whole."""
        path, shard = self.folder / name, self.shards.get(name)
        if name in self.verified:
            return None
        if shard is None or shard.items != len(self.range_of(name)):
            return f"{path} has not been computed"
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != shard.bytes:
            return f"{path} has {path.stat().st_size} bytes where {MANIFEST} says {shard.bytes}"
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard.sha256:
                return f"{path} is damaged: its SHA-256 is not the one in {MANIFEST}"
        self.verified.add(name)
        return None

    def missing(self) -> list[str]:
        """Shards that must be computed; every other one has been verified."""
        return [name for name in self.names if self.wrong(name)]

    def read(self) -> Iterator[dict[str, Tensor]]:
        """The shards' tensors, one shard after the other, each verified.

        Raises:
            PruneZooError: A shard is missing or damaged; the message names its file and the remedy.
        """
        for name in self.names:
            if problem := self.wrong(name):
                raise PruneZooError(f"{problem}; {self.remedy}")
            yield load_file(self.folder / name)

    def write(self, name: str, tensors: dict[str, Tensor]) -> Shard:
        """Put a shard in place; safe in any process, since the manifest is left to the caller.

        Args:
            name: Of its file.
            tensors: Among them ``item (rows,)`` long, the numbers of the items of which something was kept.
        """
        data = save({key: tensor.contiguous().cpu() for key, tensor in tensors.items()})
        write_whole(self.folder / name, data)
        rows = len(tensors["item"])
        return Shard(len(self.range_of(name)), rows, len(data), hashlib.sha256(data).hexdigest())

    def note(self, name: str, shard: Shard) -> None:
        """Enter a shard that lies in place into the manifest; only one process may."""
        self.shards[name] = shard
        self.write_manifest()

    def write_manifest(self) -> None:
        """Put what is known of all shards in place; only one process may."""
        shards = {name: asdict(self.shards[name]) for name in sorted(self.shards)}
        skipped = sum(shard.items - shard.rows for shard in self.shards.values())
        text = json.dumps({"facts": self.facts, "skipped": skipped, "shards": shards}, indent=1) + "\n"
        write_whole(self.folder / MANIFEST, text.encode())

    def require_space(self, bytes_per_item: int) -> int:
        """Bytes that the missing shards will take.

        Raises:
            PruneZooError: The disk has not so much space left.
        """
        needed = bytes_per_item * sum(len(self.range_of(name)) for name in self.missing())
        place = next(path for path in (self.folder.absolute(), *self.folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(place).free
        if needed > free:
            raise PruneZooError(
                f"{self.folder}: {needed / 1e9:.2f} GB will be needed and {free / 1e9:.2f} GB are free; "
                "free some, name a folder on another disk, or take fewer items"
            )
        return needed


def write_whole(path: Path, data: bytes) -> None:
    """Write a file such that its name never stands for half of it, whenever the machine stops."""
    with whole_file(path) as scratch, scratch.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def fill(cache: ShardedCache, open_worker: Callable[[int], Compute], processes: int, advance: Advance) -> None:
    """Compute the missing shards.

    Args:
        cache: Which to fill.
        open_worker: Called once in each process with its number, from 0; what it loads there stays for all its shards.
            It must be picklable, where there are several processes.
        processes: How many; 1: this one.
        advance: Told how many items have been done since the last time, those of finished shards first.
    """
    missing = cache.missing()
    advance(cache.items - sum(len(cache.range_of(name)) for name in missing))
    if not missing:
        return
    if processes == 1:
        compute = open_worker(0)
        for name in missing:
            cache.note(name, cache.write(name, compute(cache.range_of(name), advance)))
        return
    context = multiprocessing.get_context("spawn")  # a fork would share a GPU and the locks of threads
    done, ticket, stop = context.Value("q", 0), context.Value("q", 0), context.Event()
    settings = (cache, open_worker, done, ticket, stop, max(1, torch.get_num_threads() // processes))
    with ProcessPoolExecutor(processes, context, _begin, settings) as pool:
        waiting: dict[Future[Shard], str] = {pool.submit(_compute_shard, name): name for name in missing}
        told = 0
        try:
            while waiting:
                for future in wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED).done:
                    cache.note(waiting.pop(future), future.result())
                now = done.value
                advance(now - told)
                told = now
        except BrokenProcessPool as error:
            raise PruneZooError(
                f"{cache.folder}: a process that computes was killed, often because the machine's memory is full; give "
                "the command again with fewer processes, it goes on from here"
            ) from error
        except BaseException:  # leaving the block waits for the processes: let it not be long
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _Stopped(Exception):
    """The parent wants no more of this shard."""


_worker: Callable[[str], Shard]
"""What a process of the pool does with a shard's name."""


def _begin(
    cache: ShardedCache, open_worker: Callable[[int], Compute], done: Any, ticket: Any, stop: Any, threads: int
) -> None:
    """Set a process of the pool up; what can go wrong is left to its first shard, whose error reaches the parent."""
    global _worker
    threading.Thread(target=leave_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(threads)
    with ticket.get_lock():
        number, ticket.value = ticket.value, ticket.value + 1
    open_once = functools.cache(functools.partial(open_worker, number))

    def advance(items: int) -> None:
        if stop.is_set():
            raise _Stopped
        with done.get_lock():
            done.value += items

    _worker = lambda name: cache.write(name, open_once()(cache.range_of(name), advance))  # noqa: E731


def _compute_shard(name: str) -> Shard:
    """Compute and write one shard, in a process of the pool."""
    return _worker(name)
