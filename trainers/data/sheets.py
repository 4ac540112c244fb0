"""Sheets, printed pages drawn by code with the word which cells are printed on: what a patch classifier is trained on.

A sheet has blocks of lines in matplotlib's DejaVu fonts, of sizes as in scanned and drawn documents, rules, bars and
boxes, on paper of one colour, of a soft gradient or with a photograph's noise; some are blurred or went through JPEG.
Splits share no face and no sheet.
"""

import io
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import lightning as L
import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from prunezoo.core.errors import PruneZooError

from .loading import ResumableLoader, begin_worker
from .pages_render import FACES
from .pictures import decode_picture

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;-()%$/"
SIZES = (9, 40)
"""Of type, in pixels, as the model sees it."""
SEEDS = {"train": 101, "validation": 211, "test": 307}
LEAST_INK = 2.0
"""Pixels' worth of ink from which a cell counts as printed on."""


@dataclass(frozen=True)
class Sheet:
    """A drawn page.

    Attributes:
        picture: ``(side, side, 3)`` uint8.
        ink: ``(side, side)`` float32 in [0, 1]: how much of each pixel is printed on.
    """

    picture: np.ndarray
    ink: np.ndarray


@cache
def _font(face: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"DejaVu{face}.ttf", size)


def draw_sheet(rng: np.random.Generator, split: str, side: int) -> Sheet:
    """Draw one.

    Args:
        rng: Says everything about it.
        split: Whose faces it uses.
        side: In pixels.
    """
    mask = Image.new("L", (side, side))
    draw = ImageDraw.Draw(mask)
    for _ in range(int(rng.integers(1, 5))):
        _block(draw, rng, split, side)
    for _ in range(int(rng.integers(0, 4))):
        x, y, long = (int(n) for n in rng.integers(0, side, 3))
        thick = int(rng.integers(1, 4))
        draw.rectangle((x, y, x + long, y + thick - 1) if rng.random() < 0.7 else (x, y, x + thick - 1, y + long), 255)
    for _ in range(int(rng.integers(0, 3))):
        x, y = (int(n) for n in rng.integers(0, side, 2))
        wide, high = (int(n) for n in rng.integers(6, side // 4, 2))
        draw.rectangle((x, y, x + wide, y + high), 255 if rng.random() < 0.5 else None, 255, int(rng.integers(1, 3)))
    ink = np.asarray(mask, np.float32) / 255
    return Sheet(_printed(ink, rng), ink)


def _block(draw: ImageDraw.ImageDraw, rng: np.random.Generator, split: str, side: int) -> None:
    """Some lines of random words from a random place on."""
    faces = FACES[split]
    font = _font(faces[int(rng.integers(len(faces)))], int(rng.integers(*SIZES)))
    left, top = int(rng.integers(side * 3 // 4)), int(rng.integers(side * 3 // 4))
    pitch = int(font.size * rng.uniform(1.1, 2.0))
    right = int(rng.integers(left + side // 8, side + 1))
    for line in range(int(rng.integers(1, 9))):
        words = ["".join(rng.choice(list(LETTERS), int(rng.integers(1, 9)))) for _ in range(24)]
        text = " ".join(words[: int(rng.integers(1, 24))])
        while text and font.getlength(text) > right - left:
            text = text[: int(len(text) * 0.8)]
        draw.text((left, top + line * pitch), text, font=font, fill=255)


def _printed(ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The picture of a sheet with that ink."""
    side = len(ink)
    dark = rng.random() < 0.15
    low, high = rng.uniform(0, 90, 3), rng.uniform(190, 256, 3)
    paper, color = (low, high) if dark else (high, low)
    slope = rng.uniform(-15, 15, (2, 1)) * np.linspace(0, 1, side) * (rng.random() < 0.5)
    ground = paper + (slope[0][:, None] + slope[1][None])[..., None]
    canvas = ground + ink[..., None] * (color - ground)
    if rng.random() < 0.5:
        canvas = canvas + rng.normal(0, rng.uniform(0, 8), canvas.shape)
    picture = Image.fromarray(canvas.clip(0, 255).astype(np.uint8))
    if rng.random() < 0.2:
        picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.2)))
    if rng.random() < 0.5:
        written = io.BytesIO()
        picture.save(written, "JPEG", quality=int(rng.integers(50, 96)))
        picture = decode_picture(written.getvalue())
    return np.asarray(picture)


def cells_of(sheet: Sheet, cell: int) -> tuple[Tensor, Tensor]:
    """What a pruner of the input stage sees of a sheet, and what is printed on.

    Args:
        sheet: Its side is a multiple of ``cell``.
        cell: Pixels along a cell.

    Returns:
        ``(rows, columns, 3 * cell * cell)`` pixels, channels first, normalised as Qwen-VL and CLIP do; and
        ``(rows, columns)`` bool.
    """
    mean, std = torch.tensor(OPENAI_CLIP_MEAN), torch.tensor(OPENAI_CLIP_STD)
    values = (torch.tensor(sheet.picture).float() / 255 - mean) / std
    pixels = values.unfold(0, cell, cell).unfold(1, cell, cell).flatten(2)  # (rows, columns, 3 * cell * cell)
    ink = torch.tensor(sheet.ink).unfold(0, cell, cell).unfold(1, cell, cell).sum((2, 3))
    return pixels, ink >= LEAST_INK


class Sheets(Dataset[tuple[Tensor, Tensor]]):
    """Sheet i is a matter of its number, the split and the sizes alone.

    Args:
        split: train, validation or test.
        number: How many there are.
        cell: Pixels along a cell.
        grid: Cells along a sheet.
    """

    def __init__(self, split: str, number: int, cell: int, grid: int) -> None:
        self.split, self.number, self.cell, self.grid = split, number, cell, grid

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng((SEEDS[self.split], index))
        return cells_of(draw_sheet(rng, self.split, self.cell * self.grid), self.cell)


class SheetDataModule(L.LightningDataModule):
    """Sheets without end for training, the same few for each validation.

    Args:
        cell: Pixels along a cell: the pruner's `side`.
        grid: Cells along a sheet.
        batch_size: Sheets a step and process.
        workers: Processes that draw; 0: the training process does.
        items: Sheets of an epoch.
        validation_items: Sheets of a validation.
        seed: Of the order of the training sheets.
    """

    def __init__(
        self,
        cell: int = 28,
        grid: int = 16,
        batch_size: int = 8,
        workers: int = 1,
        items: int = 100_000,
        validation_items: int = 64,
        seed: int = 0,
    ) -> None:
        super().__init__()
        sizes = {"cell": cell, "grid": grid, "batch_size": batch_size, "validation_items": validation_items}
        for name, value in sizes.items():
            if value < 1:
                raise PruneZooError(f"{name} must be at least 1, got {value}")
        if items < batch_size or workers < 0:
            raise PruneZooError(f"items={items} must fill a batch of {batch_size}, and workers={workers} be at least 0")
        self.cell, self.batch_size, self.workers, self.seed = cell, batch_size, workers, seed
        self.source = {"cell": cell, "grid": grid}  # for a run that goes on: whether the data are the same
        self.train_set = Sheets("train", items, cell, grid)
        self.validation_set = Sheets("validation", validation_items, cell, grid)

    def train_dataloader(self) -> DataLoader:
        """Shuffled, resumable in mid-epoch."""
        return ResumableLoader.for_training(self, self.train_set, stacked, "sheets")

    def val_dataloader(self) -> DataLoader:
        """In order."""
        return DataLoader(
            self.validation_set,
            self.batch_size,
            num_workers=self.workers,
            collate_fn=stacked,
            worker_init_fn=begin_worker,
        )


def stacked(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Sheets of one size as a batch."""
    pixels, printed = zip(*items, strict=True)
    return torch.stack(pixels), torch.stack(printed)
