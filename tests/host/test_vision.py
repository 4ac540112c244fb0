"""The vision stage against a tower that is run by hand, one picture at a time, with lists instead of masks."""

from itertools import pairwise

import pytest
import torch
from tower_oracle import by_hand, slots_of, tome_by_hand
from towers import small_tower
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from vision_runs import TOWERS, Attended, AttendedLater, N, patches, run

from prunezoo import PruneInputs, PruneZooError, build_pruner
from prunezoo.core.merge import merge_tokens
from prunezoo.host.parts.tower import Tower
from prunezoo.host.stages.cut import Timer
from prunezoo.host.stages.vision import VisionStage


def expect(output, row, members, states):
    """Row ``row`` of the output is these tokens, each at the patch nearest to the middle of those it stands for."""
    slots = slots_of(members, N)
    order = sorted(range(len(slots)), key=slots.__getitem__)
    k = int(output.count[row])
    assert output.index[row, :k].tolist() == sorted(slots)
    assert not output.valid[row, k:].any() and not output.index[row, k:].any()
    torch.testing.assert_close(output.features[row, :k], states[order], rtol=1e-4, atol=1e-4)
    for column, token in enumerate(order):
        assert (output.groups[row] == column).nonzero()[:, 0].tolist() == sorted(members[token])


@pytest.mark.parametrize(("kind", "layer"), TOWERS)
@pytest.mark.parametrize("keep", [(12, 12), (3, 25), (25, 7), (1, 2)], ids=str)
def test_tome_by_hand(kind, layer, keep):
    model, pixels = small_tower(kind), torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    tower, pruner = Tower(model, layer, has_cls=kind == "clip"), build_pruner("tome")
    output = run(model, tower, pruner, pixels, keep)
    assert output.count.tolist() == list(keep)
    steps = pruner.schedule(torch.tensor(keep), torch.tensor([N, N]), tower.depth)
    bare = model(pixels, output_hidden_states=True).hidden_states[layer][:, tower.prefix :]
    for row in range(2):
        left = [int(step[row]) for step in steps]
        members, states = by_hand(model, tower, pixels[row], tome_by_hand(left))
        assert len(members) == keep[row] and (keep[row] == N or max(map(len, members)) > 1)
        expect(output, row, members, states)
        if keep[row] < N:  # the pass by hand would notice if nothing were merged
            assert (bare[row, output.index[row, : keep[row]]] - states).abs().max() > 0.1


@pytest.mark.parametrize(("kind", "layer"), TOWERS)
def test_keeping_everything_is_the_bare_tower(kind, layer):
    model, pixels = small_tower(kind), torch.randn(2, 3, 20, 20)
    tower = Tower(model, layer, has_cls=kind == "clip")
    bare = model(pixels, output_hidden_states=True).hidden_states[layer][:, tower.prefix :]
    output = run(model, tower, build_pruner("tome"), pixels, (N, N))
    assert torch.equal(output.features, bare) and output.valid.all()
    assert torch.equal(output.index, torch.arange(N).expand(2, -1))


def test_tome_in_small_steps_by_hand():
    model, pixels = small_tower("clip"), torch.randn(1, 3, 20, 20, generator=torch.Generator().manual_seed(3))
    tower, pruner = Tower(model, -2), build_pruner("tome", metric="states", most=0.1)
    output = run(model, tower, pruner, pixels, (6,))
    left = [int(step) for step in pruner.schedule(torch.tensor([6]), torch.tensor([N]), tower.depth)]
    expect(output, 0, *by_hand(model, tower, pixels[0], tome_by_hand(left, "states", 0.1)))
    assert not torch.equal(output.index, run(model, tower, build_pruner("tome"), pixels, (6,)).index)
    assert pruner.needs == () and build_pruner("tome").needs == ("vision_keys",)


@pytest.mark.parametrize("bad", [{"metric": "values"}, {"most": 0.0}, {"most": 0.6}])
def test_tome_refuses_what_is_out_of_range(bad):
    with pytest.raises(PruneZooError, match=f"{next(iter(bad))}=.*tome"):
        build_pruner("tome", **bad)


