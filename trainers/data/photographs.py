"""Photographs without questions, from any folder: what a tokenizer is trained and measured on."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from prunezoo.core.errors import PruneZooError

from .loading import ResumableLoader, TellingLoader, begin_worker
from .pictures import BrokenImage, decode_picture, open_picture, read_picture
from .suite import SPLITS

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
SHARES = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}


class Photographs(Dataset[Tensor]):
    """The centre squares of some pictures, each ``(3, size, size)`` float32 in [0, 1].

    Args:
        paths: Of readable pictures.
        size: Side in pixels.
    """

    def __init__(self, paths: Sequence[Path], size: int) -> None:
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return to_tensor(self.picture(index))

    def picture(self, index: int) -> Image.Image:
        """The same as a picture."""
        path = self.paths[index]
        try:
            return centre_square(open_picture(path), self.size)
        except BrokenImage as error:
            raise BrokenImage(f"{path}: {error}; it was whole when this run began") from error


class PhotographDataModule(L.LightningDataModule):
    """All pictures under a folder, at any depth, split by the hash of their bytes: 80 % train, 10 % validation, 10 %
    test. So a picture that lies there twice is in one split, and a split does not change when others are added.

    Args:
        images: The folder.
        size: Side of the squares, pixels.
        batch_size: Pictures a step and process.
        workers: Processes that load; 0: the training process does.
        validation_items: At most so many pictures of the validation split are measured each time.
        seed: Of the order of the training pictures.
    """

    def __init__(
        self,
        images: str,
        size: int,
        batch_size: int = 16,
        workers: int = 1,
        validation_items: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (("size", size, 1), ("batch_size", batch_size, 1), ("workers", workers, 0)):
            if value < least:
                raise PruneZooError(f"{name} must be at least {least}, got {value}")
        self.images, self.size, self.batch_size, self.workers = images, size, batch_size, workers
        self.validation_items, self.seed = validation_items, seed

    def setup(self, stage: str | None = None) -> None:
        """Read every picture once."""
        self.train_set = Photographs(photographs(self.images, "train"), self.size)
        held_out = spread(photographs(self.images, "validation"), self.validation_items)
        self.validation_set = Photographs(held_out, self.size)

    def train_dataloader(self) -> DataLoader:
        """Shuffled, endless over epochs, resumable in mid-epoch."""
        return ResumableLoader.for_training(self, self.train_set, torch.stack, "pictures")

    def val_dataloader(self) -> DataLoader:
        """In order."""
        return TellingLoader(
            self.validation_set, self.batch_size, num_workers=self.workers, worker_init_fn=begin_worker
        )


def photographs(folder: str | Path, split: str) -> list[Path]:
    """The readable pictures under a folder that belong to a split, in the order of their paths.

    Raises:
        PruneZooError: No such folder, no such split, or no readable picture of the split in it.
    """
    if split not in SPLITS:
        raise PruneZooError(f"split '{split}' is not one of {', '.join(SPLITS)}")
    if not Path(folder).is_dir():
        raise PruneZooError(f"{folder} is not a folder of pictures")
    low, high = SHARES[split]
    found = [path for path, place in _scan(Path(folder).resolve()) if low <= place < high]
    if not found:
        raise PruneZooError(f"{folder}: no readable picture of the {split} split ({', '.join(sorted(SUFFIXES))})")
    return found


def spread(paths: Sequence[Path], limit: int) -> list[Path]:
    """At most ``limit`` of them, evenly over their order, so that no folder is left out."""
    count = min(limit, len(paths))
    return [paths[i * len(paths) // count] for i in range(count)]


@lru_cache(maxsize=4)
def _scan(folder: Path) -> list[tuple[Path, float]]:
    """Every readable picture and its place in [0, 1) by the hash of its bytes; the others are counted and left out."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        places = list(pool.map(_place, paths))
    broken = [str(path.relative_to(folder)) for path, place in zip(paths, places, strict=True) if place is None]
    if broken:
        shown = ", ".join(broken[:5]) + (", …" if len(broken) > 5 else "")
        rank_zero_info(f"{folder}: {len(broken)} of {len(paths)} pictures cannot be read and are left out: {shown}")
    return [(path, place) for path, place in zip(paths, places, strict=True) if place is not None]


def _place(path: Path) -> float | None:
    """Where a picture falls in [0, 1); None if it cannot be read to its end."""
    try:
        content = read_picture(path)
        decode_picture(content)
    except BrokenImage:
        return None
    return int.from_bytes(hashlib.sha256(content).digest()[:6]) / 2**48


def centre_square(image: Image.Image, size: int) -> Image.Image:
    """The largest square in the middle of a picture, resized to ``size`` pixels a side."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return image.crop(box) if side == size else image.resize((size, size), Image.Resampling.BICUBIC, box)


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as ``(3, height, width)`` float32 in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
