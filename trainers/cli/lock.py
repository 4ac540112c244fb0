"""One run at a time writes to a place: a second one is refused, or waits.

The lock is the system's own (`lockf`), held by the process: it ends with it, however it ends, and loader workers and
other children do not keep it. It is taken on a small file in the folder, or beside the file, that is locked; a run that
ends removes it, and what a crash leaves of it locks nothing.
"""

import atexit
import errno
import fcntl
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import IO

from prunezoo.core.errors import PruneZooError

RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK")
"""Environment variables by which launchers tell the processes of one run apart."""
BUSY = (errno.EACCES, errno.EAGAIN)
UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems say that know no locks."""

_process = ExitStack()
atexit.register(_process.close)
_held: ContextVar[ExitStack] = ContextVar("_held", default=_process)


def hold(option: str, place: Path | None, folder: bool = False) -> None:
    """Lock a place until the command ends; only the first process of a distributed run does.

    Args:
        option: Of the command line, for the message.
        place: File or folder that the command writes; None: none.
        folder: Whether it is a folder.

    Raises:
        PruneZooError: Another run holds it; the message names its process.
    """
    if place is not None and all(os.environ.get(name, "0") == "0" for name in RANKS):
        _held.get().enter_context(held(option, place, folder))


@contextmanager
def scope() -> Iterator[None]:
    """Within, what is held is held until the end of the block."""
    with ExitStack() as stack:
        token = _held.set(stack)
        try:
            yield
        finally:
            _held.reset(token)


@contextmanager
def held(option: str, place: Path, folder: bool = False, wait: bool = False) -> Iterator[None]:
    """Lock a place for the time of the block.

    Args:
        option: Of the command line, for the message.
        place: File or folder.
        folder: Whether it is a folder.
        wait: For another run to end, instead of refusing.

    Raises:
        PruneZooError: Another run holds it; the message names its process.
    """
    place = place.resolve()
    path = place / ".lock" if folder else place.with_name(f".{place.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _locked(option, place, path, wait)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still locked, so that nobody else's is removed
        file.close()


def _locked(option: str, place: Path, path: Path, wait: bool) -> IO[str]:
    """The lock's file, open and locked, and still the one of that name: its last holder may have removed it."""
    while True:
        file = path.open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in UNKNOWN:
                print(f"{option} {place}: this file system knows no locks; start no second run there", file=sys.stderr)
                return file
            if error.errno not in BUSY:
                raise
            file.seek(0)
            owner = file.read() or "another one"
            if not wait:
                file.close()
                raise PruneZooError(
                    f"{option} {place}: a run is writing there, process {owner}; wait for it, or name another place"
                ) from None
            print(f"{option} {place}: waits for a run that writes there, process {owner}", file=sys.stderr)
            fcntl.lockf(file, fcntl.LOCK_EX)
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate(0)
            file.write(f"{os.getpid()} on {platform.node()}")
            file.flush()
            return file
        file.close()
