"""The one place where pictures are opened: upright, RGB, whole, and of bounded size, or a BrokenImage.

A picture comes from anybody. Pillow knows some forty formats, among them one that starts another program, and raises
whatever its readers happen to raise; here are the formats that photographs and drawings come in, and one kind of error.
"""

import io
import os
import stat
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from prunezoo.core.errors import PruneZooError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
MOST_BYTES = 1 << 28
"""Of a picture's file."""
MOST_PIXELS = 128_000_000
"""Of a picture; more than any telephone takes at its usual setting."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings a picture upright, by its EXIF orientation."""


class BrokenImage(PruneZooError):
    """A picture that cannot be read."""


def open_picture(path: str | os.PathLike[str]) -> Image.Image:
    """The picture in a file; see :func:`decode_picture`.

    Raises:
        BrokenImage: There is no such file, it is none (a folder, a pipe), or no picture that can be read.
    """
    return decode_picture(read_picture(path))


def read_picture(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a picture's file, at most MOST_BYTES.

    Raises:
        BrokenImage: There is no such file, it is none (a folder, a pipe), or it is too large.
    """
    try:
        found = Path(path).stat()
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for whoever writes into it
            raise BrokenImage("not a file")
        check_bytes(found.st_size)
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:  # a name with a null byte, or one that no file system can hold
        raise BrokenImage(getattr(error, "strerror", None) or str(error)) from error


def check_bytes(size: int) -> None:
    """Refuse a file before it is read.

    Raises:
        BrokenImage: It has more than MOST_BYTES.
    """
    if size > MOST_BYTES:
        raise BrokenImage(f"{size:,} bytes, more than {MOST_BYTES:,}")


def decode_picture(data: bytes, most: int = MOST_PIXELS) -> Image.Image:
    """A picture out of its file's bytes: RGB, upright as its EXIF says, without any notes.

    What is transparent is laid on white, grey of 16 bits is scaled to 8, and of several frames the first one is taken.

    Args:
        data: What is in the file.
        most: Pixels that it may have.

    Raises:
        BrokenImage: It is in none of FORMATS, damaged, or has more pixels.
    """
    check_bytes(len(data))
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            if file.width * file.height > most:
                raise BrokenImage(f"{file.width} x {file.height} pixels, more than {most:,}")
            file.load()
            turn = orientation(file)
            picture = to_rgb(file)
    except PruneZooError:
        raise
    except UnidentifiedImageError:
        raise BrokenImage(f"none of {', '.join(FORMATS)}") from None
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, TypeError, RuntimeError, struct.error …
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BrokenImage(f"{reason:.200}") from error
    picture.info = {}  # whoever turns pictures by their EXIF must not turn this one again
    return picture.transpose(TURNS[turn]) if turn in TURNS else picture


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of a picture; 1, upright, where it has none, or no EXIF that can be read."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # as above; browsers show such pictures, as they lie
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode in RGB, as a copy.

    Raises:
        BrokenImage: Nothing says which of its numbers is white.
    """
    if image.mode.startswith("I;16"):
        image = sixteen_bits(np.asarray(image))
    elif image.mode == "I":
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise BrokenImage("grey of 32 bits, which says nothing of white; save it in 8 or 16 bits")
        image = sixteen_bits(values)
    elif image.mode == "F":
        raise BrokenImage("grey in fractions, which says nothing of white; save it in 8 or 16 bits")
    if image.has_transparency_data:
        clear = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    return image.convert("RGB")


def sixteen_bits(values: np.ndarray) -> Image.Image:
    """Grey of 16 bits, (H, W) from 0 to 65535, scaled to 8; Pillow's own conversion cuts it off at 255."""
    return Image.fromarray(np.round(values / 257).astype(np.uint8))
