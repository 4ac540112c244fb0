"""Subsets of image tokens that are drawn of questions, always the same ones of the same question.

What is drawn depends on the seed, the question's place in its suite and the scores, and on nothing else of a batch. A
smaller budget keeps the first tokens of the same draws.

Letters: B items of a batch, R images of them, N image tokens of an image (padded), G draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prunezoo.core.errors import PruneZooError
from prunezoo.core.subsets import draw_subsets, subset_mask


@dataclass(frozen=True)
class Draws:
    """How subsets are drawn.

    Attributes:
        number: G, at least 1.
        temperature: above 0; scores are divided by it, so that a higher one draws more evenly.
        seed: at least 0.

    Raises:
        PruneZooError: one of them is outside its range.
    """

    number: int = 16
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.number < 1:
            raise PruneZooError(f"--draws {self.number}: at least 1")
        if not 0 < self.temperature < float("inf"):
            raise PruneZooError(f"--temperature {self.temperature}: a number above 0, as 0.4")
        if self.seed < 0:
            raise PruneZooError(f"--seed {self.seed}: at least 0")


def draw_masks(
    scores: Tensor,
    valid: Tensor,
    keep: Tensor,
    rows: Sequence[int],
    places: Sequence[int],
    draws: Draws,
    by_lot: bool = False,
) -> Tensor:
    """The subsets that are drawn of each image.

    Args:
        scores: (R, N) float; by lot they say nothing.
        valid: (R, N) bool.
        keep: (R,) long, tokens of each subset.
        rows: (R) the item of the batch that each image belongs to.
        places: (B) places of the items in their suite.
        draws: how.
        by_lot: all tokens alike, and other random numbers.

    Returns:
        (G, R, N) bool, where the scores are.
    """
    sources = {}
    for item in dict.fromkeys(rows):
        words = np.random.SeedSequence((draws.seed, places[item], int(by_lot))).generate_state(1, np.uint64)
        sources[item] = torch.Generator().manual_seed(int(words[0] >> 1))
    masks = torch.zeros(draws.number, *valid.shape, dtype=torch.bool)
    known, there, counts = scores.detach().float().cpu() / draws.temperature, valid.cpu(), keep.cpu()
    for row, item in enumerate(rows):  # each image alone, else padding would move the random numbers
        slots = there[row].nonzero()[:, 0]
        own = torch.zeros(1, len(slots)) if by_lot else known[row : row + 1, slots]
        every = torch.ones_like(own, dtype=torch.bool)
        order, drawn = draw_subsets(own, every, counts[row : row + 1], draws.number, sources[item])
        masks[:, row, slots] = subset_mask(order, drawn)[:, 0]
    return masks.to(valid.device)
