"""Suite photo-grid: questions about grids of real photographs, of the same kinds as in ``scenes``.

Data card
    Source: any folder of class folders with photographs (``root/<class>/*.jpg``), named by the option ``root`` or the
    environment variable ``PRUNEZOO_PHOTOS``. Nothing is shipped; mind the licence of what you name.
    Pictures: grid × grid cells; some hold a photograph of a known class, the others clutter.
    Known classes: the ``classes`` folders with the most photographs. Clutter: a folder whose name starts with
    "background" or "clutter", else all classes that are not known ones.
    Groups: attribute (what is in cell b2), existence, counting (0 to 3), relation (what is right of the anchor: two
    hops), grounding (which cell), and a two-turn dialogue whose second question leans on the first answer. Answers
    are drawn first and pictures are built around them, so the answers of a group are balanced.
    Splits: by photograph; in each folder, by file name, the first 70 % train, the next 10 % validation, the rest test.
    Item i of a split is made from (split, i) alone.
    Limits: photographs are centre-cropped to squares and small; a class is a folder's name, with whatever noise its
    photographs have.
"""

import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from prunezoo.core.errors import PruneZooError

from .pictures import BrokenImage, open_picture
from .suite import SPLITS, Item, Suite, register_suite

ENVIRONMENT = "PRUNEZOO_PHOTOS"
_SIZES = {"train": 1_000_000, "validation": 1_200, "test": 2_400}
_SHARES = {"train": (0.0, 0.7), "validation": (0.7, 0.8), "test": (0.8, 1.0)}
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}
_STEPS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}  # (rows, columns)
_FILLED = 0.5  # share of the cells not asked about that hold a known class instead of clutter
_MOST = 3  # highest count that is asked for
CLUTTER = -1

# turns, the class in each cell (or CLUTTER), the cells that the last question is about
_Asked = tuple[tuple[tuple[str, str], ...], list[int], list[int]]


def _photographs(folder: Path, split: str) -> list[Path]:
    """The photographs of a class folder that belong to a split, by file name."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    low, high = (round(share * len(paths)) for share in _SHARES[split])
    return paths[low:high]


@lru_cache(maxsize=8192)
def _load(path: Path, side: int) -> np.ndarray:
    """A photograph's centre square as (side, side, 3) uint8."""
    try:
        image = open_picture(path)
    except BrokenImage as error:
        raise PruneZooError(f"suite photo-grid: {path} is not a readable picture ({error})") from None
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, (left, top, left + short, top + short)))


