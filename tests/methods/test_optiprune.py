"""OptiPrune cell by cell, token by token; and what left filled from what stayed."""

import pytest
import torch
from made_inputs import GRIDS, make_inputs
from torch.nn import functional

from prunezoo import PruneZooError, build_pruner
from prunezoo.training_free.optiprune import fill_back


def by_hand(tokens, cells, keep, side):
    """Slots that stay, and of each the slot that it is filled from."""
    n, given = len(tokens), side
    alike = [[float(functional.cosine_similarity(a, b, dim=0)) for b in tokens] for a in tokens]
    sums = [sum(row) for row in alike]
    grouped = {}
    while True:
        grouped.clear()
        for i, (tile, row, column) in enumerate(cells.tolist()):
            grouped.setdefault((tile, row // side, column // side), []).append(i)
        if len(grouped) <= (keep if side == given else keep // 2) or side > 50:
            break
        side += 1
    bases = [max(members, key=lambda i: sums[i]) for members in grouped.values()]
    bases = sorted(bases, key=lambda i: -sums[i])[:keep]
    others = sorted((i for i in range(n) if i not in bases), key=lambda i: max(alike[i][j] for j in bases))
    kept = sorted(bases + others[: keep - len(bases)])
    return kept, [i if i in kept else max(kept, key=lambda j: alike[i][j]) for i in range(n)]


@pytest.mark.parametrize("cell", [1, 2, 3])
@pytest.mark.parametrize("keep", [1, 2, 5, 9, 14, 19])
def test_by_hand(keep, cell):
    inputs = make_inputs(pad=2)
    tiles = inputs.cells.clone()
    tiles[0, 20:36, 0] = 1  # two tiles, of which the second begins within a row
    inputs = type(inputs)(inputs.features, inputs.valid, tiles)
    output = build_pruner("optiprune", cell=cell)(inputs, keep)
    filled = fill_back(output.kept_features(inputs), output)
    for row, (height, width) in enumerate(GRIDS):
        n = height * width
        kept, source = by_hand(inputs.features[row, :n], tiles[row, :n], keep, cell)
        assert output.index[row, :keep].tolist() == kept
        assert torch.equal(filled[row, :n], inputs.features[row, source])


def test_every_cell_has_a_token():
    inputs = make_inputs(grids=((6, 6),))
    cells = inputs.cells[0, build_pruner("optiprune")(inputs, 9).index[0]]
    assert len((cells // torch.tensor([1, 2, 2])).unique(dim=0)) == 9


def test_bad_fields_are_refused():
    with pytest.raises(PruneZooError, match="cell=0"):
        build_pruner("optiprune", cell=0)
