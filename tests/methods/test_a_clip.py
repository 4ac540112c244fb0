"""A-CLIP against loops over patches and cells; and its lesson."""

import math

import pytest
import torch
from made_inputs import make_inputs
from towers import small_tower
from vision_runs import N, run

from prunezoo import PruneZooError, build_pruner
from prunezoo.host.parts.tower import Tower
from prunezoo.learned.a_clip import by_cells


@pytest.mark.parametrize("side", [1, 2, 3])
def test_scores_are_means_over_cells(side):
    inputs = make_inputs(pad=2)
    scores = torch.randn(inputs.valid.shape, generator=torch.Generator().manual_seed(side))
    found = by_cells(scores, inputs, side)
    for row, valid in enumerate(inputs.valid):
        cells = {}
        for token in valid.nonzero()[:, 0].tolist():
            _, high, wide = inputs.cells[row, token].tolist()
            cells.setdefault((high // side, wide // side), []).append(token)
        for members in cells.values():
            mean = sum(float(scores[row, token]) for token in members) / len(members)
            for token in members:
                assert float(found[row, token]) == pytest.approx(mean, abs=1e-5)


def test_whole_cells_stay_and_the_last_in_part():
    inputs = make_inputs(grids=((6, 6),))
    pruner = build_pruner("a_clip", attention="received").eval()
    pruner.head = type("Told", (torch.nn.Module,), {"forward": lambda _, seen: seen.cells[..., 1].float()})()
    kept = pruner(inputs, 14).index[0].tolist()
    assert kept == [12, 13, *range(24, 36)]  # the lower rows of cells, then half of the first above


@pytest.mark.parametrize(("kind", "attention"), [("clip", "cls"), ("siglip", "received")])
def test_it_acts_behind_one_early_block(kind, attention):
    model, pixels = small_tower(kind), torch.randn(2, 3, 20, 20)
    tower, pruner = Tower(model, -1, has_cls=kind == "clip"), build_pruner("a_clip", attention=attention)
    lengths = []
    handles = [b.register_forward_hook(lambda _m, _a, out: lengths.append(out.shape[1])) for b in tower.blocks]
    output = run(model, tower, pruner, pixels, (8, 8))
    for handle in handles:
        handle.remove()
    assert [length - tower.prefix for length in lengths] == [8] * 4 and output.counts == (8, 8)
    assert pruner.stages(24) == (3,) and pruner.stages(4) == (0,) and build_pruner("a_clip", block=2).stages(4) == (2,)
    assert N == 25


def test_the_lesson_is_the_mean_of_all_blocks():
    inputs, pruner = make_inputs(), build_pruner("a_clip")
    labels = [torch.rand(inputs.valid.shape, generator=torch.Generator().manual_seed(b)) for b in range(3)]
    assert pruner.learns_from(3) == tuple(f"cls_attention@{b}" for b in range(3))
    signals = {**inputs.signals, **dict(zip(pruner.learns_from(3), labels, strict=True))}
    inputs = type(inputs)(inputs.features, inputs.valid, inputs.cells, signals=signals, layer=0, depth=3)
    logits, loss = pruner.head(inputs), 0.0
    for row, valid in enumerate(inputs.valid):
        tokens = valid.nonzero()[:, 0].tolist()
        mean = [sum(float(label[row, t]) for label in labels) / 3 for t in tokens]
        whole = sum(math.exp(float(logits[row, t])) for t in tokens)
        for value, token in zip(mean, tokens, strict=True):
            share = value / sum(mean)
            loss += share * (math.log(share) - float(logits[row, token]) + math.log(whole)) / len(inputs.valid)
    assert float(pruner.lesson(inputs)) == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("bad", [{"hidden": 0}, {"hidden": 5000}, {"cell": 0}, {"attention": "mean"}])
def test_what_is_out_of_range_is_refused(bad):
    with pytest.raises(PruneZooError, match=f"{next(iter(bad))}=.*a_clip"):
        build_pruner("a_clip", **bad)
