"""A measurement whose figures are known."""

import numpy as np

from trainers.evaluation.scores import ItemScores, Measurement


def measurement() -> Measurement:
    """Two groups of 50; `good` loses nothing, `bad` half of the second group, at one budget."""
    group_of = np.arange(100) // 50
    right, half = np.ones(100), np.where((group_of == 1) & (np.arange(100) % 2 == 0), 0.0, 1.0)

    def scores(correct: np.ndarray, tokens: int) -> ItemScores:
        return ItemScores(np.full((100, 2), float(tokens)), correct, correct, np.zeros(100))

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
