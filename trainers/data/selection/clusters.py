"""Clusters of items by k-means on the sphere (scikit-learn's k-means of vectors of length 1)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.cluster import KMeans

from prunezoo.core.errors import PruneZooError

Floats = NDArray[np.float64]
Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Clusters:
    """Items in clusters.

    Attributes:
        embeddings: (M, E), each of length 1.
        centres: (K, E), each of length 1.
        of: (M,) the cluster of each item.
        distance: (M,) in [0, 2], cosine distance of each item to the centre of its cluster.
    """

    embeddings: Floats
    centres: Floats
    of: Numbers
    distance: Floats

    @property
    def sizes(self) -> Numbers:
        """(K,) items of each."""
        return np.bincount(self.of, minlength=len(self.centres))


def cluster(embeddings: Floats, count: int, seed: int) -> Clusters:
    """Find clusters.

    Args:
        embeddings: (M, E), none of them zero.
        count: K, of the clusters; at most M.
        seed: of where k-means begins.

    Raises:
        PruneZooError: more clusters than items, or fewer than one.
    """
    if not 1 <= count <= len(embeddings):
        raise PruneZooError(f"--clusters {count}: between 1 and the {len(embeddings)} items that there are")
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    found = KMeans(count, n_init=1, max_iter=100, random_state=seed).fit(unit)
    centres = found.cluster_centers_
    centres = centres / np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12)
    of = found.labels_.astype(np.int64)
    return Clusters(unit, centres, of, 1 - (unit * centres[of]).sum(1))


def without_duplicates(clusters: Clusters, epsilon: float) -> Numbers:
    """Items that are not nearly another one; which of a set of duplicates stays is the one farthest from the centre.

    SemDeDup: Data-efficient learning at web-scale through semantic deduplication, Abbas et al., 2023,
    https://arxiv.org/abs/2303.09540: within each cluster, from the hardest on, an item goes whose cosine similarity to
    one before it is above 1 - epsilon.

    Args:
        clusters: of M items.
        epsilon: in [0, 2]; 0: only what is equal goes.

    Returns:
        Numbers of the items that stay, ascending.
    """
    stay = []
    for number in range(len(clusters.centres)):
        members = np.flatnonzero(clusters.of == number)
        members = members[np.argsort(-clusters.distance[members], kind="stable")]
        likeness = clusters.embeddings[members] @ clusters.embeddings[members].T
        before = np.triu(np.ones(likeness.shape, bool), 1)
        stay.append(members[likeness.max(0, initial=-2.0, where=before) <= 1 - epsilon])
    return np.sort(np.concatenate(stay))
