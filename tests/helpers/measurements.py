"""Measurements whose figures are known, and a name that nobody should have."""

from dataclasses import replace

import numpy as np

from trainers.evaluation.scores import ItemScores, Measurement

ESCAPE = "x\x1b[31mred\x1b]0;title\x07"
"""A name that would colour a terminal and rename its window."""
HEADER = {"vlm": "v", "suite": "s", "split": "test", "command": "c", "seed": 0, "weights": {}}
"""Of a record."""


def measurement() -> Measurement:
    """Two groups of 50; `good` loses nothing, `bad` half of the second group, at one budget."""
    group_of = np.arange(100) // 50
    right, half = np.ones(100), np.where((group_of == 1) & (np.arange(100) % 2 == 0), 0.0, 1.0)

    def scores(correct: np.ndarray, tokens: int) -> ItemScores:
        return ItemScores(np.full((100, 2), float(tokens)), correct, correct, np.zeros(100), np.ones(100))

    return Measurement(
        ("colour", "count"),
        group_of,
        {"colour": 0.25, "count": 0.1},
        {
            ("full", "1.0"): scores(right, 144),
            ("none", "0"): scores(np.zeros(100), 0),
            ("good", "1/9"): scores(right, 16),
            ("bad", "1/9"): scores(half, 16),
        },
    )


def measured(full, none, own, groups=1):
    """Items of `groups` groups that the full model, zero tokens and a pruner answer with these chances."""
    rng = np.random.default_rng(0)
    m = measurement()
    template = m.scores["full", "1.0"]
    names = tuple(f"g{number}" for number in range(groups))
    chances = {("full", "1.0"): full, ("none", "0"): none, ("good", "1/9"): own, ("bad", "1/9"): own}
    drawn = {key: [rng.permutation(np.arange(50) < 50 * p) for p in of] for key, of in chances.items()}
    of = {key: np.concatenate(parts).astype(float) for key, parts in drawn.items()}

    def scores(key):
        right = of[key]
        tokens = {"full": 144.0, "none": 0.0}.get(key[0], 16.0)
        own = {"correct": right, "agreement": right, "kl": right * 0, "flops": np.ones(len(right))}
        return replace(template, layers=np.full((len(right), 2), tokens), **own)

    return replace(
        m, groups=names, group_of=np.arange(50 * groups) // 50, chance={}, scores={key: scores(key) for key in of}
    )
