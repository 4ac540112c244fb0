"""Scenes for training the embedded VLM itself: what each patch shows, and many questions packed about one picture."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .scenes import GROUPS, NOUNS, NUMBERS, Asker
from .scenes_render import CELLS, COLORS, SIDE, Thing, make_things, render

GRID, PATCH = 12, 8
WORD_SLOTS = {  # what the projector's output says of a patch, in the language model's own words
    "color": tuple(COLORS),
    "shape": NOUNS,
    "size": ("small", "large"),
    "digit": NUMBERS,
    "cell": CELLS,
}
# How often a question of each group is drawn: reading and counting are learnt last.
_SHARES = {"counting": 0.42, "reading": 0.14, "dialogue": 0.16} | dict.fromkeys(
    ("attribute", "existence", "relation", "grounding"), 0.07
)
_PRETRAIN_SEED = 5  # apart from the seeds of the suite's own splits


def patch_labels(things: list[Thing]) -> dict[str, np.ndarray]:
    """What each of the 144 patches shows.

    Returns:
        for each slot of ``WORD_SLOTS`` (144,) int64: index of the word, the slot's length for "none", -100 where a
        patch shows too little to say; ``anchor`` (144,): the patch holds the centre of a thing; ``ordinal`` (144,):
        1 to 4 for a patch that holds the centre of a plate's first to fourth digit, else 0; ``center`` (144, 2)
        float32: the thing's centre (x, y) as a share of the side; ``thing`` (144,): its index, -1 for background.
    """
    edges = np.arange(GRID) * PATCH
    labels = {slot: np.full((GRID, GRID), len(words)) for slot, words in WORD_SLOTS.items()}
    labels |= {name: np.zeros((GRID, GRID), np.int64) for name in ("anchor", "ordinal")}
    labels["thing"] = np.full((GRID, GRID), -1)
    center = np.zeros((GRID, GRID, 2), np.float32)

    def cover(low: float, high: float) -> np.ndarray:
        return np.clip(np.minimum(edges + PATCH, high) - np.maximum(edges, low), 0, PATCH) / PATCH

    best = np.zeros((GRID, GRID))
    for number, thing in enumerate(things):
        share = np.outer(
            cover(thing.y - thing.height / 2, thing.y + thing.height / 2),
            cover(thing.x - thing.width / 2, thing.x + thing.width / 2),
        )
        row, column = int(thing.y // PATCH), int(thing.x // PATCH)
        share[row, column] = 2
        mine, unsure = (share >= 0.3) & (share > best), (share > 0.04) & (share < 0.3) & (best == 0)
        best = np.maximum(best, share)
        for slot, value in (("color", thing.color), ("shape", thing.shape), ("size", thing.size), ("cell", thing.cell)):
            labels[slot][mine] = WORD_SLOTS[slot].index(value)
            labels[slot][unsure] = -100
        labels["thing"][mine] = number
        labels["anchor"][row, column] = 1
        center[mine] = (thing.x / SIDE, thing.y / SIDE)
        for place, ((x, y), digit) in enumerate(zip(thing.digit_centers(), thing.number, strict=True)):
            spot = int(y // PATCH), int(x // PATCH)
            labels["digit"][spot], labels["ordinal"][spot] = int(digit), place + 1
    flat = {name: value.reshape(-1).astype(np.int64) for name, value in labels.items()}
    return flat | {"center": center.reshape(-1, 2)}


def presence(things: list[Thing]) -> np.ndarray:
    """Which (colour, noun) pairs are in the picture: (49,) float32, what the CLS token learns to say."""
    there = np.zeros((len(COLORS), len(NOUNS)), np.float32)
    for thing in things:
        there[list(COLORS).index(thing.color), NOUNS.index(thing.shape)] = 1
    return there.reshape(-1)


class DenseScenes(Dataset[dict[str, Any]]):
    """Pictures with patch labels or questions packed into one sequence; none of them is an item of the suite.

    Args:
        word_ids: token id of each word and special token; None for pictures alone.
        questions: questions a picture.
        length: tokens of a packed sequence; what does not fit is left out.
        start: index of the first scene.
        pictures: how many.
        split: whose digits and photographs.
    """

    def __init__(
        self, word_ids: dict[str, int] | None = None, questions: int = 16, length: int = 224, start: int = 0,
        pictures: int = 100_000, split: str = "train",
    ) -> None:  # fmt: skip
        self.word_ids, self.questions, self.length = word_ids, questions, length
        self.start, self.pictures, self.split = start, pictures, split

    def __len__(self) -> int:
        return self.pictures

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng((_PRETRAIN_SEED, self.start + index))
        read = self.word_ids is None and index % 2  # every other picture for the tower alone is full of digits
        things = make_things(rng, self.split, *((3, 4), (2, 5)) if read else ())
        sample: dict[str, Any] = {"image": render(things, rng, self.split).transpose(2, 0, 1).copy()}
        labels = patch_labels(things)
        if self.word_ids is None:
            return sample | labels | {"presence": presence(things)}
        return sample | self._pack(things, labels, rng)

    def _pack(self, things: list[Thing], labels: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, Any]:
        assert self.word_ids is not None
        asker, index_of = Asker(things, rng), {id(thing): i for i, thing in enumerate(things)}
        ids = np.full(self.length, self.word_ids["<pad>"])
        targets, segment, place = np.full(self.length, -100), np.full(self.length, -1), np.zeros(self.length, np.int64)
        about = np.zeros((self.questions, GRID * GRID), bool)  # patches of the things that a question is about
        group = np.full(self.length, -1)
        used = 0
        for number in range(self.questions):
            which = int(rng.choice(len(GROUPS), p=[_SHARES[group] for group in GROUPS]))
            question = asker.ask(GROUPS[which])
            if question is None:
                continue
            tokens, answer_mask = encode_dialogue(question.turns, self.word_ids)
            stop = used + len(tokens)
            if stop > self.length:
                break
            ids[used:stop], segment[used:stop], place[used:stop] = tokens, number, np.arange(len(tokens))
            targets[used:stop] = np.where(answer_mask, tokens, -100)
            group[used:stop] = which
            wanted = [index_of[id(t)] for t in question.wanted]
            about[number] = np.isin(labels["thing"], wanted)
            used = stop
        keep_first = labels["anchor"] + (labels["ordinal"] > 0) + 0.5 * (labels["thing"] >= 0)
        return {
            "ids": ids, "targets": targets, "segment": segment, "place": place, "about": about, "group": group,
            "keep_first": keep_first.astype(np.float32),
        }  # fmt: skip


def encode_dialogue(turns: tuple[tuple[str, str], ...], word_ids: dict[str, int]) -> tuple[list[int], list[bool]]:
    """Tokens after the picture as the chat template lays them out, and which of them are the last answer's.

    Every answer of the dialogue is a target in pre-training, the earlier ones too.
    """
    tokens: list[int] = []
    answered: list[bool] = []
    for number, (question, answer) in enumerate(turns):
        opening = [] if number == 0 else [word_ids["<user>"]]
        asked = [*opening, *(word_ids[w] for w in question.split()), word_ids["<assistant>"]]
        said = [*(word_ids[w] for w in answer.split()), word_ids["</s>"]]
        tokens += asked + said
        answered += [False] * len(asked) + [True] * len(said)
    return tokens, answered


def as_pixels(image: Tensor) -> Tensor:
    """uint8 pictures (B, 3, 96, 96) -> what the processor makes of them: (value / 255 - 0.5) / 0.5."""
    return image.to(torch.float32) / 127.5 - 1
