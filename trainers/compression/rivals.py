"""JPEG and WebP, by Pillow, at their best within so many bytes."""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from trainers.data.pictures import decode_picture

RIVALS = {
    "jpeg": {"format": "JPEG", "optimize": True},
    "webp": {"format": "WEBP", "method": 6},
}
QUALITIES = (1, 3, 5, 8, 12, 18, 25, 35, 50, 65, 80, 90)
SHRINK = (1, 2, 4, 8)  # a picture may be coded smaller by this factor and enlarged again: better at few bytes


@dataclass(frozen=True)
class Coded:
    """A picture out of a file."""

    size: int  # bytes of the whole file
    picture: Image.Image
    psnr: float


def attempts(rival: str, image: Image.Image) -> list[Coded]:
    """The picture coded at every quality and every shrinking."""
    true = np.asarray(image, np.float64)
    found = []
    for factor in SHRINK:
        size = (max(image.width // factor, 1), max(image.height // factor, 1))
        small = image if factor == 1 else image.resize(size, Image.Resampling.LANCZOS)
        for quality in QUALITIES:
            file = io.BytesIO()
            small.save(file, quality=quality, **RIVALS[rival])  # type: ignore[arg-type]
            picture = decode_picture(file.getvalue()).resize(image.size, Image.Resampling.BICUBIC)
            error = np.square(np.asarray(picture, np.float64) - true).mean() / 255**2
            found.append(Coded(len(file.getvalue()), picture, -10 * np.log10(max(error, 1e-10))))
    return found


def best_within(found: Sequence[Coded], size: int) -> Coded | None:
    """The attempt of the highest PSNR that has no more than ``size`` bytes; None if all have more."""
    return max((coded for coded in found if coded.size <= size), key=lambda coded: coded.psnr, default=None)