@pytest.mark.parametrize("cls", [Attended, AttendedLater])
@pytest.mark.parametrize(("kind", "layer"), TOWERS)
@pytest.mark.parametrize("keep", [(9, 9), (4, 16)], ids=str)
def test_dropping_inside_and_behind_blocks_by_hand(kind, layer, keep, cls):
    model, pixels = small_tower(kind), torch.randn(2, 3, 20, 20, generator=torch.Generator().manual_seed(2))
    tower, pruner = Tower(model, layer, has_cls=kind == "clip"), cls()
    output = run(model, tower, pruner, pixels, keep)
    steps = pruner.schedule(torch.tensor(keep), torch.tensor([N, N]), tower.depth)
    for row in range(2):
        left = dict(zip(pruner.places, (int(step[row]) for step in steps), strict=True))

        def decide(block, _states, _keys, sizes, received, left=left):
            best = sorted(range(len(sizes)), key=lambda t: -float(received[t]))
            return [[t] for t in best[: left.get(block, len(best))]]

        expect(output, row, *by_hand(model, tower, pixels[row], decide, cls.after_block))


def test_images_do_not_know_of_each_other():
    model, pixels = small_tower("clip"), torch.randn(3, 3, 20, 20)
    tower, pruner = Tower(model, -2), build_pruner("tome")
    batch = run(model, tower, pruner, pixels, (2, 20, 25))
    for row, keep in enumerate((2, 20, 25)):
        alone = run(model, tower, pruner, pixels[row : row + 1], (keep,))
        assert torch.equal(alone.index[0], batch.index[row, :keep])
        torch.testing.assert_close(alone.features[0], batch.features[row, :keep], rtol=1e-4, atol=1e-5)


class AttendedInOne(Attended):
    places = (1,)


def test_eager_and_sdpa_towers_agree_and_other_kernels_are_refused_where_a_mask_is_needed():
    model, pixels = small_tower("clip"), torch.randn(2, 3, 20, 20)
    tower, pruner = Tower(model, -2), build_pruner("tome")
    sdpa = run(model, tower, pruner, pixels, (5, 9))
    model.set_attn_implementation("eager")
    eager = run(model, tower, pruner, pixels, (5, 9))
    assert torch.equal(sdpa.index, eager.index)
    torch.testing.assert_close(sdpa.features, eager.features, rtol=1e-4, atol=1e-5)
    # A kernel that we know nothing about, such as flash attention, which takes no floats as a mask.
    AttentionInterface.register("other", sdpa_attention_forward)
    model.set_attn_implementation("other")
    with pytest.raises(PruneZooError, match=r"tome.*'sdpa' or 'eager' in the vision tower, which has 'other'"):
        run(model, tower, pruner, pixels, (5, 9))
    # Nothing has a size and all images keep as many: no mask is needed.
    assert run(model, tower, AttendedInOne(), pixels, (5, 5)).count.tolist() == [5, 5]


def test_all_hooks_are_gone_afterwards_even_if_the_pruner_fails():
    model, pixels = small_tower("clip"), torch.randn(1, 3, 20, 20)
    bare = model(pixels, output_hidden_states=True).hidden_states[-2]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]

    class Failing(Attended):
        def score(self, inputs):
            raise ZeroDivisionError

    run(model, Tower(model, -2), build_pruner("tome"), pixels, (5,))
    with pytest.raises(ZeroDivisionError):
        run(model, Tower(model, -2), Failing(), pixels, (5,))
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert torch.equal(model(pixels, output_hidden_states=True).hidden_states[-2], bare)


