"""How the commands fail: `error: …` on one line and exit code 2 where the user can mend it, no traceback."""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from io import TextIOWrapper
from pathlib import Path
from typing import ParamSpec, TypeVar

from prunezoo.core.errors import PruneZooError

from .lock import scope
from .text import visible

P = ParamSpec("P")
R = TypeVar("R")

FULL = {errno.ENOSPC: "no space is left on the disk", errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "too big"}

PLACES = {
    getattr(errno, name)
    for name in ("EACCES", "EPERM", "EROFS", "ENOENT", "ENOTDIR", "EISDIR", "EEXIST", "ENAMETOOLONG")
}
"""A path that cannot be read or written as it was named."""


def command(main: Callable[P, R]) -> Callable[P, R]:
    """Decorator for a `main`: a PruneZooError, a full disk or a wrong path ends it with one line and code 2, Ctrl-C
    with code 130.
    """

    @wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, TextIOWrapper):
                stream.reconfigure(errors="replace")  # a terminal without dashes and lines is no reason to fail
        try:
            with scope():
                return main(*args, **kwargs)
        except PruneZooError as error:
            message = one_line(error)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            sys.exit(130)
        except OSError as error:
            place = error.filename2 or error.filename
            if error.errno in FULL:
                message = f"{place or 'output'}: {FULL[error.errno]}; free some or choose another folder"
            elif error.errno in PLACES and place:
                message = f"{place}: {error.strerror}; name another file or folder"
            else:
                raise
        print(f"error: {visible(message)}", file=sys.stderr)
        sys.exit(2)

    return run


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of ``path`` when all is written, in folders made if need be.

    Where that fails nothing is left of it, and the error names ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.partial")
    try:
        yield scratch
        scratch.replace(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        error.filename, error.filename2 = str(path), None
        raise


def check_output(option: str, path: Path | None, folder: bool = False) -> None:
    """Refuse a place for results before they are computed, since it is dear to learn of it afterwards.

    Args:
        option: of the command line, for the message.
        path: of the file, or None where none is asked for; folders above it need not exist.
        folder: whether it is a folder that is to be made.

    Raises:
        PruneZooError: nothing can be written there.
    """
    if path is None:
        return
    if path.exists() and path.is_dir() != folder:
        there, wanted = ("a file", "a folder") if folder else ("a folder", "a file")
        raise PruneZooError(f"{option} {path}: {there} is there; name {wanted}")
    place = path if folder else path.parent
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise PruneZooError(f"{option} {path}: {place} is no folder; choose another place")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PruneZooError(f"{option} {path}: {place} cannot be written to; choose another place")


def one_line(error: Exception) -> str:
    """The message of an error on one line; its kind, where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
