"""What an interrupted measurement has done so far, so that the same command goes on instead of beginning anew."""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainers.cli.errors import whole_file

from .scores import ItemScores, Key


@dataclass(frozen=True)
class Journal:
    """A file of results so far, beside the JSON that they are for.

    Attributes:
        path: the file; it is removed when the JSON has been written.
        fingerprint: everything that the results depend on; a file with another one is ignored.
    """

    path: Path
    fingerprint: str

    def read(self, scores: Mapping[Key, ItemScores], groups: list[str]) -> int:
        """Fill in what is known; how many items, from the first on, need not be measured again."""
        try:
            with self.path.open("rb") as file:
                known = dict(np.load(file, allow_pickle=False))
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):  # none, or cut off: begin anew
            return 0
        if str(known["fingerprint"]) != self.fingerprint:
            return 0
        for (pruner, keep), of in scores.items():
            for name, values in vars(of).items():
                values[:] = known[f"{pruner} {keep} {name}"]
        groups[:] = known["groups"].tolist()
        return int(known["done"])

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
