"""Pictures of a suite without its questions: what a tokenizer is trained on that a model is to read through."""

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from prunezoo.core.errors import PruneZooError

from .loading import ResumableLoader, TellingLoader, begin_worker
from .photographs import centre_square, to_tensor
from .suite import Suite, load_suite


class SuitePictures(Dataset[Tensor]):
    """The first picture of each item of a suite, its centre square, ``(3, size, size)`` float32 in [0, 1].

    Args:
        suite: The suite.
        size: Side in pixels.
    """

    def __init__(self, suite: Suite, size: int) -> None:
        self.suite, self.size = suite, size

    def __len__(self) -> int:
        return len(self.suite)

    def __getitem__(self, index: int) -> Tensor:
        return to_tensor(centre_square(self.suite.item(index).image, self.size))


class SuitePictureDataModule(L.LightningDataModule):
    """Pictures of a suite's own splits, in the place of :class:`PhotographDataModule`.

    Args:
        suite: A registered suite.
        size: Side of the squares, pixels.
        batch_size: Pictures a step and process.
        workers: Processes that make them; 0: the training process does.
        train_items: Train on the pictures of the first so many items; None: all.
        validation_items: Validate on the pictures of the first so many items.
        seed: Of the order of the training pictures.
        suite_options: What the suite itself takes.

    Raises:
        PruneZooError: A number is too small, or there is no such suite.
    """

    def __init__(
        self,
        suite: str,
        size: int,
        batch_size: int = 16,
        workers: int = 1,
        train_items: int | None = None,
        validation_items: int = 256,
        seed: int = 0,
        suite_options: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (("size", size, 1), ("batch_size", batch_size, 1), ("workers", workers, 0)):
            if value < least:
                raise PruneZooError(f"{name} must be at least {least}, got {value}")
        self.batch_size, self.workers, self.seed = batch_size, workers, seed
        options = suite_options or {}
        self.train_set = SuitePictures(load_suite(suite, "train", train_items, **options), size)
        self.validation_set = SuitePictures(load_suite(suite, "validation", validation_items, **options), size)

    def train_dataloader(self) -> DataLoader:
        """Shuffled, endless over epochs, resumable in mid-epoch."""
        return ResumableLoader.for_training(self, self.train_set, torch.stack, "pictures")

    def val_dataloader(self) -> DataLoader:
        """In order."""
        return TellingLoader(
            self.validation_set, self.batch_size, num_workers=self.workers, worker_init_fn=begin_worker
        )
