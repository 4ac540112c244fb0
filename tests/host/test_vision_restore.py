"""The vision stage with `restore`: the tower puts out every patch again, against a tower that is run by hand."""

import pytest
import torch
from tower_oracle import by_hand, tome_by_hand
from towers import small_tower
from vision_runs import TOWERS, Attended, AttendedLater, N, run

from prunezoo import attach, build_pruner, encode
from prunezoo.host import run_pruned
from prunezoo.host.parts.tower import Tower


def pictures(seed):
    return torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("kind", "layer"), TOWERS)
@pytest.mark.parametrize("keep", [(12, 12), (3, 25), (1, 2)], ids=str)
def test_each_patch_gets_the_output_of_its_group(kind, layer, keep):
    model, pixels = small_tower(kind), pictures(1)
    tower, pruner = Tower(model, layer, has_cls=kind == "clip"), build_pruner("tome_unmerge")
    output = run(model, tower, pruner, pixels, keep)
    assert output.index.tolist() == [list(range(N))] * 2 and output.valid.all() and output.groups is None
    steps = pruner.schedule(torch.tensor(keep), torch.tensor([N, N]), tower.depth)
    for row in range(2):
        members, states = by_hand(model, tower, pixels[row], tome_by_hand([int(step[row]) for step in steps]))
        assert len(members) == keep[row]
        for patches, state in zip(members, states, strict=True):
            torch.testing.assert_close(
                output.features[row, patches], state.expand(len(patches), -1), rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("cls", [Attended, AttendedLater])
@pytest.mark.parametrize(("kind", "layer"), TOWERS)
def test_what_was_dropped_is_put_out_as_it_was_when_it_left(kind, layer, cls):
    model, pixels, keep = small_tower(kind), pictures(2), (4, 16)
    tower = Tower(model, layer, has_cls=kind == "clip")
    pruner = type("Restored", (cls,), {"restore": True})()
    output = run(model, tower, pruner, pixels, keep)
    steps = pruner.schedule(torch.tensor(keep), torch.tensor([N, N]), tower.depth)
    for row in range(2):
        left = dict(zip(pruner.places, (int(step[row]) for step in steps), strict=True))
        alive, expected = list(range(N)), torch.zeros(N, output.features.shape[-1])

        def decide(block, states, _keys, sizes, received, left=left, alive=alive, expected=expected):
            best = sorted(range(len(sizes)), key=lambda t: -float(received[t]))[: left.get(block, len(sizes))]
            for token in set(range(len(sizes))) - set(best):
                expected[alive[token]] = states[token]
            alive[:] = [patch for token, patch in enumerate(alive) if token in best]
            return [[token] for token in best]

        members, states = by_hand(model, tower, pixels[row], decide, cls.after_block)
        assert [patches[0] for patches in members] == alive and len(alive) == keep[row]
        expected[alive] = states
        torch.testing.assert_close(output.features[row], expected, rtol=1e-4, atol=1e-4)


def test_restoring_everything_is_the_bare_tower_bit_for_bit():
    model, pixels = small_tower("clip"), pictures(3)
    bare = model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    assert torch.equal(run(model, Tower(model, -2), build_pruner("tome_unmerge"), pixels, (N, N)).features, bare)


def test_later_stages_and_the_model_get_all_tokens(deep_llava, mixed):
    vlm = deep_llava.vlm
    with torch.no_grad():
        alone = run_pruned(vlm, encode(vlm, mixed), build_pruner("tome_unmerge").eval(), 9)
        merged = run_pruned(vlm, encode(vlm, mixed), build_pruner("tome").eval(), 9)
        with attach(vlm, ["tome_unmerge", "uniform"], keep=[9, 6]) as attached:
            logits = vlm(**mixed).logits
    assert alone.tokens.tolist() == [36.0] * 4 and merged.tokens.tolist() == [9.0] * 4
    assert [stage.after for stage in attached.stats.stages] == [[36] * 4, [6] * 4]
    assert logits.shape[1] < alone.host.logits.shape[1]
    # Of what `tome` has in a slot, every patch of the group has a copy.
    kept = alone.output.features[torch.arange(4)[:, None], merged.output.index]
    torch.testing.assert_close(kept, merged.output.features, rtol=1e-4, atol=1e-4)
