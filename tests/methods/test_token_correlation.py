"""Token correlation crop by crop, patch by patch."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from made_inputs import make_inputs
from torch.nn import functional

from prunezoo import PruneInputs, PruneZooError, build_pruner

GRIDS = ((8, 9), (6, 7))


@pytest.fixture
def inputs():
    """Crops of which some patches repeat and some attention stands out."""
    made = make_inputs(grids=GRIDS, pad=3)
    cells, signals = made.cells.clone(), {name: value.clone() for name, value in made.signals.items()}
    cells[0, 27:72, 0], cells[1, 20:42, 0] = 1, 1
    keys, random = signals["vision_keys@4/24"], torch.Generator().manual_seed(0)
    for row, same in ((0, range(20)), (0, range(40, 44)), (1, range(25, 40))):
        keys[row, list(same)] = keys[row, same[0]] + 0.02 * torch.randn(keys.shape[2:], generator=random)
    for row, slot in ((0, 3), (0, 50), (1, 41)):
        signals["cls_attention"][row, slot] = 5.0 + slot / 100
    return replace(made, cells=cells, signals=signals)


def crops_by_hand(inputs, row, similarity, repeats):
    """Of each crop: its slots in the order in which they are taken, and how many of them."""
    valid = inputs.valid[row]
    late, early = (inputs.signal(name)[row][valid].tolist() for name in ("cls_attention", "cls_attention@4/24"))
    keys = inputs.signal("vision_keys@4/24")[row][valid].flatten(1)
    crops = {}
    for slot, tile in enumerate(inputs.cells[row][valid][:, 0].tolist()):
        crops.setdefault(tile, []).append(slot)
    for tile, slots in crops.items():
        rare = 0
        for i in slots:
            same = [j for j in slots if j != i and functional.cosine_similarity(keys[i], keys[j], dim=0) > similarity]
            rare += len(same) <= repeats * len(slots)
        low, high = np.quantile([late[i] for i in slots], [0.25, 0.75])
        outliers = sorted((i for i in slots if late[i] > high + 1.5 * (high - low)), key=lambda i: -late[i])
        others = sorted(slots, key=lambda i: -early[i])
        count = len({*outliers, *others[:rare]})
        crops[tile] = outliers + [i for i in others if i not in outliers], count
    return crops


def folded_by_hand(inputs, row, kept, slot, neighbours, merge):
    late, x = inputs.signal("cls_attention")[row], inputs.features[row]
    keys, tile = inputs.signal("vision_keys@4/24")[row].flatten(1), inputs.cells[row, :, 0]
    gone = [j for j in range(len(x)) if inputs.valid[row, j] and j not in kept and tile[j] == tile[slot]]
    near = sorted(gone, key=lambda j: -functional.cosine_similarity(keys[slot], keys[j], dim=0))[:neighbours]
    if merge == "none" or not near:
        return x[slot]
    total = sum(late[j] * x[j] for j in near)
    if merge == "sum":
        return x[slot] + total
    return (late[slot] * x[slot] + total) / (late[slot] + sum(late[j] for j in near))


@pytest.mark.parametrize("merge", ["sum", "mean", "none"])
def test_each_crop_keeps_what_it_says(inputs, merge):
    options = {"similarity": 0.99, "repeats": 0.1}
    pruner = build_pruner("token_correlation", sample=False, merge=merge, neighbours=5, **options).eval()
    output, counts = pruner(inputs, "auto"), []
    for row in range(2):
        crops = crops_by_hand(inputs, row, **options)
        kept = sorted(slot for slots, count in crops.values() for slot in slots[:count])
        counts += [count / len(slots) for slots, count in crops.values()]
        assert output.index[row, : len(kept)].tolist() == kept and int(output.count[row]) == len(kept)
        for column, slot in enumerate(kept):
            expected = folded_by_hand(inputs, row, kept, slot, 5, merge)
            torch.testing.assert_close(output.kept_features(inputs)[row, column], expected, rtol=1e-5, atol=1e-4)
    assert min(counts) < 0.6 and max(counts) > 0.8  # they differ
    half = pruner(inputs, 20)
    for row in range(2):
        crops = crops_by_hand(inputs, row, **options)
        whole = sum(count for _, count in crops.values())
        kept = set(half.index[row].tolist())
        for slots, count in crops.values():
            own = [slot for slot in slots if slot in kept]
            assert own == slots[: len(own)] and abs(len(own) - 20 * count / whole) <= 1


def plain(keys, attention):
    count = len(keys)
    signals = {"cls_attention": attention, "cls_attention@4/24": attention, "vision_keys@4/24": keys[None, :, None]}
    cells = torch.zeros(1, count, 3, dtype=torch.long)
    return PruneInputs(torch.randn(1, count, 4), torch.ones(1, count, dtype=torch.bool), cells, signals=signals)


def test_patches_that_are_all_alike_leave_one_and_all_different_ones_stay():
    pruner = build_pruner("token_correlation").eval()
    even = torch.full((1, 60), 1 / 60)
    assert pruner(plain(torch.ones(60, 8), even), "auto").counts == (1,)
    assert pruner(plain(torch.eye(60), even), "auto").counts == (60,)
    with pytest.raises(PruneZooError, match="give 'auto' alone"):
        pruner(plain(torch.eye(60), even), "auto:20")


def test_it_draws_by_attention():
    attention = torch.tensor([[0.5, 0.25, 0.125, 0.125]])
    first = [0] * 4
    for seed in range(1000):
        output = build_pruner("token_correlation", seed=seed, merge="none")(plain(torch.eye(4), attention), 1)
        first[int(output.index[0, 0])] += 1
    for found, chance in zip(first, attention[0].tolist(), strict=True):
        assert abs(found / 1000 - chance) < 4 * math.sqrt(chance * (1 - chance) / 1000)


def test_bad_fields_are_refused():
    wrong = {"early": "4of24", "similarity": 1.5, "repeats": -0.1, "seed": -1, "neighbours": -1, "merge": "all"}
    for field, value in wrong.items():
        with pytest.raises(PruneZooError, match=f"{field}="):
            build_pruner("token_correlation", **{field: value})
