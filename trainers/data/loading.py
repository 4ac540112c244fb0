"""A loader that can stop in mid-epoch and go on there, alone or on many processes."""

import itertools
import multiprocessing.util
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from prunezoo.core.errors import PruneZooError


def begin_worker(number: int) -> None:
    """For a DataLoader's `worker_init_fn`: signals are the training's to handle, even those to the whole process group.

    A worker that obeyed them would be missed before the training has written its checkpoint. It leaves with its parent
    instead, also where that is killed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=leave_with_parent, daemon=True).start()


def leave_with_parent() -> None:
    """Wait for the parent's end, and leave: one that is killed says nothing to its children."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a child
    parent.join()
    os._exit(1)


def kill_left_behind() -> None:
    """Kill the workers that are left when this process ends: it would ask them to leave and wait without end."""
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


multiprocessing.util.Finalize(None, kill_left_behind, exitpriority=0)  # before multiprocessing waits for them

CHUNK = 50
"""Batches of all processes together out of which items of like length are brought together."""


class ResumableSampler(DistributedSampler):
    """Every process' share of each epoch's own permutation; begins at `start`, which the loader sets.

    It is a DistributedSampler so that Lightning leaves it in place. No item comes twice in an epoch; up to one batch of
    all processes is left out, others in each epoch.

    Args:
        dataset: Map-style.
        batch_size: Items of one process.
        world_size: Number of training processes.
        rank: Which of them this is.
        seed: Of the order.
        lengths: Of all items, if batches are to be of items of like length.
    """

    start = 0

    def __init__(
        self, dataset: Dataset, batch_size: int, world_size: int, rank: int, seed: int, lengths: list[int] | None
    ) -> None:
        super().__init__(dataset, world_size, rank, shuffle=True, seed=seed, drop_last=True)
        self.together = batch_size * world_size
        self.lengths = None if lengths is None else torch.tensor(lengths)

    def __iter__(self) -> Iterator[int]:
        indices = list(super().__iter__()) if self.lengths is None else self.grouped(self.lengths)
        return iter(indices[self.start :])

    def grouped(self, lengths: Tensor) -> list[int]:
        """This process' items, in an order in which those of a batch are of like length."""
        draw = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(lengths), generator=draw)
        order = order[: len(order) // self.together * self.together]
        chunks = [chunk[lengths[chunk].argsort(stable=True)] for chunk in order.split(CHUNK * self.together)]
        batches = torch.cat(chunks).view(-1, self.together)
        return batches[torch.randperm(len(batches), generator=draw)].flatten()[self.rank :: self.num_replicas].tolist()

    def set_epoch(self, epoch: int) -> None:
        """Ignored: the loader counts the epochs, so that a resumed run and an unbroken one agree."""


class TellingLoader(DataLoader):
    """A DataLoader whose errors say which items they came from.

    What is raised while a batch is made has the attribute `ids`, the names of the batch's items, where the data set
    can name them without making them. A PruneZooError is the one that was raised, also where a worker raised it.
    """

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        for number in itertools.count():
            try:
                batch = next(batches)
            except StopIteration:
                return
            except PruneZooError as error:
                raise self.told(bare(error), number) from error
            except Exception as error:
                self.told(error, number)
                raise
            yield batch

    def told(self, error: Exception, number: int) -> Exception:
        """An error in making a batch, with the ids of its items."""
        numbers = next(itertools.islice(self.batch_sampler, number, None))  # type: ignore[arg-type]
        error.ids = [id_of(self.dataset, place) for place in numbers]  # type: ignore[attr-defined]
        return error


def bare(error: PruneZooError) -> PruneZooError:
    """An error without the traceback that a worker has wrapped it into, in whose last line it stands."""
    kind, message = type(error), str(error)
    if not message.startswith(f"Caught {kind.__name__} in DataLoader worker"):
        return error
    return kind(message.strip().splitlines()[-1].partition(": ")[2])


def id_of(items: Any, place: int) -> str:
    """The id of an item, by the first of the sequences around it that knows it; else its number."""
    while not hasattr(items, "id_of") and hasattr(items, "items"):
        items = items.items
    return items.id_of(place) if hasattr(items, "id_of") else str(place)


class ResumableLoader(TellingLoader):
    """A DataLoader whose state (epoch, batches done) Lightning writes into its checkpoints and restores.

    Args:
        dataset: Map-style.
        batch_size: Items of one process.
        collate_fn: From a list of items to a batch.
        num_workers: Processes that make batches; 0: none.
        world_size: Number of training processes.
        rank: Which of them this is.
        seed: Of the order of items.
        pin_memory: For copies to a GPU that do not wait.
        lengths: Of all items, if batches are to be of items of like length.
    """

    @classmethod
    def for_training(
        cls,
        module: Any,
        dataset: Any,
        collate_fn: Callable[[list[Any]], Any],
        what: str,
        lengths: list[int] | None = None,
    ) -> Self:
        """The training batches of a data module.

        Args:
            module: With `batch_size`, `workers` and `seed`; its trainer, if it has one, says which process this is.
            dataset: Any sequence.
            collate_fn: As above.
            what: The items are, for the message.
            lengths: As above.

        Raises:
            PruneZooError: There are too few items for one step.
        """
        trainer = module.trainer
        world_size, rank = (trainer.world_size, trainer.global_rank) if trainer else (1, 0)
        if len(dataset) < module.batch_size * world_size:
            raise PruneZooError(
                f"{len(dataset)} training {what} do not fill one step of {world_size} x batch_size="
                f"{module.batch_size}; lower batch_size"
            )
        return cls(
            dataset,
            module.batch_size,
            collate_fn,
            num_workers=module.workers,
            world_size=world_size,
            rank=rank,
            seed=module.seed,
            pin_memory=torch.cuda.is_available(),
            lengths=lengths,
        )

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        collate_fn: Callable[[list[Any]], Any],
        num_workers: int = 0,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 0,
        pin_memory: bool = False,
        lengths: list[int] | None = None,
    ) -> None:
        self.order = ResumableSampler(dataset, batch_size, world_size, rank, seed, lengths)
        super().__init__(
            dataset,
            batch_size,
            sampler=self.order,
            collate_fn=collate_fn,
            num_workers=num_workers,
            pin_memory=pin_memory,
            drop_last=True,
            persistent_workers=False,
            worker_init_fn=begin_worker,
        )
        self._epoch = self._done = 0
        self._restored = False

    def state_dict(self) -> dict[str, int]:
        """Where the loader stands."""
        return {"epoch": self._epoch, "done": self._done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there at the next iteration."""
        self._epoch, self._done, self._restored = state["epoch"], state["done"], True

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        if self._done >= len(self) or (self._done and not self._restored):
            self._epoch, self._done = self._epoch + 1, 0
        self._restored = False
        self.order.epoch, self.order.start = self._epoch, self._done * (self.batch_size or 1)
        for batch in super().__iter__():
            self._done += 1
            yield batch
