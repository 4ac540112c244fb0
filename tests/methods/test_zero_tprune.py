"""Zero-TPrune against loops over nodes, in a tower walked by hand; and what the notes give to check it by."""

import math

import pytest
import torch
from tower_walk import Done, best, walk
from towers import small_tower
from vision_runs import N, patches, run

from prunezoo import PruneZooError, build_pruner
from prunezoo.host.parts.tower import Tower


def ranks(weights, nodes, start, times):
    """PageRank of one head over ``nodes``: each hands its rank on along its row."""
    rank = {n: start[n] / sum(start[m] for m in nodes) for n in nodes}
    whole = {n: sum(float(weights[n, m]) for m in nodes) for n in nodes}
    for _ in range(times):
        rank = {n: sum(rank[m] * float(weights[m, n]) / whole[m] for m in nodes) for n in nodes}
    return rank


def importance(weights, tokens, prefix, times, with_cls):
    nodes = [prefix + t for t in tokens]
    start = dict.fromkeys(nodes, 1.0)
    if with_cls:
        nodes, start[0] = [0, *nodes], math.sqrt(len(tokens))
    heads = [ranks(head, nodes, start, times) for head in weights]
    return {t: math.sqrt(sum(head[prefix + t] ** 2 for head in heads) / len(heads)) for t in tokens}


def by_hand(left, places, depth, similar, repeats, with_cls):
    def act(seen):
        tokens = list(range(len(seen.alive)))
        if seen.block not in places:
            return Done(tokens)
        going = len(tokens) - left[places.index(seen.block)]
        vote = importance(seen.weights, tokens, seen.prefix, 1, with_cls)
        order = sorted(tokens, key=lambda t: -vote[t])
        better, worse = order[: len(tokens) - len(tokens) // 2], order[len(tokens) - len(tokens) // 2 :]
        keys = seen.keys[:, seen.prefix :].transpose(0, 1).flatten(1)
        nearest = {a: max(float(torch.cosine_similarity(keys[a], keys[b], dim=0)) for b in better) for a in worse}
        dropped = sorted(worse, key=lambda a: -nearest[a])[: min(round(similar * going), len(worse))]
        rest = [t for t in tokens if t not in dropped]
        part = seen.block / depth
        times = repeats[0] if part < 0.25 else repeats[2] if part >= 0.75 else repeats[1]
        scores = importance(seen.weights, rest, seen.prefix, times, with_cls)
        chosen = best([scores[t] for t in rest], left[places.index(seen.block)])
        return Done([rest[i] for i in chosen])

    return act


@pytest.mark.parametrize(("kind", "attention"), [("clip", "cls"), ("clip", "received"), ("siglip", "received")])
@pytest.mark.parametrize("keep", [(5, 20), (12, 25)], ids=str)
def test_by_hand(kind, attention, keep):
    model, pixels = small_tower(kind), torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(4))
    tower = Tower(model, -1, has_cls=kind == "clip")
    pruner = build_pruner("zero_tprune", attention=attention, similar=0.3)
    output = run(model, tower, pruner, pixels, keep)
    places = list(pruner.stages(4))
    assert places == [1, 2, 3]
    for row in range(2):
        left = [int(s) for s in pruner.schedule(torch.tensor([keep[row]]), torch.tensor([N]), 4)]
        act = by_hand(left, places, 4, 0.3, (30, 5, 1), attention == "cls")
        alive, states = walk(model, tower, pixels[row], act)
        assert output.index[row, : keep[row]].tolist() == alive
        torch.testing.assert_close(output.features[row, : keep[row]], states, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("times", [1, 30])
def test_even_attention_stays_even_and_what_all_look_at_has_it_all(times):
    pruner, alive = build_pruner("zero_tprune"), torch.ones(1, 8, dtype=torch.bool)
    even = pruner.importance(torch.full((1, 2, 8, 8), 1 / 8), alive, times)
    torch.testing.assert_close(even, torch.full((1, 8), 1 / 8))
    one = torch.zeros(1, 2, 8, 8)
    one[..., 3] = 1
    torch.testing.assert_close(pruner.importance(one, alive, times), torch.eye(8)[3:4])


def test_the_half_that_matters_less_is_matched_and_repeats_are_by_depth():
    pruner = build_pruner("zero_tprune", repeats=(9, 4, 2))
    at = [pruner.times(type("At", (), {"layer": block, "depth": 12})) for block in range(12)]
    assert at == [9] * 3 + [4] * 6 + [2] * 3
    inputs = patches(1)
    inputs.signals["vision_keys"] = torch.eye(N)[None, :, None]
    # Tokens 20 to 24 are the least important; 23 is like 3, and 22 like 24, which is no better than itself.
    keys = inputs.signals["vision_keys"][0, :, 0]
    keys[23], keys[22] = keys[3] + 0.1 * keys[23], keys[24]
    inputs = type(inputs)(inputs.features, inputs.valid, inputs.cells, signals=inputs.signals, asked=(23,))
    gone = build_pruner("zero_tprune").by_similarity(inputs, -torch.arange(N).float()[None])
    assert gone[0].nonzero()[:, 0].tolist() == [23]


@pytest.mark.parametrize("bad", [{"similar": 1.1}, {"repeats": (1, 2)}, {"repeats": (0, 1, 1)}, {"attention": "mean"}])
def test_what_is_out_of_range_is_refused(bad):
    with pytest.raises(PruneZooError, match=f"{next(iter(bad))}=.*zero_tprune"):
        build_pruner("zero_tprune", **bad)
