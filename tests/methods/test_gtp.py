"""GTP against loops over a graph, in a tower walked by hand."""

import pytest
import torch
from tower_walk import Done, best, touch, walk
from towers import small_tower
from vision_runs import N, run

from prunezoo import PruneZooError, build_pruner
from prunezoo.host.parts.tower import Tower


def make_graph(vectors, count):
    """Links with their weights, by pairs."""
    tokens = range(len(vectors))
    like = {(i, j): float(torch.cosine_similarity(vectors[i], vectors[j], dim=0)) for i in tokens for j in tokens}
    linked = {i: {j for j in tokens if touch(i, j)} for i in tokens}
    for i in tokens:
        linked[i] |= set(sorted((j for j in tokens if j != i), key=lambda j: -like[i, j])[:count])
    degree = {i: len(linked[i]) for i in tokens}
    return {(i, j): (degree[i] * degree[j]) ** -0.5 for i in tokens for j in linked[i]}


def by_hand(left, alpha, theta, scales, standard, with_cls):
    graph = {}

    def act(seen):
        first = 0 if with_cls else seen.prefix
        if seen.block == 0:
            graph.update(make_graph(seen.entered[seen.prefix :], 8))
        maps = seen.weights[:, first:, first:].clone()
        for head in maps:
            if theta < 1:
                floor = head.flatten().sort().values[max(int(head.numel() * (1 - theta)), 1) - 1]
                head[head < floor] = 0
        at = seen.prefix - first
        scores = []
        for t in range(len(seen.alive)):
            if standard == "cls":
                scores.append(sum(float(head[0, at + t]) for head in maps) / len(maps))
            else:
                own = max(float(head[at + t, at + t]) for head in maps)
                scores.append(own * max(float(head[:, at + t].sum()) for head in maps))
        kept = best(scores, left[seen.block])
        gone = [t for t in range(len(seen.alive)) if t not in kept]
        states, sizes = seen.states[seen.prefix :].clone(), list(seen.sizes)
        for t in kept:
            for g in gone:
                weight = alpha * graph.get((seen.alive[t], seen.alive[g]), 0)
                states[t] += weight * seen.states[seen.prefix + g]
                sizes[t] += weight * seen.sizes[g]
        return Done(kept, states[kept], [sizes[t] for t in kept] if scales else None)

    return act


CASES = [
    ("clip", {}),
    ("clip", {"scales": True, "theta": 0.7, "alpha": 0.4}),
    ("clip", {"standard": "cls", "theta": 0.6}),
    ("clip", {"attention": "received"}),
    ("siglip", {"attention": "received", "scales": True}),
]


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_by_hand(kind, options):
    model = small_tower(kind)
    pixels, keep = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(6)), (6, 19)
    tower, pruner = Tower(model, -1, has_cls=kind == "clip"), build_pruner("gtp", **options)
    output = run(model, tower, pruner, pixels, keep)
    config = pruner.config
    for row in range(2):
        left = [int(s) for s in pruner.schedule(torch.tensor([keep[row]]), torch.tensor([N]), 4)]
        act = by_hand(left, config.alpha, config.theta, config.scales, config.standard, config.attention == "cls")
        alive, states = walk(model, tower, pixels[row], act)
        assert output.index[row, : keep[row]].tolist() == alive
        torch.testing.assert_close(output.features[row, : keep[row]], states, rtol=1e-3, atol=1e-3)


def test_nothing_is_handed_on_at_alpha_0_and_something_otherwise():
    model, pixels = small_tower("clip"), torch.randn(1, 3, 20, 20)
    tower = Tower(model, 1)  # one block: nothing later changes what it chooses
    plain, handed = (run(model, tower, build_pruner("gtp", alpha=alpha), pixels, (9,)) for alpha in (0.0, 0.2))
    assert torch.equal(plain.index, handed.index)
    assert (plain.features - handed.features).abs().max() > 1e-3


@pytest.mark.parametrize(
    "bad",
    [{"alpha": -0.1}, {"theta": 0.0}, {"links": -1}, {"standard": "sum"}, {"standard": "cls", "attention": "received"}],
)
def test_what_is_out_of_range_is_refused(bad):
    with pytest.raises(PruneZooError, match=f"{next(iter(bad))}=.*gtp"):
        build_pruner("gtp", **bad)
