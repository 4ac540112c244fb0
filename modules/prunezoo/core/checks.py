"""Checks of what a device computed, read once. Reading a flag waits for the device, so a host gathers those of a call.

with deferred() as checks:
...                # `require` only notes its flags
settle(checks)         # one read for all of them
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from .errors import PruneZooError

Check = tuple[Tensor, Callable[[], str]]
"""A flag (), true where something is wrong, and what to say then."""
_NOTED: ContextVar[list[Check] | None] = ContextVar("prunezoo_checks", default=None)


def require(wrong: Tensor, message: Callable[[], str]) -> None:
    """Raise PruneZooError where ``wrong ()`` is true: now, or inside of :func:`deferred` when it is settled."""
    noted = _NOTED.get()
    if noted is None:
        settle([(wrong, message)])
    else:
        noted.append((wrong, message))


def require_no_nan(values: Tensor, pruner: str, verb: str) -> None:
    """Raise PruneZooError, as :func:`require` does, where a pruner "scored" or "made" NaN."""
    words = f"pruner '{pruner}' {verb} NaN: check its weights and the features it was given"
    require(values.isnan().any(), lambda: words)


@contextmanager
def deferred() -> Iterator[list[Check]]:
    """Note what is required while the block runs; whoever opened it settles it."""
    noted: list[Check] = []
    token = _NOTED.set(noted)
    try:
        yield noted
    finally:
        _NOTED.reset(token)


def settle(checks: Sequence[Check]) -> None:
    """Read all flags at once; the first that is true raises its error."""
    if checks and bool(torch.stack([wrong for wrong, _ in checks]).any()):
        raise PruneZooError(next(message() for wrong, message in checks if bool(wrong)))
