"""Random choice: what every other way must beat.

With distillation from a teacher of all data, random subsets are as good as elaborate scores, or better, at every share:
Distilling the knowledge in data pruning, Ben-Baruch et al., 2024, https://arxiv.org/abs/2403.07854. Here the teacher is
the frozen model with all its tokens, so that is our setting.
"""

import numpy as np

from .clusters import Numbers


def choose_random(total: int, count: int, seed: int) -> Numbers:
    """Numbers of ``count`` of ``total`` items, ascending; those of a smaller share are among those of a larger."""
    return np.sort(np.random.default_rng(seed).permutation(total)[:count])
