"""What an interrupted measurement has done so far, so that the same command goes on instead of beginning anew."""

import sys
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainers.cli.errors import one_line, whole_file

from .scores import ItemScores, Key

UNREADABLE = (
    OSError, ValueError, EOFError, KeyError, TypeError, MemoryError, RuntimeError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What numpy and zip raise at a damaged file."""


@dataclass(frozen=True)
class Journal:
    """A file of results so far, beside the JSON that they are for.

    Attributes:
        path: the file; it is removed when the JSON has been written.
        fingerprint: everything that the results depend on; those of another one are not taken.
    """

    path: Path
    fingerprint: str

    def read(self, scores: Mapping[Key, ItemScores], groups: list[str]) -> int:
        """Fill in what is known; how many items, from the first on, need not be measured again.

        What lies there and cannot be taken is said in one line.
        """
        if not self.path.exists():
            return 0
        try:
            known = self._load(scores, groups)
        except UNREADABLE as error:
            return self._anew(f"damaged ({one_line(error)[:200]})")
        if known is None:
            return self._anew("of another command, model or pruner")
        for (pruner, keep), of in scores.items():
            for name, values in vars(of).items():
                values[:] = known[f"{pruner} {keep} {name}"]
        groups[:] = known["groups"].tolist()
        return int(known["done"])

    def _load(self, scores: Mapping[Key, ItemScores], groups: list[str]) -> dict[str, Any] | None:
        """What lies there; None if it is of other settings.

        Raises:
            ValueError: Something in it is not of the size, or of the kind, that it must be.
            UNREADABLE: It cannot be read.
        """
        with self.path.open("rb") as file:
            known = dict(np.load(file, allow_pickle=False))
        if str(known["fingerprint"]) != self.fingerprint:
            return None
        wanted = {f"{p} {k} {name}": values for (p, k), of in scores.items() for name, values in vars(of).items()}
        for name, values in (*wanted.items(), ("groups", np.array(groups)), ("done", np.array(0))):
            there = known[name]
            if there.shape != values.shape or there.dtype.kind != values.dtype.kind:
                raise ValueError(f"'{name}' is {there.dtype} {there.shape}")
        if not 0 <= int(known["done"]) <= len(groups):
            raise ValueError(f"{known['done']} of {len(groups)} items")
        return known

    def _anew(self, why: str) -> int:
        """Say why what lies there is not taken."""
        print(f"{self.path}: {why}; everything is measured anew", file=sys.stderr)
        return 0

    def write(self, scores: Mapping[Key, ItemScores], groups: list[str], done: int) -> None:
        """Note that the first so many items are measured."""
        arrays = {f"{p} {k} {name}": values for (p, k), of in scores.items() for name, values in vars(of).items()}
        with whole_file(self.path) as scratch, scratch.open("wb") as file:
            np.savez_compressed(
                file, **arrays, groups=np.array(groups), done=np.array(done), fingerprint=np.array(self.fingerprint)
            )

    def remove(self) -> None:
        """Forget it all."""
        self.path.unlink(missing_ok=True)
