"""Magnitude: the smallest weights go.

Han et al., Learning both Weights and Connections for Efficient Neural Networks, NeurIPS 2015,
https://arxiv.org/abs/1506.02626, without its tuning unless that is asked for. The sweep by part is that of a study of
Stable Diffusion 2, in which plain magnitude beat newer criteria, parts differed in how much they bear, and pictures
broke all at once beyond that. Its scope (global or by layer) could not be found: here it is the caller's choice.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from prunezoo.core.contract import Pruner
from prunezoo.core.errors import PruneZooError

from .weights import ALL, Masks, apply_masks, keep_largest, matrices, parts_of


def magnitude_masks(pruner: Pruner, sparsity: float, part: str = ALL, even: bool = False) -> Masks:
    """Where the largest weights of a pruner, or of a part of it, are.

    Args:
        pruner: A trained one; not changed.
        sparsity: Share of the part's weights that go, in (0, 1).
        part: One of :func:`parts_of`.
        even: The same share of every matrix.

    Raises:
        PruneZooError: No such part.
    """
    parts = parts_of(pruner)
    if part not in parts and part != ALL:
        raise PruneZooError(f"--part {part}: '{pruner.name}' has {', '.join(parts)}")
    return keep_largest(pruner, sparsity, parts.get(part, tuple(matrices(pruner))), even)


def sweep(pruner: Pruner, grid: Sequence[float], even: bool = False) -> dict[str, Pruner]:
    """A copy for each part and sparsity, by name: `PART SPARSITY`, whole parts first.

    Args:
        pruner: A trained one; not changed.
        grid: Sparsities in (0, 1), ascending.
        even: See :func:`magnitude_masks`.
    """
    found: dict[str, Pruner] = {}
    for part in parts_of(pruner):
        for sparsity in grid:
            copy = deepcopy(pruner)
            apply_masks(copy, magnitude_masks(copy, sparsity, part, even))
            found[f"{part} {sparsity:g}"] = copy
    return found


def cliffs(rows: Sequence[dict[str, Any]], drop: float) -> dict[str, float | None]:
    """For each part the largest sparsity before the first one at which retention has surely fallen by more than `drop`.

    Args:
        rows: Of a sweep: `{part, sparsity, difference_ci}`, the last the 95 % interval of the points of retention by
            which it is above the pruner as it was; of each part by ascending sparsity.
        drop: Points of retention.

    Returns:
        By part; None where the first sparsity is one too many.
    """
    found: dict[str, float | None] = {}
    over: set[str] = set()
    for row in rows:
        part = row["part"]
        found.setdefault(part, None)
        if row["difference_ci"][1] is not None and row["difference_ci"][1] < -drop:
            over.add(part)
        if part not in over:
            found[part] = row["sparsity"]
    return found
