"""The rivals against independent references: what each is said to do, done the slow way."""

from dataclasses import replace

import pytest
import torch
from made_inputs import make_inputs
from torch.nn import functional

from prunezoo import PruneInputs, PruneZooError, build_pruner


def grid(height, width, tiles=1):
    cells = []
    for tile in range(tiles):
        for row in range(height):
            cells += [[tile, row, column] for column in range(width)]
    cells = torch.tensor(cells)[None]
    n = cells.shape[1]
    features = torch.randn(1, n, 8, generator=torch.Generator().manual_seed(n))
    return PruneInputs(features, torch.ones(1, n, dtype=torch.bool), cells)


@pytest.mark.parametrize("name", ["uniform", "pool", "resize", "divprune", "random"])
@pytest.mark.parametrize("shape", [(12, 12), (5, 7), (1, 9), (3, 16)], ids=str)
def test_every_budget_is_met_on_every_grid(name, shape):
    inputs, pruner = grid(*shape), build_pruner(name).eval()
    for keep in range(1, shape[0] * shape[1] + 1):
        assert len(set(pruner(inputs, keep).index[0].tolist())) == keep


@pytest.mark.parametrize("name", ["uniform", "pool", "resize"])
def test_tiles_share_the_budget(name):
    inputs, pruner = grid(4, 4, tiles=3), build_pruner(name).eval()
    cells = inputs.cells[0][pruner(inputs, 24).index[0]]
    assert cells[:, 0].bincount().tolist() == [8, 8, 8]
    assert torch.equal(pruner(inputs, 1.0).kept_features(inputs), inputs.features)


def test_pool_is_average_pooling_where_the_budget_divides_the_grid():
    inputs = grid(12, 12)
    picture = inputs.features.view(1, 12, 12, 8).permute(0, 3, 1, 2)
    for side in (2, 3, 4, 6):
        expected = functional.adaptive_avg_pool2d(picture, side).flatten(2).transpose(1, 2)
        torch.testing.assert_close(build_pruner("pool")(inputs, side * side).features, expected)


def test_resize_is_bilinear_interpolation_where_the_budget_is_a_square():
    inputs = grid(12, 12)
    picture = inputs.features.view(1, 12, 12, 8).permute(0, 3, 1, 2)
    for side in (2, 3, 5, 7):
        expected = functional.interpolate(picture, size=(side, side), mode="bilinear").flatten(2).transpose(1, 2)
        torch.testing.assert_close(build_pruner("resize")(inputs, side * side).features, expected, rtol=1e-4, atol=1e-5)
    holed = PruneInputs(inputs.features[:, 1:], inputs.valid[:, 1:], inputs.cells[:, 1:])
    with pytest.raises(PruneZooError, match="rectangles"):
        build_pruner("resize")(holed, 5)


def test_uniform_leaves_no_hole():
    for keep, reach in ((48, 2), (32, 3), (16, 3), (8, 4)):
        inputs = grid(12, 12)
        kept = inputs.cells[0, build_pruner("uniform")(inputs, keep).index[0], 1:]
        distance = (inputs.cells[0, :, None, 1:] - kept[None]).abs().amax(-1).amin(1)
        assert distance.max() <= reach


def test_divprune_is_greedy_max_min():
    inputs = make_inputs(pad=2)
    output = build_pruner("divprune")(inputs, 6)
    for row in range(3):
        unit = functional.normalize(inputs.features[row][inputs.valid[row]].double(), dim=-1)
        distance = (1 - unit @ unit.T).round(decimals=6)  # two that are each other's nearest are equally far
        n = len(unit)
        chosen = [max(range(n), key=lambda i: min(float(distance[i, j]) for j in range(n) if j != i))]
        while len(chosen) < 6:
            rest = [i for i in range(n) if i not in chosen]
            chosen.append(max(rest, key=lambda i: min(float(distance[i, j]) for j in chosen)))
        assert output.index[row].tolist() == sorted(chosen)


def test_divprune_never_takes_a_token_twice():
    inputs = grid(3, 3)
    same = PruneInputs(torch.ones_like(inputs.features), inputs.valid, inputs.cells)
    assert build_pruner("divprune")(same, 5).index[0].unique().numel() == 5


def test_fastervlm_keeps_the_most_attended():
    inputs = make_inputs()
    attention = inputs.signals["cls_attention"].masked_fill(~inputs.valid, -1)
    output = build_pruner("fastervlm")(inputs, 5)
    assert torch.equal(output.index, attention.topk(5).indices.sort().values)


def test_random_depends_on_seed_image_and_question_alone():
    inputs = make_inputs()
    one = build_pruner("random", seed=1)(inputs, 6).index
    assert torch.equal(one, build_pruner("random", seed=1)(inputs, 6).index)
    assert not torch.equal(one, build_pruner("random", seed=2)(inputs, 6).index)
    noisy = replace(inputs, features=inputs.features * (1 + 1e-7))
    assert torch.equal(one, build_pruner("random", seed=1)(noisy, 6).index)
    asked = PruneInputs(inputs.features, inputs.valid, inputs.cells, inputs.text * 2, inputs.text_valid)
    assert not torch.equal(one, build_pruner("random", seed=1)(asked, 6).index)
    state = torch.get_rng_state()
    build_pruner("random")(inputs, 6)
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(PruneZooError, match="seed=-1"):
        build_pruner("random", seed=-1)
