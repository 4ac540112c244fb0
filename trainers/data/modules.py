"""Data modules: where `python -m trainers.fit` gets its questions about pictures."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from prunezoo.core.errors import PruneZooError
from prunezoo.host.parts.loading import load_processor

from .broken import SkipBroken, SkipRefused, skip_broken
from .conversation import ConversationCollator
from .hub_dataset import HubDataset
from .llava_json import LlavaJson
from .loading import ResumableLoader, TellingLoader, begin_worker
from .selection.chosen import Chosen, ChosenItems
from .suite import Item, load_suite
from .talks import Talks
from .web_shards import WebShards

log = logging.getLogger("prunezoo.data")

GROUPS = "groups"
"""Key of the batch under which the group names of its items travel."""
IDS = "ids"
"""Key of the batch under which their ids travel."""
TEACHER = "teacher"
"""Key of the batch under which the frozen model's cached answers travel, if there are any."""
EARNED = "earned"
"""Key of the batch under which what each budget earns travels, if there is any."""


class ItemDataModule(L.LightningDataModule, ABC):
    """Turns items into batches; a subclass says which items.

    Args:
        vlm: Folder or Hub id whose processor reads the pictures and words. `trainers.fit` fills it in from the model.
        batch_size: Items a step and process.
        workers: Processes that make batches; 0: the training process does.
        max_length: Longest sequence in tokens; see ConversationCollator.
        seed: Of the order of the training items.
        only: List of training items by `python -m trainers.select`, to be trained on alone; None: all.
    """

    def __init__(
        self,
        vlm: str,
        batch_size: int = 32,
        workers: int = 1,
        max_length: int | None = None,
        seed: int = 0,
        only: Path | None = None,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise PruneZooError(f"batch_size must be at least 1, got {batch_size}")
        if workers < 0:
            raise PruneZooError(f"workers must be at least 0, got {workers}")
        self.vlm, self.batch_size, self.workers, self.max_length, self.seed = vlm, batch_size, workers, max_length, seed
        self.only = only
        self.train_set: Sequence[Item] | None = None
        self.validation_set: Sequence[Item] | None = None

    @abstractmethod
    def items(self, split: str) -> Sequence[Item]:
        """The items of `train` or `validation`."""

    def lengths(self) -> list[int] | None:
        """Of the training items, if batches are to be of items of like length; known after `setup`."""
        return None

    @property
    @abstractmethod
    def source(self) -> dict[str, Any]:
        """What the items are taken from, as JSON values."""

    def chosen(self, total: int) -> Chosen | None:
        """Which of the training items are trained on; None: all.

        Args:
            total: How many there are.

        Raises:
            PruneZooError: `only` cannot be read, or was chosen from something else.
        """
        if self.only is None:
            return None
        chosen = Chosen.read(self.only)
        chosen.check(self.only, self.source, total)
        return chosen

    @property
    @abstractmethod
    def groups(self) -> tuple[str, ...]:
        """Groups that validation reports apart; known after `setup`."""

    @cached_property
    def collate(self) -> "GroupedCollator":
        """From items to a batch, by the model's own processor."""
        try:
            processor = load_processor(self.vlm)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise PruneZooError(f"no processor in '{self.vlm}' ({reason}); give a folder or Hub id") from error
        return GroupedCollator(processor, max_length=self.max_length)

    def setup(self, stage: str | None = None) -> None:
        """Open processor and data, and check them."""
        if self.train_set is None:
            self.train_set, self.validation_set = self.items("train"), self.items("validation")
            self.train_collate = self.collate_of(self.train_set)

    def collate_of(self, items: Sequence[Item]) -> Callable[[Sequence[Item]], dict[str, Any]]:
        """What makes batches of these items."""
        return SkipRefused(self.collate, items) if isinstance(items, SkipBroken) else self.collate

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled, endless over epochs, resumable in mid-epoch."""
        assert self.train_set is not None
        return ResumableLoader.for_training(self, self.train_set, self.train_collate, "items", self.lengths())

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Take the ids out of a batch: no step needs them, but whoever must say which batch it was."""
        self.batch_ids: list[str] = batch.pop(IDS, [])
        return batch

    def val_dataloader(self) -> DataLoader:
        """In order."""
        assert self.validation_set is not None
        return TellingLoader(
            self.validation_set,  # type: ignore[arg-type]
            self.batch_size,
            collate_fn=self.collate_of(self.validation_set),
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
        only: Path | None = None,
    ) -> None:
        super().__init__(vlm, batch_size, workers, max_length, seed, only)
        self.suite, self.options = suite, options or {}
        self.limits = {"train": train_items, "validation": validation_items}

    def items(self, split: str) -> Sequence[Item]:
        """Items of the suite's own split."""
        items = load_suite(self.suite, split=split, limit=self.limits[split], **self.options)
        chosen = self.chosen(len(items)) if split == "train" else None
        return items if chosen is None else ChosenItems(items, chosen, str(self.only))

    @property
    def source(self) -> dict[str, Any]:
        """The suite's name and options."""
        return {"suite": self.suite, "options": self.options}

    @property
    def groups(self) -> tuple[str, ...]:
        """The suite's groups."""
        return self.validation_set.groups  # type: ignore[union-attr]


class TalksDataModule(ItemDataModule):
    """Conversations about pictures; a subclass says where they are.

    Args:
        validation_share: Share of the pictures in (0, 1) held out, at least one; none of them is trained on.
        validation_items: At most so many held-out items are measured each time.
        train_items: Only the first so many items to train on; None: all.
        broken_share: Share of all items in [0, 1) whose pictures may be broken, or refused by the processor: they are
            logged and left out. One beyond it is an error.
        group_by_length: Batches of items whose texts are of about the same length, so that less of them is padding.
        common: See ItemDataModule.
    """

    def __init__(
        self,
        vlm: str,
        batch_size: int = 8,
        workers: int = 4,
        validation_share: float = 0.01,
        validation_items: int = 512,
        train_items: int | None = None,
        broken_share: float = 0.0,
        group_by_length: bool = False,
        max_length: int | None = 2048,
        seed: int = 0,
        only: Path | None = None,
    ) -> None:
        super().__init__(vlm, batch_size, workers, max_length, seed, only)
        self.validation_share, self.broken_share, self.group_by_length = validation_share, broken_share, group_by_length
        self.limits = {"train": train_items, "validation": validation_items}
        self._splits: dict[str, SkipBroken] = {}

    @abstractmethod
    def open(self) -> Talks:
        """All that there is."""

    def splits(self) -> dict[str, Talks]:
        """The items of `train` and `validation`."""
        everything = self.open()
        return {split: everything.part(split, self.validation_share, limit) for split, limit in self.limits.items()}

    def items(self, split: str) -> Sequence[Item]:
        """Training or held-out items."""
        if not self._splits:
            splits = self.splits()
            if chosen := self.chosen(len(splits["train"])):
                splits["train"] = splits["train"].pick(chosen.numbers)
                chosen.check_ids(str(self.only), map(splits["train"].id_of, range(len(chosen.numbers))))
            self._splits = skip_broken(splits, self.broken_share, self.collate)
        return self._splits[split]

    def lengths(self) -> list[int] | None:
        """Of the training items' texts, where they make the batches."""
        return self.train_set.lengths() if self.group_by_length else None  # type: ignore[union-attr]

    @property
    def groups(self) -> tuple[str, ...]:
        """One group: such data know no others."""
        return ("all",)


class LlavaJsonDataModule(TalksDataModule):
    """LLaVA-format JSON or JSON lines and a folder of images, such as LLaVA-1.5's own 665 K instructions.

    Args:
        json: The JSON file; with the ending `.jsonl`, an entry a line.
        images: Folder that its image paths are relative to.
        validation_json: Another such file, of the same folder, whose items are the held-out ones; then all of `json`
            is trained on, and `validation_share` is not asked.
        common: See TalksDataModule.
    """

    def __init__(self, vlm: str, json: Path, images: Path, validation_json: Path | None = None, **common: Any) -> None:
        super().__init__(vlm, **common)
        self.json, self.images, self.validation_json = json, images, validation_json

    def open(self) -> Talks:
        """The file."""
        return LlavaJson(self.json, self.images)

    def splits(self) -> dict[str, Talks]:
        """See TalksDataModule."""
        if self.validation_json is None:
            return super().splits()
        found = {"train": self.open(), "validation": LlavaJson(self.validation_json, self.images)}
        train, held_out = ({entry.picture for entry in items.entries} for items in found.values())
        if both := train & held_out:
            log.warning("%s: %d of its pictures are trained on as well", self.validation_json, len(both))
        return {split: items.first(self.limits[split]) for split, items in found.items()}

    @property
    def source(self) -> dict[str, Any]:
        """The file's name, and how it is split."""
        if self.validation_json:
            return {"json": self.json.name, "validation_json": self.validation_json.name}
        return {"json": self.json.name, "validation_share": self.validation_share}


class HubDataModule(TalksDataModule):
    """A Hugging Face data set, from the Hub or a disk.

    Args:
        dataset: Hub id, folder of `save_to_disk`, or a parquet, arrow or JSON-lines file.
        split: Which of its splits; the held-out items are of the same one.
        configuration: Which of its configurations.
        columns: Other names of the columns `image`, `conversations`, `question`, `answer`.
        common: See TalksDataModule.
    """

    def __init__(
        self,
        vlm: str,
        dataset: str,
        split: str = "train",
        configuration: str | None = None,
        columns: dict[str, str] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(vlm, **common)
        self.dataset, self.split, self.configuration, self.columns = dataset, split, configuration, columns

    def open(self) -> Talks:
        """The data set."""
        return HubDataset(self.dataset, self.split, self.configuration, self.columns)

    @property
    def source(self) -> dict[str, Any]:
        """Its name, and how it is split."""
        named = {"dataset": self.dataset, "configuration": self.configuration, "of": self.split}
        return {**named, "validation_share": self.validation_share}


class WebShardsDataModule(TalksDataModule):
    """WebDataset shards, local or in object storage.

    Args:
        shards: Path or URL of the shards, with `*` or braces, as `s3://bucket/train-{00000..00099}.tar`.
        index: Folder for what was found in each shard; null: they are looked through at every start.
        common: See TalksDataModule.
    """

    def __init__(self, vlm: str, shards: str, index: Path | None = None, **common: Any) -> None:
        super().__init__(vlm, **common)
        self.shards, self.index = shards, index

    def open(self) -> Talks:
        """The shards."""
        return WebShards(self.shards, self.index)

    @property
    def source(self) -> dict[str, Any]:
        """Their name, and how they are split."""
        return {"shards": self.shards, "validation_share": self.validation_share}


class GroupedCollator(ConversationCollator):
    """A ConversationCollator that also hands on the items' groups and ids."""

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        """Processor output, labels, groups and ids."""
        return {**super().__call__(items), GROUPS: [item.group for item in items], IDS: [item.id for item in items]}
