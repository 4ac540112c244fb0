"""Who has a model, and whose call on it is under way: threads wait for one another.

An interrupt (Ctrl-C) may come between any two steps. So nothing here hangs on what a function returned: who holds is
read from where it stands, and what is undone may be undone twice.
"""

from collections.abc import Callable
from contextlib import suppress
from threading import RLock, get_ident
from time import monotonic, sleep
from typing import Any, NoReturn

from ..core.errors import PruneZooError
from .parts.hooks import copy_error
from .parts.model import VLM

HOLD = "_prunezoo_hold"
"""Attribute of a model with pruners attached: its :class:`Hold`."""
PAUSE = 0.005
"""Seconds between two looks at a model that another thread has."""


class Turn:
    """The thread whose call is under way has it, however often it took it."""

    def __init__(self) -> None:
        self._lock = RLock()

    def take(self) -> None:
        """Wait for it."""
        self._lock.acquire()

    def give(self) -> None:
        """Give it back, as often as this thread took it; without effect in another."""
        with suppress(RuntimeError):  # it is not ours any more
            while True:
                self._lock.release()


class Hold:
    """Pruners attached to a model, once, from :meth:`take` to :meth:`leave`; nobody else can attach any meanwhile."""

    def __init__(self, vlm: VLM, owner: object, turn: Turn) -> None:
        self.vlm, self.owner, self.turn, self.thread = vlm, owner, turn, get_ident()
        self.undo: list[Callable[[], Any]] = []  # from the last to the first; each can be called twice

    @staticmethod
    def on(vlm: VLM) -> "Hold | None":
        """That of a model."""
        hold: Hold | None = vars(vlm).get(HOLD)
        return hold

    def take(self, timeout: float | None) -> None:
        """Wait for the model, at most so many seconds; None: as long as it takes.

        Raises:
            PruneZooError: This thread has it already, or the time is over.
        """
        end = None if timeout is None else monotonic() + timeout
        while (holder := vars(self.vlm).setdefault(HOLD, self)) is not self:
            if holder.thread == self.thread:
                raise PruneZooError(
                    "this model has a pruner attached already: leave the other `with attach(...)` first"
                )
            if end is not None and monotonic() >= end:
                raise PruneZooError(
                    f"another thread has a pruner attached to this model, and did not leave it within {timeout:g} s"
                )
            sleep(PAUSE)

    def leave(self) -> None:
        """Undo everything, when a call that is under way has ended; what an interrupt left of it, the next time."""
        try:
            self.turn.take()
            while self.undo:
                self.undo[-1]()
                self.undo.pop()
            if Hold.on(self.vlm) is self:
                vars(self.vlm).pop(HOLD, None)
        finally:
            self.turn.give()

    def __reduce_ex__(self, _protocol: Any) -> NoReturn:
        """No copy of the model is made."""
        raise copy_error()
