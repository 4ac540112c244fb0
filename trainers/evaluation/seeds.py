"""Means over trainings that differ by their seed alone.

Intervals are over the questions, drawn alike for all seeds; how far the seeds lie apart is told beside them.

Letters: M methods (a pruner at a budget), R resamples of the questions.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .statistics import Floats, interval


def mean_of(points: Floats, own: Sequence[int]) -> dict[str, Any]:
    """The mean retention of some seeds, and each one's.

    Args:
        points: ``(M,)`` retention of all methods, in percent.
        own: Numbers of the seeds' methods.

    Returns:
        `{retention, of_seeds}`, in percent.
    """
    own = list(own)
    return {"retention": round(float(points[own].mean()), 3), "of_seeds": np.round(points[own], 3).tolist()}


def difference_of(points: Floats, draws: Floats, own: Sequence[int], rivals: Sequence[int]) -> dict[str, Any]:
    """By how much the mean of some seeds is above that of others.

    Args:
        points: ``(M,)`` retention of all methods, in percent.
        draws: ``(M, R)`` of each resample.
        own: Numbers of the seeds' methods.
        rivals: Those of the others.

    Returns:
        `{difference, ci}`, in points, with its 95 % interval over the questions.
    """
    own, rivals = list(own), list(rivals)
    ends = interval(draws[own].mean(0) - draws[rivals].mean(0))
    difference = points[own].mean() - points[rivals].mean()
    return {"difference": round(float(difference), 3), "ci": np.round(ends, 3).tolist()}
