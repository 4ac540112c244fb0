"""Token Transforming against loops over tokens and anchors, in a tower walked by hand; and its inverse."""

import math

import pytest
import torch
from tower_walk import Done, best, walk
from towers import small_tower
from vision_runs import N, patches, run

from prunezoo import PruneZooError, build_pruner
from prunezoo.host.parts.tower import Tower


def by_hand(left, places, tau, own, with_cls, maps):
    """Notes the shares of each map, rows by token, in ``maps``."""

    def act(seen):
        tokens = list(range(len(seen.alive)))
        if seen.block not in places:
            return Done(tokens)
        prefix = seen.prefix
        looking = [0] if with_cls else range(seen.weights.shape[1])
        attention = [
            sum(float(head[row, prefix + t]) for head in seen.weights for row in looking)
            / (len(looking) * len(seen.weights))
            for t in tokens
        ]
        anchors = best(attention, left[places.index(seen.block)])
        if len(anchors) == len(tokens):
            maps.append(torch.eye(len(tokens)))
            return Done(tokens)
        keys = seen.keys[:, prefix:].transpose(0, 1).flatten(1)
        table = []
        for a in anchors:
            raw = [
                math.exp(float(torch.cosine_similarity(keys[a], keys[t], dim=0)) / tau) * seen.sizes[t] * attention[t]
                for t in tokens
            ]
            row = [value / sum(raw) for value in raw]
            if row[a] < own:
                row = [own if t == a else value * (1 - own) / (1 - row[a]) for t, value in enumerate(row)]
            table.append(row)
        table = torch.tensor(table)
        shares = table / table.sum(0)
        maps.append(shares.T)
        sizes = [sum(float(shares[k, t]) * seen.sizes[t] for t in tokens) for k in range(len(anchors))]
        assert sum(sizes) == pytest.approx(N, rel=1e-4)  # nothing is lost
        return Done(anchors, table @ seen.states[prefix:], sizes)

    return act


CASES = [("clip", {}), ("clip", {"attention": "cls", "own": 0.4, "tau": 0.3}), ("siglip", {"own": 0.2})]


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
@pytest.mark.parametrize("name", ["token_transforming", "token_transforming_inverse"])
@pytest.mark.parametrize("keep", [(5, 20), (12, 25)], ids=str)
def test_by_hand(kind, options, name, keep):
    model, pixels = small_tower(kind), torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(8))
    tower, pruner = Tower(model, -1, has_cls=kind == "clip"), build_pruner(name, **options)
    output, config = run(model, tower, pruner, pixels, keep), pruner.config
    places = list(pruner.stages(4))
    for row in range(2):
        left = [int(s) for s in pruner.schedule(torch.tensor([keep[row]]), torch.tensor([N]), 4)]
        maps = []
        act = by_hand(left, places, config.tau, config.own, config.attention == "cls", maps)
        alive, states = walk(model, tower, pixels[row], act)
        if pruner.restore:
            alive, states = list(range(N)), torch.linalg.multi_dot([*maps, states])
        assert output.index[row, : len(alive)].tolist() == alive and output.counts[row] == len(alive)
        torch.testing.assert_close(output.features[row, : len(alive)], states, rtol=2e-3, atol=2e-3)


def inputs_of(keys):
    inputs = patches(1)
    signals = {"vision_keys": keys[None, :, None], "received_attention": torch.arange(N, 0, -1.0)[None]}
    features = torch.randn(1, N, 6, generator=torch.Generator().manual_seed(0))
    return type(inputs)(features, inputs.valid, inputs.cells, signals=signals)


def test_at_tau_near_0_it_prunes():
    inputs = inputs_of(torch.randn(N, 8, generator=torch.Generator().manual_seed(1)))
    output = build_pruner("token_transforming", tau=1e-4, own=0.0)(inputs, 7)
    assert output.index[0].tolist() == list(range(7))
    torch.testing.assert_close(output.features, inputs.features[:, :7])


def test_where_groups_have_nothing_in_common_it_merges_and_the_inverse_copies():
    """Keys at right angles but within each of five groups, where they are the same."""
    inputs = inputs_of(torch.eye(5).repeat(5, 1))
    signals = {**inputs.signals, "received_attention": torch.tensor([2.0] * 5 + [1.0] * 20)[None]}
    inputs = type(inputs)(inputs.features, inputs.valid, inputs.cells, signals=signals)
    output = build_pruner("token_transforming_inverse", tau=0.02, own=0.0)(inputs, 5)
    weights = torch.tensor([2.0, 1, 1, 1, 1]) / 6
    for group in range(5):
        expected = (inputs.features[0, group::5] * weights[:, None]).sum(0)
        torch.testing.assert_close(output.features[0, group], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.sizes, torch.full((1, 5), 5.0))
    torch.testing.assert_close(output.back[0], torch.eye(5).repeat(5, 1))


@pytest.mark.parametrize("bad", [{"tau": 0.0}, {"own": 1.0}, {"own": -0.1}, {"attention": "mean"}])
def test_what_is_out_of_range_is_refused(bad):
    with pytest.raises(PruneZooError, match=f"{next(iter(bad))}=.*token_transforming"):
        build_pruner("token_transforming", **bad)
