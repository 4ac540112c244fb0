"""How the commands fail: `error: …` on one line and exit code 2 where the user can mend it, no traceback."""

import errno
import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from modules.core.errors import PruneZooError

P = ParamSpec("P")
R = TypeVar("R")

FULL = {errno.ENOSPC: "no space is left on the disk", errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "too big"}


def command(main: Callable[P, R]) -> Callable[P, R]:
    """Decorator for a command's `main`: a PruneZooError, or a disk that is full, ends it with one line and code 2."""

    @wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return main(*args, **kwargs)
        except PruneZooError as error:
            message = one_line(error)
        except OSError as error:
            if error.errno not in FULL:
                raise
            message = f"{error.filename or 'output'}: {FULL[error.errno]}; free some or choose another folder"
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)

    return run


def one_line(error: Exception) -> str:
    """The message of an error on one line; its kind, where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
