"""Distance to prototypes: an item is hard where it is far from the centre of its cluster.

Beyond neural scaling laws: beating power law scaling via data pruning, Sorscher et al., 2022,
https://arxiv.org/abs/2206.14486, section 4: keep the hard ones of plenty, the easy ones of little. Second-hand
(reconstructed): that each class keeps at least half of what an even share would leave it; here a class is a question
group. Embeddings are the frozen model's own, where the paper has a self-supervised encoder.
"""

from typing import Literal

import numpy as np

from .clusters import Clusters, Numbers


def choose_by_prototype(
    clusters: Clusters, groups: Numbers, count: int, hold: Literal["hard", "easy"], floor: float = 0.5
) -> Numbers:
    """Choose items by their distance to the centre of their cluster.

    Args:
        clusters: of M items.
        groups: (M,) the question group of each.
        count: of items to choose.
        hold: the far ones, or the near ones.
        floor: share in [0, 1] of an even part that each group has for sure, as far as it has so many.

    Returns:
        (count,) their numbers, ascending.
    """
    order = np.argsort(-clusters.distance if hold == "hard" else clusters.distance, kind="stable")
    names = np.unique(groups)
    each = int(floor * count / len(names))
    sure = np.concatenate([order[groups[order] == name][:each] for name in names])
    rest = order[~np.isin(order, sure)]
    return np.sort(np.concatenate([sure, rest[: count - len(sure)]]))
