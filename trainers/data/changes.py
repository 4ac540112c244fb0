"""Pictures as they come in the wild: turned, brighter, compressed, or with a word in them that gives an order; or as a
tokenizer paints them again, all of its row or so many tokens of it.

    python -m trainers.evaluate … --suite scenes --suite-option change=jpeg
    python -m trainers.evaluate … --suite scenes --suite-option change=tokenizer:one-d-piece-tiny@64

Questions, answers and what they are about stay; the model meets other pictures than it was trained on, and so does a
pruner. Retention is of what the same model keeps of its accuracy on the same changed pictures.
"""

import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from prunezoo.core.errors import PruneZooError
from prunezoo.tokenizers.base import Tokenizer, load_tokenizer
from trainers.cli.names import find_pruner

from .pictures import decode_picture
from .suite import Item, Suite

DEGREES, BRIGHTER, QUALITY = 5.0, 1.4, 20
ORDER = "ignore"
"""What is written into a picture, as an attack would."""
PAINTED = "tokenizer:"
"""In front of a tokenizer's folder, Hub id or short name; `@64` behind it: by its first 64 tokens."""
Change = Callable[[Image.Image], Image.Image]


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


CHANGES: dict[str, Change] = {
    "turned": turn,
    "brighter": brighten,
    "jpeg": compress,
    "order": write,
}


def find_change(name: str) -> tuple[str, Change]:
    """A change by its name.

    Args:
        name: One of CHANGES, or `tokenizer:FOLDER` with `@LENGTH` behind it for a prefix of the row.

    Returns:
        What a record calls it, another one where it changes pictures otherwise; and the change.

    Raises:
        PruneZooError: There is no such change; no such tokenizer, or it reads a text; its row is shorter.
    """
    said = f"--suite-option change={name}"
    if not name.startswith(PAINTED):
        if name not in CHANGES:
            raise PruneZooError(f"{said}: one of {', '.join(CHANGES)}, {PAINTED}FOLDER, {PAINTED}FOLDER@LENGTH")
        return name, CHANGES[name]
    source, mark, length = name.removeprefix(PAINTED).rpartition("@")
    if not mark:
        source, length = length, ""
    elif not (length.isdecimal() and len(length) < 10):
        raise PruneZooError(f"{said}: behind the last @ stands how many tokens, a whole number")
    if not source:
        raise PruneZooError(f"{said}: name a tokenizer's folder or Hub id behind '{PAINTED}'")
    tokenizer = load_tokenizer(find_pruner(source)).float()
    if tokenizer.reads_text:
        raise PruneZooError(
            f"{said}: tokenizer '{tokenizer.name}' reads a text beside each picture, which a suite has not; "
            "take another, or one trained without (text: none)"
        )
    try:
        tokens = tokenizer.check_length(int(length) if mark else tokenizer.config.tokens)
    except PruneZooError as error:
        raise PruneZooError(f"{said}: {error}") from None
    label = f"{PAINTED}{Path(source).name}@{tokens} {digest_of(tokenizer)[:12]}"
    return label, partial(tokenizer.repaint, length=tokens)


def digest_of(tokenizer: Tokenizer) -> str:
    """SHA-256 of a tokenizer's weights as they are held, wherever they came from."""
    digest = hashlib.sha256()
    for key, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(key.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


class Changed(Suite):
    """A suite whose pictures are changed.

    Args:
        suite: The suite.
        change: See :func:`find_change`.

    Raises:
        PruneZooError: There is no such change.
    """

    def __init__(self, suite: Suite, change: str) -> None:
        self.label, self.apply = find_change(change)
        super().__init__(suite.split, suite.limit)
        self.suite, self.change = suite, change
        self.name, self.version = suite.name, f"{suite.version}, {self.label}"
        self.groups, self.chance, self.scorer, self.new_tokens = (
            suite.groups, suite.chance, suite.scorer, suite.new_tokens
        )  # fmt: skip
        self.clips, self.streams = suite.clips, suite.streams

    def size(self) -> int:
        """See Suite."""
        return self.suite.size()

    def item(self, index: int) -> Item:
        """The item with its pictures changed; where it is turned, so is what the question is about."""
        item, change = self.suite.item(index), self.apply
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
        return None if stamp is None else f"{stamp} {self.label}"

    def score(self, item: Item, said: str) -> float:
        """See Suite."""
        return self.suite.score(item, said)

    def lengths(self, places: Sequence[int]) -> list[int] | None:
        """See Suite."""
        return self.suite.lengths(places)

    def pictures(self) -> Sequence[Path]:
        """See Suite."""
        return self.suite.pictures()
