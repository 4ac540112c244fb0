"""Suite pages: questions about forms, receipts, tables and bar charts, which hurt most where tokens are dropped.

Eight groups: field (the number at a name), cell (at the names of a row and a column), exist (is a name printed), where
(which of 4×4 grid cells holds a name), chart (which bar is largest or smallest), compare (is one bar above another),
count (lines, rows or bars) and dialogue (the second turn leans on the first). Answers are balanced.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from .pages_render import CELLS, KINDS, LINES, NAMES, Bar, Page, Text, make_page, relevance, render
from .suite import Item, Suite, code_digest, register_suite

GROUPS = ("field", "cell", "exist", "where", "chart", "compare", "count", "dialogue")
KINDS_OF = dict.fromkeys(GROUPS, KINDS) | {
    "field": ("form",), "cell": ("table",), "chart": ("chart",), "compare": ("chart",), "dialogue": ("form",)
}  # fmt: skip
NUMBERS = tuple(str(n) for n in range(10))
PLURALS = {"form": "lines", "table": "rows", "chart": "bars"}
WORDS = (
    *NUMBERS, *NAMES, *CELLS, *PLURALS.values(), "yes", "no",
    *"value of is there where which largest smallest above how many and it ?".split(),
)  # fmt: skip
_SEEDS = {"train": 13, "validation": 29, "test": 41}
_SIZES = {"train": 1_000_000, "validation": 2_400, "test": 4_800}
_GUESS = 1 / 27  # the best guess of a number of one to three digits: any of one digit


@dataclass(frozen=True)
class Question:
    """A dialogue about a page and what its last question is about."""

    group: str
    turns: tuple[tuple[str, str], ...]
    wanted: list[Text | Bar]


class Asker:
    """Asks questions about one page, each of a group that its kind has."""

    def __init__(self, page: Page, rng: np.random.Generator) -> None:
        self.page, self.rng = page, rng

    def ask(self, group: str) -> Question:
        """Draw one question of a group."""
        turns, wanted = getattr(self, f"_{group}")()
        return Question(group, turns, wanted)

    def _pick(self, names: list[str], but: str = "") -> str:
        names = [name for name in names if name != but]
        return names[int(self.rng.integers(len(names)))]

    def _read(self, *names: str) -> tuple[str, list[Text | Bar]]:
        """The number at one or two names, digit by digit, and what it is read from."""
        value = self.page.values[names]
        return " ".join(value.text), [*(self.page.names[name] for name in names), value]

    def _field(self) -> tuple[tuple[tuple[str, str], ...], list[Text | Bar]]:
        name = self._pick(self.page.lines)
        answer, wanted = self._read(name)
        return ((f"value of {name} ?", answer),), wanted

    def _cell(self) -> tuple[tuple[tuple[str, str], ...], list[Text | Bar]]:
        row = self._pick(self.page.lines)
        column = self._pick([name for name in self.page.names if name not in self.page.lines])
        answer, wanted = self._read(row, column)
        return ((f"value of {row} {column} ?", answer),), wanted

    def _exist(self) -> tuple[tuple[tuple[str, str], ...], list[Text | Bar]]:
        if self.rng.random() < 0.5:
            name = self._pick(list(self.page.names))
            return ((f"is there {name} ?", "yes"),), [self.page.names[name]]
        name = self._pick([name for name in NAMES if name not in self.page.names])
        wanted: list[Text | Bar] = [*self.page.names.values()]
        return ((f"is there {name} ?", "no"),), wanted

    def _where(self) -> tuple[tuple[tuple[str, str], ...], list[Text | Bar]]:
        text = self.page.names[self._pick(list(self.page.names))]
        return ((f"where is {text.text} ?", text.cell),), [text]

    def _chart(self) -> tuple[tuple[tuple[str, str], ...], list[Text | Bar]]:
        order = sorted(self.page.bars, key=lambda bar: bar.level)
        word, bar = (("largest", order[-1]), ("smallest", order[0]))[int(self.rng.integers(2))]
        wanted: list[Text | Bar] = [*self.page.bars, *self.page.names.values()]
        return ((f"which is {word} ?", bar.name),), wanted

    def _compare(self) -> tuple[tuple[tuple[str, str], ...], list[Text | Bar]]:
        one = self._pick(self.page.lines)
        other = self._pick(self.page.lines, but=one)
        bars = {bar.name: bar for bar in self.page.bars}
        answer = "yes" if bars[one].level > bars[other].level else "no"
        wanted: list[Text | Bar] = [bars[one], bars[other], self.page.names[one], self.page.names[other]]
        return ((f"is {one} above {other} ?", answer),), wanted

    def _count(self) -> tuple[tuple[tuple[str, str], ...], list[Text | Bar]]:
        page = self.page
        turn = (f"how many {PLURALS[page.kind]} ?", str(len(page.lines)))
        wanted: list[Text | Bar] = [page.names[name] for name in page.lines]
        return (turn,), wanted + page.bars

    def _dialogue(self) -> tuple[tuple[tuple[str, str], ...], list[Text | Bar]]:
        name = self._pick(self.page.lines)
        answer, wanted = self._read(name)
        kind = int(self.rng.integers(3))
        if kind == 0:
            other = self._pick(self.page.lines, but=name)
            second, wanted = self._read(other)
            return ((f"value of {name} ?", answer), (f"and {other} ?", second)), wanted
        first = (f"is there {name} ?", "yes")
        if kind == 1:
            return (first, ("value of it ?", answer)), wanted
        return (first, ("where is it ?", self.page.names[name].cell)), [self.page.names[name]]


def drawn_by() -> str:
    """A hash of all the code that makes a page out of its number."""
    return code_digest("pages*.py", "numpy", "pillow", "matplotlib")


@register_suite("pages")
class Pages(Suite):
    """Item i asks about a page of its own; groups take turns, so any first N items are balanced over the groups."""

    groups = GROUPS
    chance = {
        "field": _GUESS,
        "cell": 1 / 18,
        "exist": 1 / 2,
        "where": 1 / 16,
        "chart": 1 / len(NAMES),
        "compare": 1 / 2,
        "count": sum(1 / len(counts) for counts in LINES.values()) / len(LINES),
        "dialogue": (2 * _GUESS + 1 / 16) / 3,
    }

    def size(self) -> int:
        """Number of items in the split; train is as good as endless."""
        return _SIZES[self.split]

    def stamp(self, index: int) -> str:
        """See Items. A page is a matter of the code that draws it, and of nothing else."""
        return f"{drawn_by()} {self.split} {index}"

    def item(self, index: int) -> Item:
        """Make item ``index``, in about 2 ms."""
        rng = np.random.default_rng((_SEEDS[self.split], index))
        group = GROUPS[index % len(GROUPS)]
        kinds = KINDS_OF[group]
        page = make_page(rng, self.split, kinds[int(rng.integers(len(kinds)))])
        question = Asker(page, rng).ask(group)
        picture = Image.fromarray(render(page, rng))
        return Item(f"{self.split}-{index}", picture, question.turns, group, relevance(question.wanted))
