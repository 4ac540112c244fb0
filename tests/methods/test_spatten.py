"""SpAtten against a tower walked by hand: sums over all blocks, cascades of tokens and of heads."""

from itertools import pairwise

import pytest
import torch
from tower_walk import Done, best, walk
from towers import small_tower
from vision_runs import TOWERS, N, run

from prunezoo import PruneZooError, build_pruner
from prunezoo.host.parts.tower import Tower
from prunezoo.training_free.spatten import without


def by_hand(left, heads_left=None):
    """Tokens to ``left[block]``, heads to ``heads_left[block]``."""
    so_far, by_head, out = {}, {}, set()

    def act(seen):
        rows = seen.weights.shape[1]
        for place, patch in enumerate(seen.alive):
            column = sum(
                float(seen.weights[h, i, seen.prefix + place]) for h in range(len(seen.weights)) for i in range(rows)
            )
            # The mean over all rows, CLS among them, times the patches.
            so_far[patch] = so_far.get(patch, 0) + column / rows * len(seen.alive)
        kept = best([so_far[patch] for patch in seen.alive], left[seen.block])
        if heads_left is None:
            return Done(kept)
        for head in range(len(seen.given)):
            by_head[head] = by_head.get(head, 0) + float(seen.given[head, seen.prefix :].abs().sum())
        staying = best([by_head[head] for head in sorted(by_head)], heads_left[seen.block])
        out.update(set(by_head) - set(staying))
        return Done(kept, heads=[head not in out for head in sorted(by_head)])

    return act


def left_of(pruner, tower, keep):
    return [int(step) for step in pruner.schedule(torch.tensor([keep]), torch.tensor([N]), tower.depth)]


@pytest.mark.parametrize(("kind", "layer"), [("clip", -1), ("siglip", -1), ("clip", -2)])
@pytest.mark.parametrize("options", [{}, {"heads": 0.34}], ids=str)
def test_by_hand(kind, layer, options):
    model = small_tower(kind, num_hidden_layers=6)
    pixels, keep = torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(1)), (4, 17)
    tower, pruner = Tower(model, layer, has_cls=kind == "clip"), build_pruner("spatten", **options)
    output, plain = run(model, tower, pruner, pixels, keep), run(model, tower, build_pruner("spatten"), pixels, keep)
    heads = None
    if options:  # of three: the first third of the blocks keeps all
        first = min(round(tower.depth * 0.3), tower.depth - 1)
        parts = [max(b + 1 - first, 0) / (tower.depth - first) for b in range(tower.depth)]
        heads = [max(round(3 * (1 - 0.66 * part)), 1) for part in parts]
        assert heads[-1] == 1 and not torch.equal(output.features, plain.features)
    for row in range(2):
        alive, states = walk(model, tower, pixels[row], by_hand(left_of(pruner, tower, keep[row]), heads))
        assert output.index[row, : keep[row]].tolist() == alive
        torch.testing.assert_close(output.features[row, : keep[row]], states, rtol=1e-3, atol=1e-3)


def test_blocks_in_front_count_and_drop_nothing():
    assert [without(depth) for depth in (1, 2, 4, 12, 24, 40)] == [0, 1, 3, 3, 4, 6]
    left = [int(s) for s in build_pruner("spatten").schedule(torch.tensor([64]), torch.tensor([576]), 24)]
    assert left[:4] == [576] * 4 and left[-1] == 64 and left[4] == 576 - round(512 / 20)
    falls = [a - b for a, b in pairwise(left[3:])]
    assert max(falls) - min(falls) <= 1
    # What was received in front decides too: a tower whose first blocks are other picks others.
    model, pixels = small_tower("clip", num_hidden_layers=5), torch.randn(1, 3, 20, 20)
    chosen = run(model, Tower(model, -1), build_pruner("spatten"), pixels, (5,)).index
    late = type(build_pruner("spatten"))()
    late.stages = lambda depth: tuple(range(3, depth))
    late.schedule = lambda keep, available, depth: [available - (available - keep) // 2, keep]
    assert not torch.equal(run(model, Tower(model, -1), late, pixels, (5,)).index, chosen)


@pytest.mark.parametrize(("kind", "layer"), TOWERS)
def test_keeping_everything_is_the_bare_tower_and_all_heads_are_as_none(kind, layer):
    model, pixels = small_tower(kind), torch.randn(2, 3, 20, 20)
    tower = Tower(model, layer, has_cls=kind == "clip")
    bare = model(pixels, output_hidden_states=True).hidden_states[layer][:, tower.prefix :]
    assert torch.equal(run(model, tower, build_pruner("spatten"), pixels, (N, N)).features, bare)
    assert (run(model, tower, build_pruner("spatten", heads=0.3), pixels, (N, N)).features - bare).abs().max() > 0.01


@pytest.mark.parametrize("heads", [0.0, 1.5])
def test_a_share_of_heads_out_of_range_is_refused(heads):
    with pytest.raises(PruneZooError, match=r"heads=.*spatten"):
        build_pruner("spatten", heads=heads)
