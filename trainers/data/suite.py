"""What a suite is: a deterministic sequence of questions about pictures, with groups that are reported apart."""

import hashlib
import importlib
import inspect
import pkgutil
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Literal, cast, get_args, overload

import numpy as np
from PIL import Image

from prunezoo.core.errors import PruneZooError
from prunezoo.core.near import near

from .scorers import find_scorer

Split = Literal["train", "validation", "test"]
SPLITS: tuple[str, ...] = get_args(Split)
NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@cache
def code_digest(files: str, *libraries: str) -> str:
    """A hash of code beside this file that draws pictures, and of the releases that it draws with.

    Args:
        files: Pattern of their names, ``scenes*.py``.
        libraries: Names of distributions.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob(files)):
        digest.update(path.read_bytes())
    digest.update(" ".join(map(version, libraries)).encode())
    return digest.hexdigest()


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
        references: all answers that count, where the suite has its answers written and scored; none: `answer` alone.
        choices: texts of the answers to choose from, in the order of the letters A, B, …; none: it is no such question.
        more: further pictures, in reading order behind ``image``: number of the turn whose question each stands in, and
            the picture. ``relevant`` is (P, H, W) then, of all P pictures in that order.
        stream: of what it is one step; items of a stream follow one another. Empty: of nothing.
        caption: what is on ``image``, in words; empty where the suite does not know.
    """

    id: str
    image: Image.Image
    turns: tuple[tuple[str, str], ...]
    group: str
    relevant: np.ndarray | None = None
    picture_turn: int = 0
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    more: tuple[tuple[int, Image.Image], ...] = ()
    stream: str = ""
    caption: str = ""

    @property
    def pictures(self) -> tuple[tuple[int, Image.Image], ...]:
        """All pictures in reading order, each with the number of the turn whose question it stands in."""
        return ((self.picture_turn, self.image), *self.more)

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

    A suite overrides ``groups``, ``size`` and ``item``, and ``chance`` where it is known.

    Attributes:
        name: its name in the registry.
        version: another one whenever its questions, pictures or scoring change, so that no table mixes them.
        groups: the question groups.
        chance: accuracy of guessing in a group, in [0, 1].
        scorer: how answers are scored that the model writes, a name of `scorers.py`; None: none are written, and right
            is where greedy decoding would write exactly the reference answer.
        new_tokens: longest answer that is written.
        clips: whether the pictures of an item are the frames of one clip.
        streams: whether items are steps of streams, :attr:`Item.stream`; pruners that remember are told of them.
    """

    name: str
    version: str = "1"
    groups: tuple[str, ...]
    chance: dict[str, float] = {}
    scorer: str | None = None
    new_tokens: int = 16
    clips: bool = False
    streams: bool = False

    def __init__(self, split: str = "test", limit: int | None = None) -> None:
        if split not in SPLITS:
            raise PruneZooError(f"suite {self.name}: split {split!r} is not one of {', '.join(SPLITS)}")
        if limit is not None and limit < 1:
            raise PruneZooError(f"suite {self.name}: limit must be at least 1, got {limit}")
        self.split, self.limit = split, limit

    @abstractmethod
    def size(self) -> int:
        """Number of items in the whole split."""

    def score(self, item: Item, said: str) -> float:
        """The score in [0, 1] of what a model wrote, by ``scorer``."""
        assert self.scorer is not None  # else nothing is written
        return find_scorer(self.scorer)(said, item.references or (item.answer,), item.choices)

    def lengths(self, places: Sequence[int]) -> list[int] | None:
        """Characters of the texts of these items, where they can be told without making the items; else None."""
        return None

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
        name: a registered suite, or `module:Class`, a :class:`Suite` of somebody's own, whose code is run.
        split: train, validation or test; the three share no picture, digit or photograph.
        limit: only the first so many items.
        options: what the suite itself takes (photo-grid: ``root``).

    Raises:
        PruneZooError: an unknown suite or split, or a suite whose data are not there.
    """
    cls = suite_class(name)
    known = options_of(cls)
    for option in options:
        if option not in known:
            raise PruneZooError(f"suite {name}: option {option!r} is unknown{near(option, known)}")
    if needed := [option for option, is_needed in known.items() if is_needed and option not in options]:
        raise PruneZooError(f"suite {name}: it needs {', '.join(needed)}, e.g. --suite {name} {needed[0].upper()}")
    suite = cast(Callable[..., Suite], cls)(split=split, limit=limit, **options)
    if not getattr(suite, "groups", ()):
        raise PruneZooError(f"suite {name}: it has no groups; set groups = ('all',)")
    if suite.scorer is not None and type(suite).score is Suite.score:
        find_scorer(suite.scorer)
    return suite


def suite_class(name: str) -> type[Suite]:
    """The class of a suite; see :func:`load_suite`.

    Raises:
        PruneZooError: an unknown name, or a class that is no suite.
    """
    if ":" in name:
        return _own_class(name)
    _import_suites()
    if name not in _SUITES:
        raise PruneZooError(f"suite {name!r} is unknown{near(name, _SUITES)}; one of your own is written module:Class")
    return _SUITES[name]


def options_of(suite: type[Suite]) -> dict[str, bool]:
    """What a suite takes beside split and limit, and whether it must be given; what it hands on by `**` included."""
    found: dict[str, bool] = {}
    for cls in suite.__mro__:
        if "__init__" in vars(cls):
            takes = inspect.signature(vars(cls)["__init__"]).parameters.values()
            named = [of for of in list(takes)[1:] if of.kind in NAMED]
            found = {of.name: of.default is of.empty for of in named} | found
            if all(of.kind is not of.VAR_KEYWORD for of in takes):
                break
    return {name: needed for name, needed in found.items() if name not in ("split", "limit")}


def _own_class(name: str) -> type[Suite]:
    """A suite outside the repository, by `module:Class`: importing it runs its code."""
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:  # an empty name, or one with leading dots
        reason = " ".join(str(error).split())
        raise PruneZooError(f"suite {name}: no `import {module}` here ({reason}); go where it works") from error
    if not (isinstance(found, type) and issubclass(found, Suite)) or inspect.isabstract(found):
        raise PruneZooError(f"suite {name}: must be a trainers.data.suite.Suite that has `size` and `item`")
    found.name = name
    return found


def _import_suites() -> None:
    """Import every file of this package, so that a new suite is one new file."""
    import trainers.data

    for info in pkgutil.iter_modules(trainers.data.__path__):
        importlib.import_module(f"trainers.data.{info.name}")
