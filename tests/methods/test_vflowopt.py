"""VFlowOpt the slow way: votes, entropy, and tokens that are recycled one after the other until the count is right."""

import math
from dataclasses import replace

import pytest
import torch
from layer_oracle import Watch
from made_inputs import GRIDS, make_inputs
from tiny_llava import LONG, TWO, make_image

from prunezoo import PruneZooError, build_pruner, encode
from prunezoo.host import encode_needs, run_pruned
from prunezoo.training_free.vflowopt import entropy


def recycled_by_hand(importance, cells, keep, cell):
    """The groups that are left, each a list of slots, the first of them the most important."""
    regions, single = {}, sorted(range(len(importance)), key=lambda i: importance[i])
    while len(single) + len(regions) > keep and single:
        least = single.pop(0)
        tile, row, column = cells[least].tolist()
        regions.setdefault((tile, int(row / cell), int(column / cell)), []).append(least)
    made = sorted(
        (sorted(own, key=lambda i: -importance[i]) for own in regions.values()), key=lambda own: -importance[own[0]]
    )
    return [[i] for i in single] + made[: keep - len(single)]


@pytest.mark.parametrize("cell", [1.0, 2.0, 2.5, 6.0])
@pytest.mark.parametrize("keep", [1, 3, 8, 14, 19])
def test_recycling_by_hand(keep, cell):
    inputs = make_inputs(pad=2)
    pruner = build_pruner("vflowopt", cell=cell).eval()
    output = pruner.recycle(inputs, pruner.importance(inputs), torch.tensor([keep] * 3))
    for row, (height, width) in enumerate(GRIDS):
        n = height * width
        importance = inputs.signal("received_attention")[row, :n]
        groups = sorted(
            recycled_by_hand(importance.tolist(), inputs.cells[row, :n], keep, cell), key=lambda own: own[0]
        )
        assert output.index[row, :keep].tolist() == [own[0] for own in groups] and output.count[row] == keep
        for column, own in enumerate(groups):
            weight = importance[own] / importance[own].sum()
            expected = (weight[:, None] * inputs.features[row, own]).sum(0)
            torch.testing.assert_close(output.features[row, column], expected, rtol=1e-5, atol=1e-5)
            assert (output.groups[row] == column).nonzero()[:, 0].tolist() == sorted(own)


def test_votes_and_entropy():
    inputs = make_inputs(pad=2)
    count = inputs.valid.shape[1]
    random = torch.Generator().manual_seed(0)
    maps = torch.rand(3, count, count, generator=random) * torch.rand(3, 1, count, generator=random)
    pixels = torch.rand(3, count, 3, 4, 4, generator=random)
    inputs = replace(inputs, signals={"vision_attention": maps, "pixels": pixels})
    found = build_pruner("vflowopt", threshold=1.2, alpha=-0.5).importance(inputs)
    alone = build_pruner("vflowopt", threshold=1e6).importance(inputs)
    for row, valid in enumerate(inputs.valid):
        own, n = maps[row][valid][:, valid].double(), int(valid.sum())
        received = [float(own[:, j].sum()) / n for j in range(n)]
        voters = [j for j in range(n) if received[j] > 1.2 * sum(received) / n]
        assert 0 < len(voters) < n
        grey = pixels[row][valid].mean(1).flatten(1)
        low, high = float(grey.min()), float(grey.max())
        surprise = []
        for values in grey.tolist():
            bins = [min(int((value - low) / (high - low) * 256), 255) for value in values]
            surprise.append(-sum(bins.count(b) / 16 * math.log(bins.count(b) / 16) for b in set(bins)))
        total = sum(math.exp(s) for s in surprise)
        votes = [
            sum(float(own[v, j]) for v in voters) / len(voters) - 0.5 * math.exp(surprise[j]) / total for j in range(n)
        ]
        torch.testing.assert_close(found[row][valid], torch.tensor(votes), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(alone[row][valid], torch.tensor(received), rtol=1e-5, atol=1e-7)
    flat = entropy(torch.ones(1, 4, 3, 2, 2), torch.ones(1, 4, dtype=torch.bool))
    assert torch.equal(flat, torch.zeros(1, 4))


@pytest.mark.parametrize("depth", [4, 28, 32])
@pytest.mark.parametrize("keep", [1, 20, 144, 460, 550, 576])
@pytest.mark.parametrize(("first", "second"), [(1.06, 0.983), (1.446, 0.749), (1.25, 0.9)])
def test_the_mean_over_layers_is_what_was_asked_for(depth, keep, first, second):
    pruner = build_pruner("vflowopt", first=first, second=second)
    _, early, late = pruner.stages(depth)
    steps = [int(step[0]) for step in pruner.schedule(torch.tensor([keep]), torch.tensor([576]), depth)]
    mean = (early * steps[0] + (late - early) * steps[1] + (depth - late) * steps[2]) / depth
    assert abs(mean - keep) <= 0.51 and 576 >= steps[0] >= steps[1] >= steps[2] >= 1
    if keep == 576:
        assert steps == [576] * 3


@torch.no_grad()
def test_on_a_model_importance_follows_the_tokens(deep_llava):
    batch = deep_llava.batch([LONG, TWO], [[make_image(0)], [make_image(5), make_image(6)]])
    pruner = build_pruner("vflowopt", cell=3.0).eval()
    encoded = encode(deep_llava.vlm, batch, encode_needs(pruner))
    with Watch(pruner) as watch:
        run = run_pruned(deep_llava.vlm, encoded, pruner, 16)
    steps = [int(n) for n in torch.cat(pruner.schedule(torch.tensor([16]), torch.tensor([36]), 4))]
    assert run.layers.tolist() == [[steps[0], steps[1], steps[1], steps[2]]] * 3 and run.tokens.tolist() == [16.0] * 3
    received, slots = encoded.inputs.signal("received_attention"), torch.arange(36).expand(3, -1)
    for inputs, output in watch.calls:
        importance = received.gather(1, slots)
        if inputs.step:
            assert torch.equal(inputs.carry["importance"], importance)
            best = importance.topk(output.index.shape[1]).indices.sort().values
            assert torch.equal(output.index, best)
        slots = slots.gather(1, output.index)


def test_bad_fields_are_refused():
    wrong = {"threshold": -1.0, "cell": 0.5, "first": 0.9, "second": 0.0, "layers": (2, 1), "count": "some"}
    for field, value in wrong.items():
        with pytest.raises(PruneZooError, match=f"{field}="):
            build_pruner("vflowopt", **{field: value})