@pytest.mark.parametrize(
    ("tower", "reason"),
    [
        ({"joined": "a shuffle joins patches"}, "a shuffle joins patches"),
        ({"feature_layer": [-3, -2]}, "several blocks"),
    ],
)
def test_towers_that_would_be_pruned_wrongly_are_refused(tower, reason):
    tower = Tower(small_tower("clip"), **{"feature_layer": -2, **tower})
    with pytest.raises(PruneZooError, match=f"tome.*{reason}.*prompt or layer stage"):
        VisionStage(tower, build_pruner("tome"), patches(1), (5,), Timer(torch.device("cpu")))


def test_stages_and_signals_that_are_not_there_are_refused():
    tower = Tower(small_tower("clip"), -2)
    for places in ((), (0, 3), (1, 0), (-1,)):
        pruner = type("Elsewhere", (Attended,), {"places": places})()
        with pytest.raises(PruneZooError, match="of this tower 3 run"):
            VisionStage(tower, pruner, patches(1), (5,), Timer(torch.device("cpu")))
    for name in ("received_attention@1", "prompt_attention", "relevance"):
        pruner = type("Asking", (Attended,), {"needs": (name,)})()
        with pytest.raises(PruneZooError, match=f"needs '{name}'.*vision_keys"):
            VisionStage(tower, pruner, patches(1), (5,), Timer(torch.device("cpu")))
    pruner = type("Asking", (Attended,), {"needs": ("cls_attention",)})()
    stage = VisionStage(
        Tower(small_tower("siglip"), -2, has_cls=False), pruner, patches(1), (5,), Timer(torch.device("cpu"))
    )
    with pytest.raises(PruneZooError, match=r"no CLS token.*received_attention"):
        stage.__enter__()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in stage.tower.model.modules())


# Schedules


@pytest.mark.parametrize("depth", [1, 2, 4, 23])
@pytest.mark.parametrize("available", [144, 576])
def test_tome_merges_evenly_and_halves_at_most_where_that_reaches(depth, available):
    pruner = build_pruner("tome")
    for keep in (1, 2, 9, 16, 48, 64, 143, available):
        left = [available] + [
            int(step) for step in pruner.schedule(torch.tensor([keep]), torch.tensor([available]), depth)
        ]
        merged = [before - after for before, after in pairwise(left)]
        assert left[-1] == keep and min(merged) >= 0
        if keep * 2**depth >= available:
            assert all(2 * after >= before for before, after in pairwise(left))
            even = (available - keep) / depth
            # Even from the first block on; only where that would more than halve, as many as halving leaves.
            first = [i for i, m in enumerate(merged) if abs(m - even) > 1]
            assert all(left[i + 1] == keep * 2 ** (depth - 1 - i) for i in first[1:])
        else:
            growth = [before / after for before, after in pairwise(left)]
            assert max(growth) < 2 * min(growth) + 1


def test_stage_inputs_say_sizes_and_cells():
    seen = []

    class Watching(type(build_pruner("tome"))):
        def reduce(self, inputs, keep):
            seen.append(inputs)
            return super().reduce(inputs, keep)

    model = small_tower("clip")
    run(model, Tower(model, -2), Watching(), torch.randn(2, 3, 20, 20), (6, 10))
    assert [inputs.layer for inputs in seen] == [0, 1, 2] and seen[0].sizes is None
    for inputs in seen[1:]:
        sizes = inputs.sizes.masked_fill(~inputs.valid, 0)
        assert sizes.sum(1).tolist() == [N, N] and sizes.max() > 1
        assert inputs.features.shape == (*inputs.valid.shape, 24) and inputs.cells.shape[1] == inputs.valid.shape[1]
        assert all(
            len(set(map(tuple, cells[valid].tolist()))) == int(valid.sum())
            for cells, valid in zip(inputs.cells, inputs.valid, strict=True)
        )


def test_sizes_are_counted_exactly_whatever_the_type_of_the_states():
    inputs = PruneInputs(
        torch.zeros(1, 600, 2).bfloat16(), torch.ones(1, 600, dtype=torch.bool), torch.zeros(1, 600, 3).long()
    )
    output = merge_tokens(inputs, torch.zeros(1, 600, dtype=torch.long))
    assert inputs.after(output).sizes.tolist() == [[600]]
