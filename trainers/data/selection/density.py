"""Density-based pruning (DBP): more items from wide clusters that lie far from others, and the far ones of each.

Effective pruning of web-scale datasets based on complexity of concept clusters, Abbas et al., 2024,
https://arxiv.org/abs/2401.04578, section 3, as released: duplicates go first; a cluster's part is a softmax of how wide
it is times how far its neighbours are; a quadratic program keeps the counts between a floor and what there is. That
program has a closed form up to one number, by which it is solved here. The release divides by a temperature of 0.5
(its notes hint at 0.1 for the paper: not settled). Left out: their filter by CLIP score, which asks whether a caption
fits its picture.

Letters: M items, K clusters.
"""

import numpy as np

from .clusters import Clusters, Floats, Numbers, without_duplicates

NEIGHBOURS = 20
"""Nearest centres that say how far a cluster lies from others."""
FLOOR = 0.5
"""Share of an even part that each cluster has for sure."""


def choose_by_density(clusters: Clusters, count: int, temperature: float, epsilon: float) -> Numbers:
    """Choose items.

    Args:
        clusters: of M items.
        count: of items to choose, at most M.
        temperature: above 0; the lower, the more the parts differ.
        epsilon: two items whose cosine similarity is above 1 - epsilon are duplicates; of these, those that are left
            out come back where too few others are there.

    Returns:
        (count,) their numbers, ascending.
    """
    stay = without_duplicates(clusters, epsilon)
    if len(stay) < count:
        gone = np.setdiff1d(np.arange(len(clusters.of)), stay)
        gone = gone[np.argsort(-clusters.distance[gone], kind="stable")]
        return np.sort(np.concatenate([stay, gone[: count - len(stay)]]))
    of, distance = clusters.of[stay], clusters.distance[stay]
    sizes = np.bincount(of, minlength=len(clusters.centres))
    width = np.bincount(of, distance, len(sizes)) / np.maximum(sizes, 1)
    counts = quotas(parts(width * apart(clusters.centres), temperature), sizes, count)
    chosen = []
    for number, wanted in enumerate(counts):
        members = np.flatnonzero(of == number)
        chosen.append(stay[members[np.argsort(-distance[members], kind="stable")][:wanted]])
    return np.sort(np.concatenate(chosen))


def apart(centres: Floats) -> Floats:
    """(K,) mean cosine distance of each centre to its nearest others; 1 where there is none."""
    if len(centres) == 1:
        return np.ones(1)
    distances = 1 - centres @ centres.T
    np.fill_diagonal(distances, np.inf)
    return np.sort(distances, axis=1)[:, : min(NEIGHBOURS, len(centres) - 1)].mean(1)


def parts(complexity: Floats, temperature: float) -> Floats:
    """(K,) the part of each cluster, which sum to 1."""
    power = complexity / temperature
    weights = np.exp(power - power.max())
    return weights / weights.sum()


def quotas(part: Floats, sizes: Numbers, count: int) -> Numbers:
    """How many items of each cluster: nearest to ``part * count`` between a floor and its size, ``count`` in all.

    The nearest in squares is ``clip(part * count + shift, floor, size)`` for the one shift that sums up right, which is
    found by bisection; what is left over by rounding goes to the largest remainders.

    Args:
        part: (K,) parts that sum to 1.
        sizes: (K,) items that there are, at least ``count`` in all.
        count: of items.
    """
    floor = np.maximum(np.minimum(FLOOR * count / len(sizes), sizes - 1), 0.0)
    low, high = -float(count) - 1, float(sizes.max()) + 1
    for _ in range(100):
        shift = (low + high) / 2
        if np.clip(part * count + shift, floor, sizes).sum() < count:
            low = shift
        else:
            high = shift
    wanted = np.clip(part * count + high, floor, sizes)
    whole = np.floor(wanted + 1e-9).astype(np.int64)
    rest = np.argsort(-(wanted - whole), kind="stable")
    whole[rest[: count - whole.sum()]] += 1
    return whole
