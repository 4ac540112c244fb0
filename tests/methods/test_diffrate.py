"""DiffRate against loops over tokens, in a tower walked by hand; and its training path against what it really drops."""

import pytest
import torch
from tower_walk import Done, best, walk
from towers import small_tower
from vision_runs import N, patches, run

from prunezoo import PruneZooError, build_pruner
from prunezoo.core.schedule import Schedule
from prunezoo.host.parts.tower import Tower
from prunezoo.host.stages.vision_relaxed import RelaxedTower


def rated(drop, merge, **options):
    """With these counts, block by block behind the first."""
    pruner = build_pruner("diffrate", blocks=len(drop) + 1, tokens=N, granularity=1, **options).eval()
    with torch.no_grad():
        for rates, counts in ((pruner.drop, drop), (pruner.merge, merge)):
            for row, count in enumerate(counts):
                rates[row, N - count] = 1000
    return pruner


def by_hand(dropping, merging, with_cls, least):
    def act(seen):
        tokens, prefix = list(range(len(seen.alive))), seen.prefix
        looking = [0] if with_cls else range(seen.weights.shape[1])
        attention = [sum(float(h[row, prefix + t]) for h in seen.weights for row in looking) for t in tokens]
        left = best(attention, dropping[seen.block])
        kept = best(attention, merging[seen.block])
        states, sizes = seen.states[prefix:], list(seen.sizes)
        together = {t: [states[t]] for t in kept}
        for source in left:
            if source not in kept:
                near = {t: float(torch.cosine_similarity(states[source], states[t], dim=0)) for t in kept}
                to = max(kept, key=lambda t: near[t])
                together[to].append(states[source])
                sizes[to] += near[to] * seen.sizes[source]
        made = torch.stack([sum(together[t]) / len(together[t]) for t in kept])
        return Done(kept, made, [max(sizes[t], least) for t in kept])

    return act


def drops_and_merges(pruner, keep, depth):
    """Counts of each block, from those it was given."""
    left = [int(s) for s in pruner.steps(torch.tensor([keep]), torch.tensor([N]), depth)]
    found = [N, *left[:-1]]
    shares = [pruner.dropped_share(block, depth) for block in range(depth)]
    return [n - round(s * (n - k)) for n, k, s in zip(found, left, shares, strict=True)], left


@pytest.mark.parametrize(("kind", "attention"), [("clip", "cls"), ("siglip", "received")])
@pytest.mark.parametrize("keep", [(8, 8), (3, 20)], ids=str)
def test_by_hand(kind, attention, keep):
    model, pixels = small_tower(kind), torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(3))
    tower = Tower(model, -1, has_cls=kind == "clip")
    pruner = rated((22, 20, 11), (20, 14, 8), attention=attention)
    assert pruner.trained() == [(25, 25, 25), (25, 22, 20), (20, 20, 14), (14, 11, 8)]
    output = run(model, tower, pruner, pixels, keep)
    for row in range(2):
        dropping, merging = drops_and_merges(pruner, keep[row], 4)
        if keep[row] == 8:
            assert (dropping, merging) == ([25, 22, 20, 11], [25, 20, 14, 8])
        alive, states = walk(model, tower, pixels[row], by_hand(dropping, merging, attention == "cls", 1e-30))
        # A merged token is where the middle of its patches is, which need not be where the kept one was.
        found = {tuple(state.tolist()) for state in output.features[row, : keep[row]].round(decimals=2)}
        assert len(alive) == keep[row] and found == {tuple(state.tolist()) for state in states.round(decimals=2)}


@pytest.mark.parametrize(("kind", "attention"), [("clip", "cls"), ("clip", "received"), ("siglip", "received")])
def test_the_relaxed_tower_puts_out_what_the_hard_one_does(kind, attention):
    """Sizes are clamped in training alone, so similarities that are not negative make the two the same."""
    model, pixels = small_tower(kind), torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(5))
    tower = Tower(model, -1, has_cls=kind == "clip")
    pruner = rated((22, 20, 11), (20, 14, 8), attention=attention)
    model(pixels, output_hidden_states=True)  # which puts hooks of its own on
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    with RelaxedTower(tower, pruner, "diffrate", patches(2), log_eps=1e-30) as relaxed:
        states = model(pixels, output_hidden_states=True).hidden_states[-1][:, tower.prefix :]
    assert relaxed.gates.sum(1).tolist() == [8, 8]
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    for row in range(2):
        act = by_hand([25, 22, 20, 11], [25, 20, 14, 8], attention == "cls", 1.0)
        alive, expected = walk(model, tower, pixels[row], act)
        assert relaxed.gates[row].nonzero()[:, 0].tolist() == alive
        torch.testing.assert_close(states[row, alive], expected, rtol=1e-3, atol=1e-3)


def test_gates_of_the_relaxed_tower_teach_every_block():
    model, pixels = small_tower("clip"), torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(5))
    pruner = build_pruner("diffrate", blocks=4, tokens=N, granularity=1)
    with RelaxedTower(Tower(model, -1), pruner, "diffrate", patches(2)) as relaxed:
        states = model(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
    (relaxed.gates * states.square().sum(-1)).sum().backward()
    for rates in (pruner.drop, pruner.merge):
        assert rates.grad.isfinite().all() and (rates.grad.abs().amax(1) > 0).all()


def test_a_tower_of_another_depth_has_the_rates_of_blocks_as_far_in():
    pruner = rated((22, 20, 11), (20, 14, 8))
    assert [pruner.place(block, 4) for block in range(4)] == [0, 1, 2, 3]
    assert [pruner.place(block, 2) for block in range(2)] == [1, 3] and pruner.place(0, 1) == 3
    assert [pruner.place(block, 8) for block in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    steps = pruner.schedule(torch.tensor([8]), torch.tensor([N]), 8)
    assert [int(step) for step in steps] == [25, 25, 20, 20, 14, 14, 8, 8]
    assert pruner.as_schedule() == Schedule("vision", N, (25, 20, 14, 8), "diffrate")


def test_untrained_it_leaves_half_in_every_block_behind_the_first():
    assert build_pruner("diffrate", blocks=3, tokens=36).trained() == [(36, 36, 36), (36, 20, 20), (20, 20, 20)]
    alone = build_pruner("diffrate", blocks=1, tokens=36)
    assert alone.trained() == [(36, 20, 20)]
    assert [int(s) for s in alone.schedule(torch.tensor([5]), torch.tensor([36]), 1)] == [5]


@pytest.mark.parametrize(
    "bad", [{"blocks": 0}, {"blocks": 257}, {"tokens": 0}, {"granularity": 0}, {"granularity": 577}, {"attention": "x"}]
)
def test_what_is_out_of_range_is_refused(bad):
    with pytest.raises(PruneZooError, match=f"{next(iter(bad))}=.*diffrate"):
        build_pruner("diffrate", **bad)
