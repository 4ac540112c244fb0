"""Suite scenes-icl: worked examples before the question, and a rule that only they tell.

Two or four examples, each a picture, a question and an answer, give a made-up word to a colour, or to a shape. The last
picture is asked about likewise; its thing has the colour (or the shape) of one of the examples, and the answer is the
word of that one. Words are dealt out anew for each item, so that they mean nothing by themselves, and each picture
shows another thing besides the one asked about: who does not see all pictures, or what the questions name in them, can
only guess among the words.

Groups: what the words name and how many examples there are. Chance is one of the words.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from .scenes_render import COLORS
from .several_render import SEEDS, SHAPES, SIZES, Piece, about, background, draw, new_piece, scatter, some
from .suite import Item, Suite, register_suite

GROUPS = ("color-2", "color-4", "shape-2", "shape-4")
MADE_UP = ("dax", "wug", "fep", "zup", "bim", "kov", "lun", "rit")
WORDS = (*MADE_UP, *"what word is the color shape of object ?".split())


@dataclass(frozen=True)
class Example:
    """A picture with two things, and a question about the first of them."""

    pieces: list[Piece]
    question: str
    answer: str

    def picture(self, rng: np.random.Generator, split: str) -> Image.Image:
        """Drawn over a background of its own."""
        return draw(self.pieces, background(rng, split), rng)

    @property
    def relevant(self) -> np.ndarray:
        """(48, 48) float32: the thing asked about."""
        return about(self.pieces[:1])


class Rule:
    """Words for colours, or for shapes.

    Args:
        group: of GROUPS.
        rng: where everything is drawn from.
    """

    def __init__(self, group: str, rng: np.random.Generator) -> None:
        self.named, count = group.split("-")
        self.rng = rng
        values, others = (tuple(COLORS), SHAPES) if self.named == "color" else (SHAPES, tuple(COLORS))
        self.values, self.others = values, others
        self.words = dict(zip(some(rng, values, int(count)), some(rng, MADE_UP, int(count)), strict=True))

    def example(self, value: str) -> Example:
        """A thing of that colour (shape), and beside it one that differs in both."""
        asked, other = some(self.rng, self.others, 2)
        (different,) = some(self.rng, self.values, 1, but=[value])
        looks = [(value, asked), (different, other)]
        if self.named == "shape":
            looks = [(color, shape) for shape, color in looks]
        pieces = scatter(self.rng, [new_piece(self.rng, *look) for look in looks])
        return self.about(*pieces)

    def about(self, piece: Piece, other: Piece) -> Example:
        """The example of a thing, with another one beside it."""
        if self.named == "color":
            question, value = f"what word is the color of the {piece.shape} ?", piece.color
        else:
            question, value = f"what word is the shape of the {piece.color} object ?", piece.shape
        return Example([piece, other], question, self.words[value])

    def examples(self) -> list[Example]:
        """One for each word."""
        return [self.example(value) for value in self.words]

    def query(self) -> Example:
        """Another thing that one of the words names."""
        return self.example(some(self.rng, tuple(self.words), 1)[0])


@register_suite("scenes-icl")
class ScenesICL(Suite):
    """Item i has a rule of its own; groups take turns."""

    groups = GROUPS
    chance = {group: 1 / int(group[-1]) for group in GROUPS}

    def size(self) -> int:
        """Number of items in the split; train is as good as endless."""
        return SIZES[self.split]

    def item(self, index: int) -> Item:
        """Make item ``index``."""
        group = GROUPS[index % len(GROUPS)]
        rng = np.random.default_rng((SEEDS[self.split], index, 1))
        rule = Rule(group, rng)
        shown = [*rule.examples(), rule.query()]
        pictures = [example.picture(rng, self.split) for example in shown]
        return Item(
            f"{self.split}-{index}",
            pictures[0],
            tuple((example.question, example.answer) for example in shown),
            group,
            np.stack([example.relevant for example in shown]),
            more=tuple(enumerate(pictures[1:], 1)),
        )
