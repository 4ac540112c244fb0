"""Retention with bootstrap intervals, paired over items and stratified by question group.

Letters: M methods (a pruner at a budget), I items, G groups, R resamples.
Retention of a group = accuracy of the method / accuracy of the full model, in percent; mean retention = mean over the
groups, so that a group counts the same however many items it has. A group in which the full model answers nothing has
no retention (NaN) and stays out of the mean.
Percentile intervals: Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
CHUNK = 250
"""Resamples that are drawn at once: bounds the memory at CHUNK x items of a group."""


@dataclass(frozen=True)
class Resampled:
    """Accuracies over the items as they are, and over resamples of them.

    Attributes:
        accuracy: (M, G) in [0, 1].
        full: (G,) the full model's.
        accuracy_draws: (M, G, R) over the resampled items; resample r draws the same items for every method.
        full_draws: (G, R).
    """

    accuracy: Floats
    full: Floats
    accuracy_draws: Floats
    full_draws: Floats

    def retention(self) -> Floats:
        """Retention (M, G + 1) in percent, the mean over groups last."""
        return _with_mean(_percent(self.accuracy, self.full), axis=1)

    def retention_draws(self) -> Floats:
        """Retention (M, G + 1, R) in each resample, the mean over groups last."""
        return _with_mean(_percent(self.accuracy_draws, self.full_draws), axis=1)


def resample(
    correct: Floats, full: Floats, group_of: NDArray[np.int64], groups: int, resamples: int = 2000, seed: int = 0
) -> Resampled:
    """Bootstrap the accuracy of every method over the same resampled items.

    Args:
        correct: (M, I) in [0, 1]; fractions where a method is a mean of seeds.
        full: (I,) 1 where the full model is right.
        group_of: (I,) index of each item's group in [0, groups); every group has an item.
        groups: G.
        resamples: R.
        seed: of the resampling; it moves nothing that is measured.
    """
    rng = np.random.default_rng(seed)
    everything = np.concatenate([correct, full[None]]).astype(np.float64)  # (M + 1, I)
    means = np.empty((len(everything), groups))
    draws = np.empty((len(everything), groups, resamples))
    for group in range(groups):
        values = everything[:, group_of == group]  # (M + 1, n)
        n = values.shape[1]
        means[:, group] = values.mean(axis=1)
        for start in range(0, resamples, CHUNK):
            size = min(CHUNK, resamples - start)
            # drawing n of n with replacement is a multinomial count for each item
            counts = rng.multinomial(n, np.full(n, 1 / n), size=size)  # (size, n)
            draws[:, group, start : start + size] = values @ counts.T / n
    return Resampled(means[:-1], means[-1], draws[:-1], draws[-1])


def interval(draws: Floats, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of draws (R,); NaN where nothing is defined."""
    defined = draws[~np.isnan(draws)]
    if not len(defined):
        return float("nan"), float("nan")
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _percent(part: Floats, whole: Floats) -> Floats:
    """100 * part / whole, NaN where the whole is 0."""
    return np.divide(100 * part, whole, out=np.full(part.shape, np.nan), where=np.broadcast_to(whole > 0, part.shape))


def _with_mean(values: Floats, axis: int) -> Floats:
    """Append the mean over the defined entries of an axis; NaN where none is defined."""
    defined = ~np.isnan(values)
    count = defined.sum(axis=axis, keepdims=True)
    total = np.where(defined, values, 0.0).sum(axis=axis, keepdims=True)
    mean = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return np.concatenate([values, mean], axis=axis)
