"""A suite of items that are at hand, and what a model writes of them."""

import numpy as np
from tiny_llava import EOS, IMAGE_SIZE, WORDS, make_image

from prunezoo.core.registry import build_pruner
from prunezoo.host import attach
from trainers.data.conversation import ConversationCollator
from trainers.data.suite import Item, Suite

GROUPS = ("one", "two")


def make_items(number: int, answer: str = "red") -> list[Item]:
    """Items of two groups, with questions of different lengths and every fifth a dialogue; nothing like each other."""
    rng = np.random.default_rng(5)
    items = []
    for i in range(number):
        question = " ".join(rng.choice(WORDS, size=int(rng.integers(2, 9)))) + " ?"
        turns = ((question, answer),) if i % 5 else (("what color ?", "blue"), (question, answer))
        relevant = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.float32)
        relevant[4:8, 8:16] = 1.0  # row 1, columns 2 and 3 of the 6 x 6 grid
        items.append(Item(f"fake-{i}", make_image(i), turns, GROUPS[i % 2], relevant))
    return items


class FakeSuite(Suite):
    """Items that are at hand."""

    name = "fake"
    groups = GROUPS
    chance = {"one": 0.2, "two": 0.2}

    def __init__(self, split: str = "test", limit: int | None = None, number: str = "12") -> None:
        super().__init__(split, limit)
        self.items = make_items(int(number))

    def size(self) -> int:
        return len(self.items)

    def item(self, index: int) -> Item:
        return self.items[index]


def suite_of(items: list[Item]) -> FakeSuite:
    suite = FakeSuite()
    suite.items = items
    return suite


def greedy(vlm, processor, items, pruner, keep) -> list[list[int]]:
    """Token ids that `generate` writes, the end token included, with a pruner attached in the ordinary way."""
    prompt = ConversationCollator(processor, answers=False)(items)
    with attach(vlm, pruner, keep=keep):
        ids = vlm.generate(**prompt, max_new_tokens=6, do_sample=False)[:, prompt["input_ids"].shape[1] :]
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in ids.tolist()]


def tiny_pruner(name):
    """A pruner for a decoder of two layers."""
    return build_pruner(name, **({"layer": 1} if name == "fastv" else {})).eval()
