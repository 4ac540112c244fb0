"""What a suite is: a deterministic sequence of questions about pictures, with groups that are reported apart."""

import hashlib
import importlib
import inspect
import pkgutil
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast, get_args, overload

import numpy as np
from PIL import Image

from prunezoo.core.errors import PruneZooError
from prunezoo.core.near import near

Split = Literal["train", "validation", "test"]
SPLITS: tuple[str, ...] = get_args(Split)


@dataclass(frozen=True)
class Item:
    """One picture and a dialogue about it; the last answer is the one that is scored.

    Attributes:
        id: unique within the suite and split.
        image: the picture, RGB.
        turns: (question, answer) pairs; the answers before the last are given to the model as history.
        group: the question group, reported apart.
        relevant: (H, W) float32, at least 0: how much the question is about a pixel, higher = first to keep; what an
            oracle keeps. None where the suite does not know.
        picture_turn: number of the turn whose question the picture stands in.
    """

    id: str
    image: Image.Image
    turns: tuple[tuple[str, str], ...]
    group: str
    relevant: np.ndarray | None = None
    picture_turn: int = 0

    @property
    def question(self) -> str:
        """The question whose answer is scored."""
        return self.turns[-1][0]

    @property
    def answer(self) -> str:
        """The reference answer."""
        return self.turns[-1][1]


class Items(Sequence[Item]):
    """Items that are made when asked for, by number or slice; a subclass overrides ``item`` and ``__len__``."""

    @abstractmethod
    def item(self, index: int) -> Item:
        """Make item ``index``, 0 <= index < len(self)."""

    def stamp(self, index: int) -> str | None:
        """What changes whenever item ``index`` does, said without opening a picture; None: it cannot be said so."""
        return None

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self.item(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        return self.item(index % len(self))


class Suite(Items):
    """A deterministic sequence of items; item ``i`` is made when asked for, so workers can share one suite.

    A suite overrides ``groups``, ``chance``, ``size`` and ``item``.

    Attributes:
        name: its name in the registry.
        groups: the question groups.
        chance: accuracy of guessing in a group, in [0, 1].
    """

    name: str
    groups: tuple[str, ...]
    chance: dict[str, float]

    def __init__(self, split: str = "test", limit: int | None = None) -> None:
        if split not in SPLITS:
            raise PruneZooError(f"suite {self.name}: split {split!r} is not one of {', '.join(SPLITS)}")
        if limit is not None and limit < 1:
            raise PruneZooError(f"suite {self.name}: limit must be at least 1, got {limit}")
        self.split, self.limit = split, limit

    @abstractmethod
    def size(self) -> int:
        """Number of items in the whole split."""

    def pictures(self) -> Sequence[Path]:
        """Files on this machine that the items are made from, where they are; by default none is."""
        return ()

    def fingerprint(self) -> str:
        """Another one whenever a file of :meth:`pictures` is added, taken away, renamed or changed."""
        digest = hashlib.sha256()
        for path in self.pictures():
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{path.parent.name}/{path.name} {content}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def __len__(self) -> int:
        return self.size() if self.limit is None else min(self.limit, self.size())


_SUITES: dict[str, type[Suite]] = {}


def register_suite(name: str) -> Callable[[type[Suite]], type[Suite]]:
    """Class decorator: make a suite known by ``name``."""

    def register(cls: type[Suite]) -> type[Suite]:
        if name in _SUITES and _SUITES[name].__qualname__ != cls.__qualname__:
            raise ValueError(f"two suites are called {name!r}")
        cls.name = name
        _SUITES[name] = cls
        return cls

    return register


def list_suites() -> tuple[str, ...]:
    """Names of all suites."""
    _import_suites()
    return tuple(sorted(_SUITES))


def load_suite(name: str, split: str = "test", limit: int | None = None, **options: object) -> Suite:
    """Build a suite by name.

    Args:
        name: a registered suite.
        split: train, validation or test; the three share no picture, digit or photograph.
        limit: only the first so many items.
        options: what the suite itself takes (photo-grid: ``root``).

    Raises:
        PruneZooError: an unknown suite or split, or a suite whose data are not there.
    """
    _import_suites()
    if name not in _SUITES:
        raise PruneZooError(f"suite {name!r} is unknown{near(name, _SUITES)}")
    build = cast(Callable[..., Suite], _SUITES[name])
    known = [option for option in inspect.signature(build).parameters if option not in ("split", "limit")]
    for option in options:
        if option not in known:
            raise PruneZooError(f"suite {name}: option {option!r} is unknown{near(option, known)}")
    return build(split=split, limit=limit, **options)


def _import_suites() -> None:
    """Import every file of this package, so that a new suite is one new file."""
    import trainers.data

    for info in pkgutil.iter_modules(trainers.data.__path__):
        importlib.import_module(f"trainers.data.{info.name}")
