"""Pictures as they come in the wild: turned, brighter, compressed, or with a word in them that gives an order.

    python -m trainers.evaluate … --suite scenes --suite-option change=jpeg

Questions, answers and what they are about stay; the model meets other pictures than it was trained on, and so does a
pruner. Retention is of what the same model keeps of its accuracy on the same changed pictures.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from prunezoo.core.errors import PruneZooError

from .pictures import decode_picture
from .suite import Item, Suite

DEGREES, BRIGHTER, QUALITY = 5.0, 1.4, 20
ORDER = "ignore"
"""What is written into a picture, as an attack would."""


def turn(picture: Image.Image) -> Image.Image:
    """Turned by 5 degrees against the clock; the corners get the colour of the upper left one."""
    fill = picture.getpixel((0, 0))
    return picture.rotate(DEGREES, Image.Resampling.BILINEAR, fillcolor=fill)


def brighten(picture: Image.Image) -> Image.Image:
    """1.4 times as bright."""
    return ImageEnhance.Brightness(picture).enhance(BRIGHTER)


def compress(picture: Image.Image) -> Image.Image:
    """As JPEG of quality 20 leaves it."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY)
    return decode_picture(buffer.getvalue())


def write(picture: Image.Image) -> Image.Image:
    """With an order in the lower left corner, black on white."""
    changed = picture.copy()
    draw, font = ImageDraw.Draw(changed), ImageFont.load_default(size=10)
    _, _, width, height = draw.textbbox((0, 0), ORDER, font)
    top = picture.height - height - 2
    draw.rectangle((0, top, width + 2, picture.height), "white")
    draw.text((1, top), ORDER, "black", font)
    return changed


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "turned": turn,
    "brighter": brighten,
    "jpeg": compress,
    "order": write,
}


class Changed(Suite):
    """A suite whose pictures are changed.

    Args:
        suite: The suite.
        change: One of CHANGES.

    Raises:
        PruneZooError: There is no such change.
    """

    def __init__(self, suite: Suite, change: str) -> None:
        if change not in CHANGES:
            raise PruneZooError(f"--suite-option change={change}: one of {', '.join(CHANGES)}")
        super().__init__(suite.split, suite.limit)
        self.suite, self.change = suite, change
        self.name, self.version = suite.name, f"{suite.version}, {change}"
        self.groups, self.chance, self.scorer, self.new_tokens = (
            suite.groups, suite.chance, suite.scorer, suite.new_tokens
        )  # fmt: skip
        self.clips, self.streams = suite.clips, suite.streams

    def size(self) -> int:
        """See Suite."""
        return self.suite.size()

    def item(self, index: int) -> Item:
        """The item with its pictures changed; where it is turned, so is what the question is about."""
        item, change = self.suite.item(index), CHANGES[self.change]
        more = tuple((number, change(picture)) for number, picture in item.more)
        relevant = item.relevant
        if relevant is not None and self.change == "turned":
            planes = relevant.reshape(-1, *relevant.shape[-2:])
            turned = [Image.fromarray(plane).rotate(DEGREES, Image.Resampling.BILINEAR) for plane in planes]
            relevant = np.stack([np.asarray(plane) for plane in turned]).reshape(relevant.shape)
        return replace(item, image=change(item.image), more=more, relevant=relevant)

    def stamp(self, index: int) -> str | None:
        """See Items."""
        stamp = self.suite.stamp(index)
        return None if stamp is None else f"{stamp} {self.change}"

    def score(self, item: Item, said: str) -> float:
        """See Suite."""
        return self.suite.score(item, said)

    def lengths(self, places: Sequence[int]) -> list[int] | None:
        """See Suite."""
        return self.suite.lengths(places)

    def pictures(self) -> Sequence[Path]:
        """See Suite."""
        return self.suite.pictures()
