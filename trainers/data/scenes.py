"""Suite scenes: questions in words whose answer depends on different parts of a made picture from question to question.

Seven groups, each standing for a family of benchmarks: attribute, existence, counting, relation (two hops: find two
things, compare their places), grounding (which of 4×4 grid cells), reading (1 to 4 handwritten digits on a plate) and
dialogue (the second turn leans on the first). Answers are balanced, and every reference picks out exactly one thing.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .scenes_render import CELLS, COLORS, SHAPES, Thing, make_things, relevance, render
from .suite import Item, Suite, code_digest, register_suite

GROUPS = ("attribute", "existence", "counting", "relation", "grounding", "reading", "dialogue")
NUMBERS = tuple(str(n) for n in range(10))
COUNTS = ("1", "2", "3", "4")  # the counts that are asked for; "0" is what existence asks
NOUNS = (*SHAPES, "plate")
PLURALS = {noun: noun + ("es" if noun.endswith("s") else "s") for noun in NOUNS}
RELATIONS = ("left of", "right of", "above", "below")
WORDS = (
    *COLORS, *NOUNS, *PLURALS.values(), "small", "large", *NUMBERS, *CELLS, "yes", "no",
    *"what color shape size is the object objects there a are how many left right of above below where".split(),
    *"number on and it ?".split(),
)  # fmt: skip
_MARGIN = 10  # pixels by which two centres must differ for one to be left of (above) the other
_SEEDS = {"train": 11, "validation": 23, "test": 37}
_SIZES = {"train": 1_000_000, "validation": 2_100, "test": 4_200}


@dataclass(frozen=True)
class Question:
    """A dialogue about a scene and the things that its last question is about."""

    group: str
    turns: tuple[tuple[str, str], ...]
    wanted: list[Thing]


class Asker:
    """Asks questions about one scene; ``None`` where the scene has no answer of the kind that was drawn."""

    def __init__(self, things: list[Thing], rng: np.random.Generator) -> None:
        self.things, self.rng = things, rng
        self.pairs = Counter((t.color, t.shape) for t in things)
        self.unique = [t for t in things if self.pairs[t.color, t.shape] == 1]

    def ask(self, group: str) -> Question | None:
        """Draw one question of a group."""
        return getattr(self, f"_{group}")()

    def _pick(self, things: list[Thing]) -> Thing | None:
        return things[int(self.rng.integers(len(things)))] if things else None

    def _attribute(self) -> Question | None:
        kind = ("color", "shape", "size")[int(self.rng.integers(3))]
        if kind == "size":
            thing = self._pick([t for t in self.unique if not t.number])
        else:
            asked_by = "shape" if kind == "color" else "color"
            seen = Counter(getattr(t, asked_by) for t in self.things)
            thing = self._pick([t for t in self.things if seen[getattr(t, asked_by)] == 1])
        if thing is None:
            return None
        text = {
            "color": f"what color is the {thing.shape} ?",
            "shape": f"what shape is the {thing.color} object ?",
            "size": f"what size is the {thing.color} {thing.shape} ?",
        }[kind]
        return Question("attribute", ((text, getattr(thing, kind)),), [thing])

    def _existence(self) -> Question | None:
        if self.rng.random() < 0.5:
            thing = self._pick(self.things)
            assert thing is not None
            color, shape, answer = thing.color, thing.shape, "yes"
            wanted = [t for t in self.things if (t.color, t.shape) == (color, shape)]
        else:  # colour and shape are both there, but never on one thing
            colors, shapes = {t.color for t in self.things}, {t.shape for t in self.things}
            absent = sorted((c, s) for c in colors for s in shapes if (c, s) not in self.pairs)
            if not absent:
                return None
            color, shape = absent[int(self.rng.integers(len(absent)))]
            answer = "no"
            wanted = [t for t in self.things if color == t.color or shape == t.shape]
        return Question("existence", ((f"is there a {color} {shape} ?", answer),), wanted)

    def _countable(self, but: str = "") -> tuple[str, str, list[Thing]] | None:
        """What to count (things of a colour, or plates; not ``but``), how many, and the things; counts are balanced.

        Shapes are not counted: a shape is named wrong for one thing in forty, which adds up over a scene.
        """
        by_word: dict[str, list[Thing]] = {}
        for thing in self.things:
            by_word.setdefault(f"{thing.color} objects", []).append(thing)
            if thing.number:
                by_word.setdefault(PLURALS[thing.shape], []).append(thing)
        count = int(self.rng.integers(1, len(COUNTS) + 1))
        words = sorted(word for word, found in by_word.items() if len(found) == count and word != but)
        if not words:
            return None
        word = words[int(self.rng.integers(len(words)))]
        return word, str(count), by_word[word]

    def _counting(self) -> Question | None:
        found = self._countable()
        return found and Question("counting", ((f"how many {found[0]} are there ?", found[1]),), found[2])

    def _relation(self) -> Question | None:
        relation = RELATIONS[int(self.rng.integers(4))]
        axis = "x" if relation in ("left of", "right of") else "y"
        sign = 1 if relation in ("left of", "above") else -1
        answer = "yes" if self.rng.random() < 0.5 else "no"
        wish = sign if answer == "yes" else -sign
        pairs = [
            (a, b) for a in self.unique for b in self.unique if wish * (getattr(b, axis) - getattr(a, axis)) >= _MARGIN
        ]
        if not pairs:
            return None
        a, b = pairs[int(self.rng.integers(len(pairs)))]
        text = f"is the {a.color} {a.shape} {relation} the {b.color} {b.shape} ?"
        return Question("relation", ((text, answer),), [a, b])

    def _grounding(self) -> Question | None:
        thing = self._pick(self.unique)
        if thing is None:
            return None
        return Question("grounding", ((f"where is the {thing.color} {thing.shape} ?", thing.cell),), [thing])

    def _reading(self) -> Question | None:
        plate = self._pick([t for t in self.unique if t.number])
        if plate is None:
            return None
        return Question("reading", ((f"what number is on the {plate.color} plate ?", " ".join(plate.number)),), [plate])

    def _dialogue(self) -> Question | None:
        kind = ("where", "where", "where", "size", "count")[int(self.rng.integers(5))]
        if kind == "count":
            first = self._countable()
            second = first and self._countable(but=first[0])
            if not first or not second:
                return None
            turns = ((f"how many {first[0]} are there ?", first[1]), (f"and {second[0]} ?", second[1]))
            return Question("dialogue", turns, second[2])
        choice = [t for t in self.unique if not t.number]
        thing = self._pick(choice)
        other = self._pick([t for t in choice if t is not thing])
        if thing is None or other is None:
            return None

        def answer(t: Thing) -> str:
            return t.cell if kind == "where" else t.size

        question = "where is" if kind == "where" else "what size is"
        if self.rng.random() < 0.5:  # a pronoun
            turns = ((f"is there a {thing.color} {thing.shape} ?", "yes"), (f"{question} it ?", answer(thing)))
            return Question("dialogue", turns, [thing])
        turns = (
            (f"{question} the {thing.color} {thing.shape} ?", answer(thing)),
            (f"and the {other.color} {other.shape} ?", answer(other)),
        )
        return Question("dialogue", turns, [other])


def drawn_by() -> str:
    """A hash of all the code that makes a scene out of its number."""
    return code_digest("scenes*.py", "numpy", "pillow", "scikit-learn")


def describe(things: Sequence[Thing]) -> str:
    """All things in WORDS, cell by cell: `large red circle b2 and white plate 7 0 2 d4`."""
    said = []
    for thing in sorted(things, key=lambda thing: (thing.cell, thing.x)):
        number = " ".join(thing.number)
        size = "" if number else thing.size  # plates are as wide as their number
        said.append(" ".join(filter(None, (size, thing.color, thing.shape, number, thing.cell))))
    return " and ".join(said)


@register_suite("scenes")
class Scenes(Suite):
    """Item i asks about a scene of its own; groups take turns, so any first N items are balanced over the groups."""

    groups = GROUPS
    chance = {
        "attribute": (1 / 7 + 1 / 7 + 1 / 2) / 3,
        "existence": 1 / 2,
        "counting": 1 / 4,
        "relation": 1 / 2,
        "grounding": 1 / 16,
        "reading": 1 / 40,
        "dialogue": (3 / 16 + 1 / 2 + 1 / 4) / 5,
    }

    def size(self) -> int:
        """Number of items in the split; train is as good as endless."""
        return _SIZES[self.split]

    def stamp(self, index: int) -> str:
        """See Items. A scene is a matter of the code that draws it, and of nothing else."""
        return f"{drawn_by()} {self.split} {index}"

    def item(self, index: int) -> Item:
        """Make item ``index``, in about 2 ms."""
        rng = np.random.default_rng((_SEEDS[self.split], index))
        group = GROUPS[index % len(GROUPS)]
        question = None
        while question is None:  # the same draws ask every scene, till one has the answer drawn: answers stay balanced
            things = make_things(rng, self.split)
            question = Asker(things, np.random.default_rng((_SEEDS[self.split], index, 1))).ask(group)
        picture = Image.fromarray(render(things, rng, self.split))
        asked = (question.turns, group, relevance(question.wanted))
        return Item(f"{self.split}-{index}", picture, *asked, caption=describe(things))
