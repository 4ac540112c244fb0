"""Photographs with a caption each: `NAME.txt` beside `NAME.jpg`, the layout that img2dataset and others write."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from prunezoo.core.bounds import read_bytes
from prunezoo.core.errors import PruneZooError

from .loading import ResumableLoader, TellingLoader, begin_worker
from .photographs import PhotographDataModule, Photographs

MOST_CAPTION_BYTES = 1 << 16
Captioned = tuple[Tensor, str]


class CaptionedPhotographs(Dataset[Captioned]):
    """Pictures ``(3, size, size)`` float32 in [0, 1], each with its caption.

    Args:
        photographs: The pictures.

    Raises:
        PruneZooError: A picture has no caption beside it.
    """

    def __init__(self, photographs: Photographs) -> None:
        self.photographs = photographs
        missing = [path for path in photographs.paths if not path.with_suffix(".txt").is_file()]
        if missing:
            raise PruneZooError(
                f"{missing[0]}: {len(missing)} of {len(photographs)} pictures have no caption: write each into a "
                "file of the picture's name that ends in .txt"
            )

    def __len__(self) -> int:
        return len(self.photographs)

    def __getitem__(self, index: int) -> Captioned:
        return self.photographs[index], read_caption(self.photographs.paths[index])


class CaptionedDataModule(PhotographDataModule):
    """See :class:`PhotographDataModule`; batches are ``(B, 3, size, size)`` and B captions."""

    def setup(self, stage: str | None = None) -> None:
        """Read every picture once, and find its caption."""
        super().setup(stage)
        self.captioned_train = CaptionedPhotographs(self.train_set)
        self.captioned_validation = CaptionedPhotographs(self.validation_set)

    def train_dataloader(self) -> DataLoader:
        """Shuffled, endless over epochs, resumable in mid-epoch."""
        return ResumableLoader.for_training(self, self.captioned_train, collate, "pictures")

    def val_dataloader(self) -> DataLoader:
        """In order."""
        return TellingLoader(
            self.captioned_validation,
            self.batch_size,
            num_workers=self.workers,
            worker_init_fn=begin_worker,
            collate_fn=collate,
        )


def read_caption(picture: Path) -> str:
    """What stands in the file beside a picture; PruneZooError where it is no text or too long."""
    path = picture.with_suffix(".txt")
    try:
        return read_bytes(path, MOST_CAPTION_BYTES).decode("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise PruneZooError(f"{path}: not a caption in UTF-8 ({error}); write it again") from None


def collate(items: Sequence[Captioned]) -> tuple[Tensor, list[str]]:
    """A batch."""
    return torch.stack([image for image, _ in items]), [caption for _, caption in items]
