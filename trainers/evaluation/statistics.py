"""Retention with bootstrap intervals, paired over items and stratified by question group.

Letters: M methods (a pruner at a budget), I items, G groups, R resamples.
Retention of a group = accuracy of the method / accuracy of the full model, in percent; mean retention = mean over the
groups, so that a group counts the same however many items it has.
Where the full model may be no better than with zero tokens there is nothing to retain: where the interval of the paired
difference between the two reaches 0, a group has no retention (NaN) and stays out of the mean; where that of the mean
over all groups does, nothing has.
Percentile intervals: Efron & Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
"""

from dataclasses import dataclass
from functools import cached_property

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
        none: (G,) that of zero tokens; None where it is not known, and nothing is held against it.
        none_draws: (G, R).
    """

    accuracy: Floats
    full: Floats
    accuracy_draws: Floats
    full_draws: Floats
    none: Floats | None = None
    none_draws: Floats | None = None

    def retention(self) -> Floats:
        """Retention (M, G + 1) in percent, the mean over groups last."""
        return self._seen(_with_mean(_percent(self.accuracy, self.full, self.seen[:-1]), axis=1))

    def retention_draws(self) -> Floats:
        """Retention (M, G + 1, R) in each resample, the mean over groups last."""
        seen = self.seen[:-1, None]
        return self._seen(_with_mean(_percent(self.accuracy_draws, self.full_draws, seen), axis=1))

    def sight(self) -> Floats:
        """By how much the full model is above zero tokens: (G + 1, 3), points and interval, the mean last."""
        assert self.none is not None and self.none_draws is not None
        points = _with_mean(100 * (self.full - self.none), axis=0)
        draws = _with_mean(100 * (self.full_draws - self.none_draws), axis=0)
        return np.array([(point, *interval(drawn)) for point, drawn in zip(points, draws, strict=True)])

    @cached_property
    def seen(self) -> NDArray[np.bool_]:
        """(G + 1,) whether the full model is above zero tokens for certain: where it is not, nothing is retained."""
        return np.ones(len(self.full) + 1, dtype=bool) if self.none is None else self.sight()[:, 1] > 0

    def _seen(self, values: Floats) -> Floats:
        """Retention (M, G + 1, …), NaN where the mean over all groups is not seen."""
        return values if self.seen[-1] else np.full_like(values, np.nan)


def resample(
    correct: Floats,
    full: Floats,
    group_of: NDArray[np.int64],
    groups: int,
    resamples: int = 2000,
    seed: int = 0,
    none: Floats | None = None,
) -> Resampled:
    """Bootstrap the accuracy of every method over the same resampled items.

    Args:
        correct: (M, I) in [0, 1]; fractions where a method is a mean of seeds.
        full: (I,) 1 where the full model is right.
        group_of: (I,) index of each item's group in [0, groups); every group has an item.
        groups: G.
        resamples: R.
        seed: of the resampling; it moves nothing that is measured.
        none: (I,) 1 where zero tokens are right; None where that was not measured.
    """
    rng = np.random.default_rng(seed)
    base = [full] if none is None else [full, none]
    everything = np.concatenate([correct, *(values[None] for values in base)]).astype(np.float64)  # (M + 1 or 2, I)
    means = np.empty((len(everything), groups))
    draws = np.empty((len(everything), groups, resamples))
    for group in range(groups):
        values = everything[:, group_of == group]  # (…, n)
        n = values.shape[1]
        means[:, group] = values.mean(axis=1)
        for start in range(0, resamples, CHUNK):
            size = min(CHUNK, resamples - start)
            # drawing n of n with replacement is a multinomial count for each item
            counts = rng.multinomial(n, np.full(n, 1 / n), size=size)  # (size, n)
            draws[:, group, start : start + size] = values @ counts.T / n
    m = len(correct)
    blind = {} if none is None else {"none": means[m + 1], "none_draws": draws[m + 1]}
    return Resampled(means[:m], means[m], draws[:m], draws[m], **blind)


def interval(draws: Floats, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of draws (R,); NaN where nothing is defined."""
    defined = draws[~np.isnan(draws)]
    if not len(defined):
        return float("nan"), float("nan")
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _percent(part: Floats, whole: Floats, seen: NDArray[np.bool_]) -> Floats:
    """100 * part / whole, NaN where the whole is 0 or not seen."""
    defined = np.broadcast_to((whole > 0) & seen, part.shape)
    return np.divide(100 * part, whole, out=np.full(part.shape, np.nan), where=defined)


def _with_mean(values: Floats, axis: int) -> Floats:
    """Append the mean over the defined entries of an axis; NaN where none is defined."""
    defined = ~np.isnan(values)
    count = defined.sum(axis=axis, keepdims=True)
    total = np.where(defined, values, 0.0).sum(axis=axis, keepdims=True)
    mean = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return np.concatenate([values, mean], axis=axis)
