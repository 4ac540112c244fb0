"""Data modules: where `python -m trainers.fit` gets its questions about pictures."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import AutoProcessor

from modules.core.errors import PruneZooError

from .conversation import ConversationCollator
from .llava_json import LlavaJson
from .loading import ResumableLoader, begin_worker
from .suite import Item, load_suite

GROUPS = "groups"
"""Key of the batch under which the group names of its items travel."""
IDS = "ids"
"""Key of the batch under which their ids travel."""


class ItemDataModule(L.LightningDataModule, ABC):
    """Turns items into batches; a subclass says which items.

    Args:
        vlm: Folder or Hub id whose processor reads the pictures and words. `trainers.fit` fills it in from the model.
        batch_size: Items a step and process.
        workers: Processes that make batches; 0: the training process does.
        max_length: Longest sequence in tokens; see ConversationCollator.
        seed: Of the order of the training items.
    """

    def __init__(
        self, vlm: str, batch_size: int = 32, workers: int = 1, max_length: int | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise PruneZooError(f"batch_size must be at least 1, got {batch_size}")
        if workers < 0:
            raise PruneZooError(f"workers must be at least 0, got {workers}")
        self.vlm, self.batch_size, self.workers, self.max_length, self.seed = vlm, batch_size, workers, max_length, seed
        self.train_set: Sequence[Item] | None = None
        self.validation_set: Sequence[Item] | None = None

    @abstractmethod
    def items(self, split: str) -> Sequence[Item]:
        """The items of `train` or `validation`."""

    @property
    @abstractmethod
    def source(self) -> dict[str, Any]:
        """What the items are taken from, as JSON values."""

    @property
    @abstractmethod
    def groups(self) -> tuple[str, ...]:
        """Groups that validation reports apart; known after `setup`."""

    def make_cache(self, vlm: Any) -> None:
        """Compute ahead what training reads from disk; only some data modules have such a thing.

        Args:
            vlm: The frozen model.
        """
        raise PruneZooError(f"{type(self).__name__} keeps no cache: there is nothing to make before training")

    def setup(self, stage: str | None = None) -> None:
        """Open processor and data, and check them."""
        if self.train_set is None:
            try:
                processor = AutoProcessor.from_pretrained(self.vlm)
            except (OSError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise PruneZooError(f"no processor in '{self.vlm}' ({reason}); give a folder or Hub id") from error
            self.collate = GroupedCollator(processor, max_length=self.max_length)
            self.train_set, self.validation_set = self.items("train"), self.items("validation")

    def train_dataloader(self) -> DataLoader:
        """Shuffled, endless over epochs, resumable in mid-epoch."""
        assert self.train_set is not None
        world_size, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        if len(self.train_set) < self.batch_size * world_size:
            raise PruneZooError(
                f"{len(self.train_set)} training items do not fill one step of {world_size} x batch_size="
                f"{self.batch_size}; lower batch_size"
            )
        return ResumableLoader(
            self.train_set,  # type: ignore[arg-type]  # any sequence is a map-style data set
            self.batch_size,
            self.collate,
            num_workers=self.workers,
            world_size=world_size,
            rank=rank,
            seed=self.seed,
            pin_memory=torch.cuda.is_available(),
        )

    def val_dataloader(self) -> DataLoader:
        """In order."""
        assert self.validation_set is not None
        return DataLoader(
            self.validation_set,  # type: ignore[arg-type]
            self.batch_size,
            collate_fn=self.collate,
            num_workers=self.workers,
            worker_init_fn=begin_worker,
        )


class SuiteDataModule(ItemDataModule):
    """Any registered suite, its pictures made by the workers.

    Args:
        suite: Name of the suite.
        validation_items: Number of items of the validation split that are measured each time.
        train_items: Only the first so many items of the training split; None: all.
        options: What the suite itself takes.
        common: See ItemDataModule.
    """

    def __init__(
        self,
        vlm: str,
        suite: str = "scenes",
        batch_size: int = 32,
        workers: int = 1,
        validation_items: int = 512,
        train_items: int | None = None,
        max_length: int | None = None,
        seed: int = 0,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(vlm, batch_size, workers, max_length, seed)
        self.suite, self.options = suite, options or {}
        self.limits = {"train": train_items, "validation": validation_items}

    def items(self, split: str) -> Sequence[Item]:
        """Items of the suite's own split."""
        return load_suite(self.suite, split=split, limit=self.limits[split], **self.options)

    @property
    def source(self) -> dict[str, Any]:
        """The suite's name and options."""
        return {"suite": self.suite, "options": self.options}

    @property
    def groups(self) -> tuple[str, ...]:
        """The suite's groups."""
        return self.validation_set.groups  # type: ignore[union-attr]


class LlavaJsonDataModule(ItemDataModule):
    """LLaVA-format JSON and a folder of images, such as LLaVA-1.5's own 665 K instructions.

    Args:
        json: The JSON file.
        images: Folder that its image paths are relative to.
        validation_share: Share of the pictures in (0, 1) held out; none of them is trained on.
        validation_items: At most so many held-out items are measured each time.
        train_items: Only the first so many items to train on; None: all.
        common: See ItemDataModule.
    """

    def __init__(
        self,
        vlm: str,
        json: Path,
        images: Path,
        batch_size: int = 8,
        workers: int = 4,
        validation_share: float = 0.01,
        validation_items: int = 512,
        train_items: int | None = None,
        max_length: int | None = 2048,
        seed: int = 0,
    ) -> None:
        super().__init__(vlm, batch_size, workers, max_length, seed)
        self.json, self.images, self.validation_share = json, images, validation_share
        self.limits = {"train": train_items, "validation": validation_items}
        self._everything: LlavaJson | None = None

    def items(self, split: str) -> Sequence[Item]:
        """Training or held-out items."""
        if self._everything is None:
            self._everything = LlavaJson(self.json, self.images)
        return self._everything.part(split, self.validation_share, self.limits[split])

    @property
    def source(self) -> dict[str, Any]:
        """The file's name, and how it is split."""
        return {"json": self.json.name, "validation_share": self.validation_share}

    @property
    def groups(self) -> tuple[str, ...]:
        """One group: such files know no others."""
        return ("all",)


class GroupedCollator(ConversationCollator):
    """A ConversationCollator that also hands on the items' groups and ids."""

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        """Processor output, labels, groups and ids."""
        return {**super().__call__(items), GROUPS: [item.group for item in items], IDS: [item.id for item in items]}
