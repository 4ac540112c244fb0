"""Rows of which patches go, against loops over patches; and signals of cells."""

import pytest
import torch

from prunezoo.host.stages.rows import Rows

PATCHES, MANY = 12, 2


def shortened(rows, random):
    """Rows of which every second cell or so has gone in two steps, as numbers of patches that are left in each."""
    made = Rows(rows, PATCHES, torch.device("cpu"))
    states = torch.arange(rows * PATCHES).float().view(rows, PATCHES, 1)
    alive = made.alive
    for share in (0.8, 0.6):
        cells = torch.rand(rows, PATCHES // MANY, generator=random) < share
        cells[:, 0] = True
        alive = alive & cells.repeat_interleave(MANY, 1)
        states = made.shorten(states, alive, int(alive.sum(1).max()))
    left = [row.nonzero()[:, 0].tolist() for row in alive]
    return made, states, left


@pytest.mark.parametrize("rows", [1, 3])
def test_what_is_left_stands_where_it_says_and_comes_back(rows):
    made, states, left = shortened(rows, torch.Generator().manual_seed(rows))
    for row, own in enumerate(left):
        assert made.index[row, : len(own)].tolist() == own and made.valid[row].sum() == len(own)
        assert states[row, : len(own), 0].tolist() == [row * PATCHES + patch for patch in own]
    whole = made.whole(states)
    frozen = made.whole(states, gone=torch.full((rows, PATCHES, 1), -1.0))
    for row, own in enumerate(left):
        for patch in range(PATCHES):
            value = float(row * PATCHES + patch)
            assert float(whole[row, patch]) == (value if patch in own else 0)
            assert float(frozen[row, patch]) == (value if patch in own else -1)
    joined = made.whole(states.unflatten(1, (-1, MANY)).sum(2), MANY)
    expected = whole.unflatten(1, (-1, MANY)).sum(2)
    assert torch.equal(joined, expected)


def members_of(left, rows, images, random, adjacent):
    """Cells of patches that are left, dealt out to images: of a packed row neighbours, else of any places."""
    cells = []
    for row, own in enumerate(left):
        order = own if adjacent else [own[i] for i in torch.randperm(len(own), generator=random).tolist()]
        cells += [[row * PATCHES + patch for patch in order[i : i + MANY]] for i in range(0, len(order), MANY)]
    dealt = [cells[image::images] for image in range(images)]
    most = max(map(len, dealt))
    padded = [own + [[0] * MANY] * (most - len(own)) for own in dealt]
    return dealt, torch.tensor(padded)


@pytest.mark.parametrize("heads", [(), (3,)], ids=["mean", "by_head"])
@pytest.mark.parametrize("rows", [1, 3])
def test_signals_of_cells_are_means_over_their_patches(rows, heads):
    random = torch.Generator().manual_seed(7 + rows)
    made, states, left = shortened(rows, random)
    packed = rows == 1
    dealt, members = members_of(left, rows, 2, random, adjacent=packed)
    found = made.of_tokens(states, members)
    for image, cells in enumerate(dealt):
        for token, patches in enumerate(cells):
            assert float(found[image, token]) == sum(patches) / MANY
    width = states.shape[1]
    sizes = [width] * rows if not packed else [2 * MANY, width - 2 * MANY]  # two parts of one row
    maps = [torch.rand(1 if packed else rows, size, size, *heads, generator=random) for size in sizes[: len(sizes)]]
    maps = maps if packed else maps[:1]
    slot = {(row * PATCHES + patch): (row, place) for row, own in enumerate(left) for place, patch in enumerate(own)}

    def weight(looks, seen):
        (row, i), (other, j) = slot[looks], slot[seen]
        if packed:
            part, far = int(i >= sizes[0]), int(j >= sizes[0])
            first = part * sizes[0]
            return maps[part][0, i - first, j - first] if part == far else torch.zeros(heads)
        return maps[0][row, i, j] if row == other else torch.zeros(heads)

    pairs = made.maps_of_tokens(maps, members)
    for image, cells in enumerate(dealt):
        for a, one in enumerate(cells):
            for b, two in enumerate(cells):
                mean = sum(weight(p, q) for p in one for q in two) / MANY**2
                torch.testing.assert_close(pairs[image, a, b], mean, rtol=0, atol=1e-6)
