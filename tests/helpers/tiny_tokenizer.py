"""A One-D-Piece that is made in a moment, and pictures for it."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from prunezoo import OneDPiece

TINY: dict = {"image_size": 32, "patch": 8, "tokens": 24, "width": 32, "heads": 2}
TINY |= {"encoder_layers": 1, "decoder_layers": 1, "codes": 64, "code_width": 4, "head": "pixels"}


def tiny(seed: int = 0, **overrides) -> OneDPiece:
    torch.manual_seed(seed)
    return OneDPiece(**{**TINY, **overrides}).eval()


def picture(seed: int, width: int = 32, height: int = 32) -> Image.Image:
    grid = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)


def pictures() -> torch.Tensor:
    """``(3, 3, 32, 32)`` in [0, 1]."""
    return torch.stack([torch.from_numpy(np.array(picture(i))).permute(2, 0, 1) / 255 for i in range(3)])


def save_photographs(folder: Path) -> Path:
    """Sixty pictures in three folders."""
    for number in range(60):
        (folder / str(number % 3)).mkdir(parents=True, exist_ok=True)
        picture(number, 48, 40).save(folder / str(number % 3) / f"{number}.png")
    return folder
