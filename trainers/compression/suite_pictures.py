"""A suite's pictures as files: what a tokenizer is trained and measured on that a model is to read through."""

from collections.abc import Callable
from pathlib import Path

from prunezoo.core.errors import PruneZooError
from trainers.data.suite import Item, Suite


def write_pictures(suite: Suite, folder: Path, done: Callable[[], None]) -> int:
    """Each item's first picture as ``SPLIT-NUMBER.png``, and its caption beside it where the suite has one.

    A picture that is there already is not made again, so what was stopped goes on.

    Args:
        suite: The suite; as many items as its limit says.
        folder: Where; made where it is not there.
        done: Called behind each picture.

    Returns:
        How many pictures have a caption.

    Raises:
        PruneZooError: A picture cannot be written.
    """
    captioned = 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(len(suite)):
            path = folder / f"{suite.split}-{index:06d}.png"
            if not path.is_file():
                write(suite[index], path)
            captioned += path.with_suffix(".txt").is_file()
            done()
    except OSError as error:
        raise PruneZooError(f"{folder}: pictures cannot be written there ({error.strerror or error})") from None
    return captioned


def write(item: Item, path: Path) -> None:
    """A caption, and then its picture, whole: a picture that is there says that all of it is."""
    if item.caption:
        path.with_suffix(".txt").write_text(item.caption + "\n")
    part = path.with_name(f"{path.name}.part")
    item.image.save(part, "png")
    part.replace(path)
