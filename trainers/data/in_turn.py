"""Suites in turn: whole batches of one and then of the next, each for its own frozen model."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import lightning as L
from torch.utils.data import ConcatDataset, DataLoader

from prunezoo.core.errors import PruneZooError

from .loading import ResumableLoader
from .modules import SuiteDataModule
from .suite import Item

SUITE = "suite"
"""Key of the batch under which the name of its suite travels."""


class NamedSuite(SuiteDataModule):
    """A suite whose batches say its name."""

    def collate_of(self, items: Sequence[Item]) -> Callable[[Sequence[Item]], dict[str, Any]]:
        """See ItemDataModule."""
        return partial(named_batch, self.suite, super().collate_of(items))


def named_batch(
    suite: str, collate: Callable[[Sequence[Item]], dict[str, Any]], items: Sequence[Item]
) -> dict[str, Any]:
    """A batch of these items, with the name of their suite."""
    return {**collate(items), SUITE: suite}


class InTurn:
    """Batches of several loaders in turn, as many of each, resumable anywhere.

    An epoch gives every batch of the longest loader once; a shorter one begins its next epoch meanwhile. How many
    batches were given says everything: whose turn it is, and where each loader stands.

    Args:
        loaders: One or more, each with at least one batch.
    """

    def __init__(self, loaders: Sequence[ResumableLoader]) -> None:
        self.loaders = loaders
        self._given = 0

    def __len__(self) -> int:
        return len(self.loaders) * max(map(len, self.loaders))

    def __iter__(self) -> Iterator[Any]:
        streams = [self._stream(place) for place in range(len(self.loaders))]
        for _ in range(len(self)):
            batch = next(streams[self._given % len(streams)])
            self._given += 1
            yield batch

    def _stream(self, place: int) -> Iterator[Any]:
        """All that one loader gives from here on, epoch after epoch."""
        loader, turns = self.loaders[place], len(self.loaders)
        given = (self._given + turns - 1 - place) // turns  # by this loader
        loader.load_state_dict({"epoch": given // len(loader), "done": given % len(loader)})
        while True:
            yield from loader

    def state_dict(self) -> dict[str, int]:
        """How many batches were given."""
        return {"given": self._given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there at the next iteration."""
        self._given = state["given"]


class SuitesInTurn(L.LightningDataModule):
    """Training batches of several suites in turn; validation of each by itself.

    Args:
        vlm: The frozen model of each suite: folder or Hub id. `trainers.fit` fills it in from the model.
        suites: Names of the suites, in the order of their turns.
        common: See SuiteDataModule; the same for every suite.

    Raises:
        PruneZooError: No suite, one that is named twice, one without a model, or a model without a suite.
    """

    def __init__(self, vlm: dict[str, str], suites: list[str], **common: Any) -> None:
        super().__init__()
        check_pairs(vlm, suites)
        self.parts = {suite: NamedSuite(vlm=vlm[suite], suite=suite, **common) for suite in suites}

    def setup(self, stage: str | None = None) -> None:
        """Open each."""
        for part in self.parts.values():
            part.trainer = self.trainer
            part.setup(stage)

    @property
    def train_set(self) -> ConcatDataset:
        """The training items of all suites, one suite behind the other; known after `setup`."""
        return ConcatDataset([part.train_set for part in self.parts.values()])  # type: ignore[misc]

    @property
    def source(self) -> dict[str, Any]:
        """What the items are taken from, in the order of the turns."""
        return {"suites": [part.source for part in self.parts.values()]}

    def train_dataloader(self) -> InTurn:
        """In turn, each suite shuffled; resumable."""
        return InTurn([part.train_dataloader() for part in self.parts.values()])

    def val_dataloader(self) -> list[DataLoader]:
        """One loader a suite."""
        return [part.val_dataloader() for part in self.parts.values()]

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Take the ids out of a batch, as its own suite does."""
        part = self.parts[batch[SUITE]]
        batch = part.on_after_batch_transfer(batch, dataloader_idx)
        self.batch_ids = part.batch_ids
        return batch


def check_pairs(vlm: dict[str, str], suites: Sequence[str]) -> None:
    """Refuse suites and models that do not go together; see SuitesInTurn."""
    if not suites:
        raise PruneZooError("data.suites is empty: name one or more, as [scenes, pages]")
    twice = [suite for suite, count in Counter(suites).items() if count > 1]
    if twice:
        raise PruneZooError(f"data.suites names '{twice[0]}' twice: each suite has one turn, so name it once")
    for suite in suites:
        if suite not in vlm:
            raise PruneZooError(f"model.vlm names no model for suite '{suite}' of data.suites: add {suite}: FOLDER")
    for suite in vlm:
        if suite not in suites:
            raise PruneZooError(
                f"model.vlm names a model for suite '{suite}', which is not in data.suites: add it there, or leave "
                "the model out"
            )
