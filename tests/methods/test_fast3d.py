"""Fast3D's scorer beyond the shared contract: what it knows of pairs, and that all of it matters."""

import math
from dataclasses import replace

import pytest
import torch
from made_inputs import build, make_inputs

from prunezoo import PruneZooError
from prunezoo.core.registry import build_pruner
from prunezoo.learned.fast3d import pair_features


def test_pairs_equal_a_loop_over_them():
    inputs = make_inputs(pad=1)
    cells = inputs.cells.clone()
    cells[0, 20:36, 0] = 1  # rows 3 to 5 of the first picture are another tile, which has as many rows as its largest
    inputs = replace(inputs, cells=cells)
    found = pair_features(inputs)
    for image in range(len(cells)):
        tiles = cells[image, inputs.valid[image]].tolist()
        largest = {tile: [1 + max(c[axis] for c in tiles if c[0] == tile) for axis in (1, 2)] for tile, _, _ in tiles}
        for i, (tile, row, column) in enumerate(tiles):
            for j, (other, below, beside) in enumerate(tiles):
                down = (below + 0.5) / largest[other][0] - (row + 0.5) / largest[tile][0]
                right = (beside + 0.5) / largest[other][1] - (column + 0.5) / largest[tile][1]
                flat, whole = math.hypot(down, right), math.hypot(down, right, other - tile)
                expected = [whole, 0, 0, 0, 0]
                if flat > 1e-6:
                    expected[1:3] = down / flat, right / flat
                if whole > 1e-6:
                    expected[3:] = (other - tile) / whole, flat / whole
                if flat > 1e-6 or flat == 0:
                    torch.testing.assert_close(found[image, i, j], torch.tensor(expected), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_prompt_the_place_and_the_picture_matter():
    pruner, inputs = build("fast3d"), make_inputs()
    scores = pruner.score(inputs)[inputs.valid]
    assert inputs.text is not None
    moved = inputs.cells.clone()
    moved[..., 1] = torch.where(moved[..., 1] >= 0, 5 - moved[..., 1], -1)
    for change in ({"text": inputs.text.flip(0)}, {"features": inputs.features.flip(1)}, {"cells": moved.clamp_min(0)}):
        assert (pruner.score(replace(inputs, **change))[inputs.valid] - scores).abs().max() > 1e-3
    with pytest.raises(PruneZooError, match="fast3d reads the prompt and got none"):
        pruner.score(replace(inputs, text=None))
    with pytest.raises(PruneZooError, match=r"built for tokens of width 64, .* build it with width=32"):
        build_pruner("fast3d", width=64, hidden=16, heads=2).score(inputs)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"layers": 0}, "layers must be at least 1"), ({"hidden": 20, "heads": 4}, r"a multiple of 2 \* heads=8")],
)
def test_sizes_that_cannot_be_are_refused(wrong, said):
    with pytest.raises(PruneZooError, match=said):
        build_pruner("fast3d", **wrong)
