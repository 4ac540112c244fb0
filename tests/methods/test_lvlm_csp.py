"""LVLM_CSP: schedules that are solved for a mean, and the first phase chosen by CLS."""

import pytest
import torch
from layer_oracle import Watch
from made_inputs import make_inputs
from tiny_llava import LONG, TWO, make_image

from prunezoo import PruneZooError, build_pruner, encode
from prunezoo.host import encode_needs, run_pruned


@pytest.mark.parametrize("mean", [0.3, 0.344, 0.4, 0.6])
@pytest.mark.parametrize("depth", [28, 32])
@pytest.mark.parametrize("keep", [16, 36, 64])
def test_what_layers_read_in_the_mean_is_what_was_asked_for(mean, depth, keep):
    pruner = build_pruner("lvlm_csp", mean=mean)
    few, whole, last = (int(step[0]) for step in pruner.schedule(torch.tensor([keep]), torch.tensor([576]), depth))
    one, two, three = pruner.stages(depth)
    counts = [576] * one + [few] * (two - one) + [whole] * (three - two) + [last] * (depth - three)
    assert whole == 576 and last == keep and keep <= few < 576
    assert abs(sum(counts) / depth / 576 - mean) < 1 / 576


def test_the_published_savings_have_about_these_layers():
    """At a quarter and a sixteenth of the tokens: 13, 7 and 12 of 32 layers read 34.4 %, and layer 0 reads all here."""
    assert build_pruner("lvlm_csp", mean=0.344 + 0.75 / 32).stages(32) == (1, 13, 20)
    assert build_pruner("lvlm_csp", mean=0.291 + 0.75 / 32).stages(32) == (1, 14, 19)


@torch.no_grad()
def test_in_a_model_it_is_measured(deep_llava):
    batch = deep_llava.batch([LONG, TWO], [[make_image(0)], [make_image(5), make_image(6)]])
    pruner = build_pruner("lvlm_csp", mean=0.6, few="cls").eval()
    encoded = encode(deep_llava.vlm, batch, encode_needs(pruner))
    with Watch(pruner) as watch:
        run = run_pruned(deep_llava.vlm, encoded, pruner, 5)
    assert run.layers.tolist() == [[36, 9, 36, 5]] * 3
    best = encoded.inputs.signal("cls_attention").topk(9).indices.sort().values
    assert torch.equal(watch.calls[0][1].index, best)


def test_the_first_phase_by_attention_and_by_place_differ():
    inputs = make_inputs()
    found = [build_pruner("lvlm_csp", few=few)(inputs, 9).index.tolist() for few in ("uniform", "cls", "received")]
    assert len({str(index) for index in found}) == 3


def test_bad_fields_are_refused():
    for field, value in (("mean", 1.0), ("few", "segments"), ("share", 0.0), ("states", "first"), ("layers", (1, 2))):
        with pytest.raises(PruneZooError, match=f"{field}="):
            build_pruner("lvlm_csp", **{field: value})
