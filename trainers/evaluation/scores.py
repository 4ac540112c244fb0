"""What is kept of a measurement: a few numbers for each item, method and budget."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FULL, NONE = "full", "none"
"""Names of the two rows that are always there: all tokens, and no image token at all."""
ALL_TOKENS, NO_TOKENS = "1.0", "0"
"""The budgets of these two rows."""

ORACLE, ATTENTION, RELEVANCE = "oracle", "attention", "relevance"
"""Diagnostics: what lies on what the question is about; the full model's own attention, `attention@L`; and its
relevance map for the reference answer."""
GUIDE = "guide@"
"""In front of the name of a guide of training, `guide@lrp`: likewise, its map."""

Key = tuple[str, str]
"""(method, budget), both as written on the command line."""


def is_diagnostic(method: str) -> bool:
    """Whether a method knows what no pruner can know before the language model has run."""
    return method in (ORACLE, RELEVANCE) or method.startswith((f"{ATTENTION}@", f"{ATTENTION}-mean@", GUIDE))


@dataclass(frozen=True)
class ItemScores:
    """One method at one budget on I items; a method with several seeds holds their means.

    Attributes:
        layers: (I, layers) image tokens that each layer of the language model really read.
        correct: (I,) 1 where the greedy answer is the reference answer, to the end token.
        agreement: (I,) 1 where every answer position has the full model's first choice.
        kl: (I,) KL(full || pruned) in nats, mean over the answer positions.
        flops: (I,) operations of tower and language model, as a share of those with all tokens; nan where not known.
    """

    layers: NDArray[np.float64]
    correct: NDArray[np.float64]
    agreement: NDArray[np.float64]
    kl: NDArray[np.float64]
    flops: NDArray[np.float64]

    @property
    def tokens(self) -> NDArray[np.float64]:
        """(I,) image tokens, mean over the layers."""
        return self.layers.mean(1)

    @classmethod
    def empty(cls, items: int, depth: int) -> "ItemScores":
        """Zeros for so many items and layers, to be filled."""
        return cls(np.zeros((items, depth)), *(np.zeros(items) for _ in range(4)))


@dataclass(frozen=True)
class Measurement:
    """Everything measured in one run.

    Attributes:
        groups: names of the question groups that have items, in the suite's order.
        group_of: (I,) index into groups.
        chance: accuracy of guessing, for each group, in [0, 1].
        scores: by (method, budget), in the order of the command line; (`full`, "1.0") and (`none`, "0") are there.
    """

    groups: tuple[str, ...]
    group_of: NDArray[np.int64]
    chance: Mapping[str, float]
    scores: Mapping[Key, ItemScores]

    @property
    def items(self) -> int:
        """Number of items, I."""
        return len(self.group_of)
