"""Pick a few items of each group and see what every method keeps of them and what the model then answers."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from prunezoo.host import attach
from prunezoo.host.run import run_pruned
from trainers.data.conversation import ConversationCollator
from trainers.data.suite import Item, Suite

from .budgets import Budget
from .measure import see
from .methods import Method
from .pictures import side_by_side
from .written import moved, prompts_of, write

NEW_TOKENS = 16
"""Longest answer that is generated for a picture."""


@dataclass(frozen=True)
class Shown:
    """What one method keeps of one picture at one budget, and the answer that follows.

    Attributes:
        pruner: the method.
        keep: the budget, as on the command line.
        kept: (K, 2) row and column of each token; of several pictures as if they stood side by side.
        anchors: the tokens were merged or made anew; `kept` only says where they stand.
        answer: what the model generates.
        right: whether that is right, see :func:`is_right`.
    """

    pruner: str
    keep: str
    kept: NDArray[np.int64]
    anchors: bool
    answer: str
    right: bool


@dataclass(frozen=True)
class Example:
    """One item and what all methods make of it.

    Attributes:
        item: the item.
        grid: rows and columns of its tokens.
        answer: of the full model.
        right: whether that is right, see :func:`is_right`.
        shown: one entry for each method and budget.
    """

    item: Item
    grid: tuple[int, int]
    answer: str
    right: bool
    shown: list[Shown] = field(default_factory=list)

    @property
    def picture(self) -> Image.Image:
        """The item's, or all of them side by side."""
        return side_by_side([picture for _, picture in self.item.pictures])


def pick_items(suite: Suite, per_group: int) -> list[Item]:
    """The first items of each group, in the order of the groups."""
    picked: list[Item] = []
    seen: Counter[str] = Counter()
    for item in suite:
        if seen[item.group] < per_group:
            seen[item.group] += 1
            picked.append(item)
        if all(seen[group] == per_group for group in suite.groups):
            break
    return sorted(picked, key=lambda item: suite.groups.index(item.group))


def is_right(item: Item, answer: str, suite: Suite | None) -> bool:
    """Whether a suite that scores answers gives it more than half; else, whether it is but for case the reference."""
    if suite is not None and suite.scorer is not None:
        return suite.score(item, answer) > 0.5
    return answer.lower().split() == item.answer.lower().split()


@torch.no_grad()
def answer_of(vlm: Any, processor: Any, item: Item) -> str:
    """What the full model answers."""
    return write(vlm, processor, prompts_of(vlm, processor, [item]), NEW_TOKENS)[0]


@torch.no_grad()
def show_examples(
    vlm: Any,
    processor: Any,
    items: Sequence[Item],
    methods: Sequence[Method],
    budgets: Sequence[Budget],
    suite: Suite | None = None,
) -> list[Example]:
    """Run every method and budget on a few items, with answers that are really generated.

    Args:
        vlm: the frozen model.
        processor: its processor.
        items: one batch.
        methods: whom to show; of a method with several seeds the first.
        budgets: at how many tokens.
        suite: of the items; says how long answers are and which are right. None: short ones, and the reference.
    """
    longest = NEW_TOKENS if suite is None else suite.new_tokens
    scored = moved(ConversationCollator(processor)(items), vlm.device)
    prompt = prompts_of(vlm, processor, items)
    clips = suite is not None and suite.clips
    needs = tuple(sorted({signal for method in methods for signal in method.needs}))
    sights = {by_frame: see(vlm, scored, items, methods, needs, clips and not by_frame) for by_frame in
              {method.by_frame for method in methods} | {False}}  # fmt: skip
    cells = sights[False][0].inputs.cells.cpu().numpy()
    high, wide = int(cells[..., 1].max()) + 1, int(cells[..., 2].max()) + 1
    examples = [
        Example(item, (high, wide * len(item.pictures)), answer, is_right(item, answer, suite))
        for item, answer in zip(items, write(vlm, processor, prompt, longest), strict=True)
    ]
    for budget in budgets:
        for method in methods:
            encoded, view = sights[method.by_frame]
            pruner, amount = method.pruner(view), method.amount(view, budget.keep)
            choice = run_pruned(vlm, encoded, pruner, amount, logits_to_keep=1).output
            index, valid = choice.index.cpu().numpy(), choice.valid.cpu().numpy()
            with attach(vlm, pruner, amount, clips=clips and not method.by_frame):
                answers = write(vlm, processor, prompt, longest)
            where = encoded.inputs.cells.cpu().numpy()
            for b, answer in enumerate(answers):
                kept = np.concatenate([
                    _side_by_side(where[row, index[row][valid[row]]], wide, number)
                    for row, (item, number) in enumerate(view.pictures) if item == b
                ])  # fmt: skip
                right = is_right(items[b], answer, suite)
                examples[b].shown.append(
                    Shown(method.name, budget.label, kept, choice.features is not None, answer, right)
                )
    return examples


def _side_by_side(cells: NDArray[np.int64], wide: int, number: int) -> NDArray[np.int64]:
    """(K, 2): row and column of the cells (n, 3) that are patches, of the picture of that number or of a clip."""
    on_grid = cells[(cells[:, 1] >= 0) & (cells[:, 2] >= 0)]
    return np.stack([on_grid[:, 1], on_grid[:, 2] + wide * (number + on_grid[:, 0])], 1)
