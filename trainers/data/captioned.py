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
        self.photographs, self.files = photographs, caption_files(photographs.paths)

    def __len__(self) -> int:
        return len(self.photographs)

    def __getitem__(self, index: int) -> Captioned:
        return self.photographs[index], read_caption(self.files[index])


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


def caption_files(pictures: Sequence[Path], images: Path | None = None, captions: Path | None = None) -> list[Path]:
    """Where the caption of each picture is: `NAME.txt` beside `NAME.jpg`, or at the same place in another folder.

    Args:
        pictures: Their paths.
        images: The folder that they are in, at any depth; only where ``captions`` is another one.
        captions: That folder; `captions/cats/1.txt` is the caption of `images/cats/1.jpg`.

    Raises:
        PruneZooError: A picture has no caption, or there is no such folder.
    """
    files = [path.with_suffix(".txt") for path in pictures]
    if images is not None and captions is not None:
        if not captions.is_dir():
            raise PruneZooError(f"{captions} is not a folder of captions: NAME.txt for each NAME.jpg of {images}")
        files = [captions / file.relative_to(images.resolve()) for file in files]
    missing = [picture for picture, file in zip(pictures, files, strict=True) if not file.is_file()]
    if missing:
        place = f" in {captions}" if captions else ""
        raise PruneZooError(
            f"{missing[0]}: {len(missing)} of {len(pictures)} pictures have no caption{place}: write each into a "
            "file of the picture's name that ends in .txt"
        )
    return files


def read_caption(path: Path) -> str:
    """What stands in a file of a caption; PruneZooError where it is no text or too long."""
    try:
        return read_bytes(path, MOST_CAPTION_BYTES).decode("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise PruneZooError(f"{path}: not a caption in UTF-8 ({error}); write it again") from None


def collate(items: Sequence[Captioned]) -> tuple[Tensor, list[str]]:
    """A batch."""
    return torch.stack([image for image, _ in items]), [caption for _, caption in items]