@register_suite("photo-grid")
class PhotoGrid(Suite):
    """Questions about a grid of photographs.

    Args:
        split: train, validation or test.
        limit: only the first so many items.
        root: folder of class folders; None: the environment variable PRUNEZOO_PHOTOS.
        classes: how many known classes, at least 3.
        grid: cells in a row, 2 to 9.
        cell: width and height of a cell, pixels.

    Raises:
        PruneZooError: no such folder, or too few classes or photographs in it.
    """

    groups = ("attribute", "existence", "counting", "relation", "grounding", "dialogue")

    def __init__(
        self,
        split: str = "test",
        limit: int | None = None,
        root: str | Path | None = None,
        classes: int | str = 16,
        grid: int | str = 3,
        cell: int | str = 32,
    ) -> None:
        super().__init__(split, limit)
        try:  # a command line gives words
            classes, grid, cell = int(classes), int(grid), int(cell)
        except ValueError as error:
            raise PruneZooError(f"suite photo-grid: classes, grid and cell are whole numbers ({error})") from None
        if classes < 3 or not 2 <= grid <= 9 or cell < 1:
            raise PruneZooError("suite photo-grid: classes must be at least 3, grid 2 to 9, cell at least 1")
        self.grid, self.cell = grid, cell
        self.cells = tuple(f"{'abcdefghi'[row]}{column + 1}" for row in range(grid) for column in range(grid))
        self._known, self._clutter = _read_folders(root, split, classes)
        self.classes = tuple(self._known)
        self._makers: dict[str, Callable[[np.random.Generator], _Asked]] = {
            "attribute": self._attribute,
            "existence": self._existence,
            "counting": self._counting,
            "relation": self._relation,
            "grounding": self._grounding,
            "dialogue": self._dialogue,
        }
        by_class = 1 / len(self.classes)
        self.chance = {
            "attribute": by_class,
            "existence": 1 / 2,
            "counting": 1 / (_MOST + 1),
            "relation": by_class,
            "grounding": 1 / len(self.cells),
            "dialogue": by_class,
        }

    def size(self) -> int:
        """Number of items in the split."""
        return _SIZES[self.split]

    def pictures(self) -> list[Path]:
        """See Suite: those of the split."""
        return [path for paths in (*self._known.values(), self._clutter) for path in paths]

    def item(self, index: int) -> Item:
        """Item ``index``: the group goes round, everything else is drawn from (split, index)."""
        group = self.groups[index % len(self.groups)]
        rng = np.random.default_rng([SPLITS.index(self.split), index])
        turns, layout, asked = self._makers[group](rng)
        relevant = np.zeros((self.grid, self.grid), np.float32)
        relevant.flat[asked] = 1
        return Item(
            id=f"{self.split}-{index}",
            image=self._draw(layout, rng),
            turns=turns,
            group=group,
            relevant=relevant.repeat(self.cell, axis=0).repeat(self.cell, axis=1),
        )

    def layout(self, index: int) -> list[str | None]:
        """The class in each cell of item ``index``, row by row; None where there is clutter."""
        rng = np.random.default_rng([SPLITS.index(self.split), index])
        layout = self._makers[self.groups[index % len(self.groups)]](rng)[1]
        return [None if held == CLUTTER else self.classes[held] for held in layout]

    def _draw(self, layout: list[int], rng: np.random.Generator) -> Image.Image:
        canvas = np.empty((self.grid, self.cell, self.grid, self.cell, 3), np.uint8)
        left: dict[int, list[int]] = {}  # by class, numbers not yet shown: a photograph comes twice only when all have
        for position, held in enumerate(layout):
            paths = self._clutter if held == CLUTTER else self._known[self.classes[held]]
            if not left.get(held):
                left[held] = rng.permutation(len(paths)).tolist()
            row, column = divmod(position, self.grid)
            canvas[row, :, column] = _load(paths[left[held].pop()], self.cell)
        return Image.fromarray(canvas.reshape(self.grid * self.cell, self.grid * self.cell, 3))

    def _fill(self, rng: np.random.Generator, placed: dict[int, int], without: int | None = None) -> list[int]:
        """A layout with ``placed`` (cell -> class) and anything but the class ``without`` in the other cells."""
        others = [c for c in range(len(self.classes)) if c != without]
        layout = []
        for position in range(len(self.cells)):
            drawn = int(rng.choice(others)) if rng.random() < _FILLED else CLUTTER
            layout.append(placed.get(position, drawn))
        return layout

    def _neighbours(self, rng: np.random.Generator) -> tuple[str, int, int]:
        """A relation, and two cells of which the second stands in it to the first."""
        relation = str(rng.choice(list(_STEPS)))
        down, right = _STEPS[relation]
        row = int(rng.integers(max(0, -down), self.grid - max(0, down)))
        column = int(rng.integers(max(0, -right), self.grid - max(0, right)))
        first = row * self.grid + column
        return relation, first, first + down * self.grid + right

    def _attribute(self, rng: np.random.Generator) -> _Asked:
        answer, at = int(rng.integers(len(self.classes))), int(rng.integers(len(self.cells)))
        turn = (f"what is in cell {self.cells[at]}?", self.classes[answer])
        return (turn,), self._fill(rng, {at: answer}), [at]

    def _existence(self, rng: np.random.Generator) -> _Asked:
        there, asked = bool(rng.integers(2)), int(rng.integers(len(self.classes)))
        at = [int(rng.integers(len(self.cells)))] if there else []
        turn = (f"is there a photo of {self.classes[asked]}?", "yes" if there else "no")
        return (turn,), self._fill(rng, dict.fromkeys(at, asked), without=asked), at

    def _counting(self, rng: np.random.Generator) -> _Asked:
        count, asked = int(rng.integers(_MOST + 1)), int(rng.integers(len(self.classes)))
        at = [int(i) for i in rng.choice(len(self.cells), count, replace=False)]
        turn = (f"how many photos of {self.classes[asked]} are there?", str(count))
        return (turn,), self._fill(rng, dict.fromkeys(at, asked), without=asked), at

    def _relation(self, rng: np.random.Generator) -> _Asked:
        anchor, answer = (int(i) for i in rng.choice(len(self.classes), 2, replace=False))
        relation, first, second = self._neighbours(rng)
        turn = (f"what is {relation} {self.classes[anchor]}?", self.classes[answer])
        return (turn,), self._fill(rng, {first: anchor, second: answer}, without=anchor), [first, second]

    def _grounding(self, rng: np.random.Generator) -> _Asked:
        asked, at = int(rng.integers(len(self.classes))), int(rng.integers(len(self.cells)))
        turn = (f"which cell is {self.classes[asked]} in?", self.cells[at])
        return (turn,), self._fill(rng, {at: asked}, without=asked), [at]

    def _dialogue(self, rng: np.random.Generator) -> _Asked:
        anchor, answer = (int(i) for i in rng.choice(len(self.classes), 2, replace=False))
        relation, first, second = self._neighbours(rng)
        turns = (
            (f"which cell is {self.classes[anchor]} in?", self.cells[first]),
            (f"what is {relation} it?", self.classes[answer]),
        )
        return turns, self._fill(rng, {first: anchor, second: answer}, without=anchor), [first, second]


def _read_folders(root: str | Path | None, split: str, classes: int) -> tuple[dict[str, list[Path]], list[Path]]:
    """Photographs of the known classes, by class name in alphabetical order, and those that serve as clutter."""
    root = root or os.environ.get(ENVIRONMENT)
    if not root:
        raise PruneZooError(
            f"suite photo-grid: no photographs; name a folder of class folders by root or {ENVIRONMENT}"
        )
    if not Path(root).is_dir():
        raise PruneZooError(f"suite photo-grid: {root} is not a folder")
    folders = sorted(path for path in Path(root).iterdir() if path.is_dir())
    clutter = [path for path in folders if path.name.lower().startswith(("background", "clutter"))]
    # counted over all splits, so that every split knows the same classes
    counts = {path: sum(1 for file in path.iterdir() if file.suffix.lower() in _SUFFIXES) for path in folders}
    ranked = sorted((path for path in folders if path not in clutter), key=lambda path: (-counts[path], path.name))
    known = ranked[:classes]
    clutter = clutter or ranked[classes:]
    if len(known) < classes or not clutter:
        raise PruneZooError(f"suite photo-grid: {root} needs {classes} class folders and clutter, has {len(folders)}")
    if counts[known[-1]] < 10:  # a tenth is the validation
        raise PruneZooError(f"suite photo-grid: {known[-1]} has {counts[known[-1]]} photographs; 10 are needed")
    names = {path.name.replace("_", " ").lower(): _photographs(path, split) for path in sorted(known)}
    unknown = [photo for path in clutter for photo in _photographs(path, split)]
    if len(names) < classes or not unknown:
        raise PruneZooError(f"suite photo-grid: {root}: class names clash, or no clutter is left for {split}")
    return names, unknown
