"""PixelPrune against loops over cells written from its words; what it promises; what its options refuse."""

import pytest
import torch

from prunezoo import PruneInputs, PruneZooError, build_pruner


def inputs_of(*cubes):
    """Of each image ``(tiles, rows, columns, D)``."""
    rows, cells = [], []
    for cube in cubes:
        axes = torch.meshgrid(*(torch.arange(size) for size in cube.shape[:3]), indexing="ij")
        rows.append(cube.flatten(0, 2))
        cells.append(torch.stack(axes, -1).flatten(0, 2))
    most = max(map(len, rows))
    features, places = torch.full((len(rows), most, rows[0].shape[1]), 50.0), torch.full((len(rows), most, 3), -1)
    valid = torch.zeros(len(rows), most, dtype=torch.bool)
    for i, (own, where) in enumerate(zip(rows, cells, strict=True)):
        features[i, : len(own)], places[i, : len(own)], valid[i, : len(own)] = own, where, True
    return PruneInputs(features, valid, places)


def slow(cube, tolerance, anchored, past=False):
    """Cell by cell: which stay, and the picture filled in from them."""

    def like(one, two):
        return bool((one - two).abs().max() <= tolerance)

    filled, kept = cube.clone(), torch.zeros(cube.shape[:3], dtype=torch.bool)
    known = filled if anchored else cube
    for tile in range(cube.shape[0]):
        for row in range(cube.shape[1]):
            for column in range(cube.shape[2]):
                own = cube[tile, row, column]
                left = known[tile, row, column - 1] if column else None
                above = known[tile, row - 1, column] if row else None
                guess = above if left is None else left
                if left is not None and above is not None:
                    corner = known[tile, row - 1, column - 1]
                    guess = above if like(corner, left) and not like(corner, above) else left
                before = cube[tile - 1, row, column] if past and tile else None
                if guess is not None and like(own, guess):
                    filled[tile, row, column] = guess
                elif before is not None and like(own, before):
                    filled[tile, row, column] = before
                else:
                    kept[tile, row, column] = True
    return kept, filled


SHAPES = [(1, 6, 7), (1, 1, 9), (1, 9, 1), (2, 5, 4), (1, 1, 1)]


@pytest.mark.parametrize("tolerance", [0.0, 1.0])
@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_loop(shape, anchored, tolerance):
    for seed in range(4):
        cube = torch.randint(0, 3, (*shape, 2), generator=torch.Generator().manual_seed(seed)).float()
        cube[..., 1] = cube[..., 0]
        output = build_pruner("pixelprune", tolerance=tolerance, anchored=anchored).eval()(inputs_of(cube), "auto")
        kept, filled = slow(cube, tolerance, anchored)
        assert output.index[0].tolist() == kept.flatten().nonzero()[:, 0].tolist()
        if anchored:
            assert (filled - cube).abs().max() <= tolerance


def test_the_step_before_is_a_third_neighbour():
    generator = torch.Generator().manual_seed(0)
    still = torch.randint(0, 9, (1, 5, 6, 3), generator=generator).float()
    moved = still.clone()
    moved[0, 2, 3] += 1
    cube = torch.cat([still, moved, moved])
    kept, _ = slow(cube, 0.0, True, past=True)
    output = build_pruner("pixelprune", past=True).eval()(inputs_of(cube), "auto")
    assert output.index[0].tolist() == kept.flatten().nonzero()[:, 0].tolist()
    assert output.counts[0] == int(kept[0].sum()) + 1  # of a still scene, what moved
    assert build_pruner("pixelprune").eval()(inputs_of(cube), "auto").counts[0] > 3 * int(kept[0].sum()) - 6


def test_a_ragged_batch_is_its_images_one_by_one():
    generator = torch.Generator().manual_seed(1)
    cubes = [torch.randint(0, 2, (1, *size, 1), generator=generator).float() for size in ((4, 5), (6, 3), (1, 1))]
    pruner = build_pruner("pixelprune").eval()
    output = pruner(inputs_of(*cubes), "auto")
    for row, cube in enumerate(cubes):
        alone = pruner(inputs_of(cube), "auto")
        assert alone.index[0].tolist() == output.index[row, output.valid[row]].tolist()


def test_a_number_takes_the_worst_predicted():
    cube = torch.zeros(1, 4, 4, 1)
    cube[0, 1, 1], cube[0, 2, 3], cube[0, 3, 0] = 1, 5, 3
    output = build_pruner("pixelprune").eval()(inputs_of(cube), 3)
    assert 0 in output.index[0].tolist() and 11 in output.index[0].tolist()  # the first one, and the largest jump
    assert output.count.tolist() == [3] and output.scores.isfinite().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tolerance": -1.0}, "tolerance=-1.0 of pixelprune is out of range"),
        ({"metric": "maxx"}, "did you mean 'max'"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(PruneZooError, match=words):
        build_pruner("pixelprune", **options)


def test_a_mean_is_refused():
    with pytest.raises(PruneZooError, match="keep='auto:64': 'pixelprune' keeps what passes its threshold"):
        build_pruner("pixelprune").eval()(inputs_of(torch.zeros(1, 2, 2, 1)), "auto:64")


def test_energy_sees_no_colour_and_drops_the_plain():
    features = torch.zeros(1, 3, 2 * 4)
    features[0, 0, :4] = 5  # plain, in colour
    features[0, 1] = torch.tensor([0, 1, 0, 1, 0, 0, 0, 0])
    features[0, 2, 4:] = torch.tensor([0, 3, 0, 3])
    cells = torch.tensor([[[0, 0, 0], [0, 0, 1], [0, 0, 2]]])
    inputs = PruneInputs(features, torch.ones(1, 3, dtype=torch.bool), cells, pixels=(1, 2, 2, 2))
    pruner = build_pruner("energy").eval()
    assert pruner(inputs, "auto").index.tolist() == [[1, 2]]
    torch.testing.assert_close(pruner(inputs, 1).scores, torch.tensor([[0, 0.125, 1.125]]))
