"""Pages for training their frozen VLM itself: what each patch shows, and many questions packed about one page.

A patch is never told the name of its row or column: a value that named its owner would be found by the first layer's
attention alone, and any pruner that reads attention would be right for nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from .pages import GROUPS, KINDS_OF, NUMBERS, Asker
from .pages_render import CELLS, GRID, KINDS, NAMES, PATCH, Bar, Page, Text, make_page, render
from .scenes_dense import encode_dialogue

SLOTS = {  # what is said of a patch, and how many choices there are
    "name": len(NAMES),  # the name whose centre it holds
    "cell": len(CELLS),  # and the grid cell of that name
    "digit": len(NUMBERS),  # the digit whose centre it holds
    "order": 3,  # which digit of its number that is
    "last": 1,  # that it is the number's last one
    "bar": len(NAMES),  # the name of the bar whose upper edge it holds
}
_PRETRAIN_SEED = 7  # apart from the seeds of the suite's own splits


def patch_of(x: float, y: float) -> int:
    """Index of the patch that holds a point, 0 to 255."""
    return min(max(int(y // PATCH), 0), GRID - 1) * GRID + min(max(int(x // PATCH), 0), GRID - 1)


def patch_labels(page: Page) -> dict[str, np.ndarray]:
    """For each of ``SLOTS`` (256,) int64: index of the choice, -1 where a patch shows no such thing."""
    labels = {slot: np.full(GRID * GRID, -1) for slot in SLOTS}
    for name, text in page.names.items():
        patch = patch_of(*text.spots()[0])
        labels["name"][patch], labels["cell"][patch] = NAMES.index(name), CELLS.index(text.cell)
    for text in page.values.values():
        for place, (digit, spot) in enumerate(zip(text.text, text.spots(), strict=True)):
            patch = patch_of(*spot)
            labels["digit"][patch], labels["order"][patch] = int(digit), place
            labels["last"][patch] = 0 if place + 1 == len(text.text) else -1
    for bar in page.bars:
        labels["bar"][patch_of(*bar.spots()[0])] = NAMES.index(bar.name)
    return labels


class DensePages(Dataset[dict[str, Any]]):
    """Pages with patch labels, and questions packed into one sequence; none of them is an item of the suite.

    Args:
        word_ids: token id of each word and special token; None for pages alone.
        shares: how often a question of each group is drawn, of those that a page's kind has; all alike if empty.
        draw: whether the picture is drawn too.
        questions: questions a page, no two alike.
        length: tokens of a packed sequence; what does not fit is left out.
        start: index of the first page.
        pages: how many.
        split: whose faces, numbers, places and names.
        kinds: of page, all alike, so one may stand there twice; None: those that the groups need.
    """

    def __init__(
        self, word_ids: dict[str, int] | None = None, shares: Mapping[str, float] | None = None, draw: bool = True,
        questions: int = 20, length: int = 160, start: int = 0, pages: int = 100_000, split: str = "train",
        kinds: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        self.word_ids, self.draw, self.questions, self.length = word_ids, draw, questions, length
        self.shares = dict(shares) if shares else dict.fromkeys(GROUPS, 1.0)
        self.start, self.pages, self.split = start, pages, split
        own = [kind for group in self.shares if len(KINDS_OF[group]) == 1 for kind in KINDS_OF[group]]
        self.kinds = list(kinds or sorted(set(own or KINDS), key=KINDS.index))

    def __len__(self) -> int:
        return self.pages

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng((_PRETRAIN_SEED, self.start + index))
        page = make_page(rng, self.split, self.kinds[int(rng.integers(len(self.kinds)))])
        sample: dict[str, Any] = patch_labels(page)
        if self.draw:
            sample["image"] = render(page, rng).transpose(2, 0, 1).copy()
        return sample | self._pack(page, rng) if self.word_ids else sample

    def _pack(self, page: Page, rng: np.random.Generator) -> dict[str, Any]:
        assert self.word_ids is not None
        asker = Asker(page, rng)
        ids = np.full(self.length, self.word_ids["<pad>"])
        targets, segment, place = np.full(self.length, -100), np.full(self.length, -1), np.zeros(self.length, np.int64)
        about = np.zeros((self.questions, GRID * GRID), bool)  # patches of the things that a question is about
        group = np.full(self.length, -1)
        groups = [name for name in self.shares if page.kind in KINDS_OF[name]]
        shares = np.array([self.shares[name] for name in groups])
        drawn = rng.choice(len(groups), 2 * self.questions, p=shares / shares.sum())
        asked: set[tuple[tuple[str, str], ...]] = set()
        used = 0
        for which in drawn:
            question = asker.ask(groups[which])
            if question.turns in asked:
                continue
            tokens, answer_mask = encode_dialogue(question.turns, self.word_ids)
            stop, number = used + len(tokens), len(asked)
            if stop > self.length or number == self.questions:
                break
            asked.add(question.turns)
            ids[used:stop], segment[used:stop], place[used:stop] = tokens, number, np.arange(len(tokens))
            targets[used:stop] = np.where(answer_mask, tokens, -100)
            group[used:stop] = GROUPS.index(groups[which])
            about[number][_patches(question.wanted)] = True
            used = stop
        return {"ids": ids, "targets": targets, "segment": segment, "place": place, "about": about, "group": group}


def _patches(wanted: list[Text | Bar]) -> list[int]:
    return [patch_of(*spot) for thing in wanted for spot in thing.spots()]
