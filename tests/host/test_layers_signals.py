"""Signals that a pruner of the layer stage reads, against eager maps; and how they follow the tokens that are left."""

import pytest
import torch
from layer_oracle import Watch, masked
from layer_pruners import close, eager_copy, no_rotation, scripted
from tiny_llava import LONG, NONE, TWO, make_image

from prunezoo import encode, full_forward
from prunezoo.host import encode_needs, run_pruned


@pytest.mark.parametrize("name", ["last_attention", "prompt_attention", "self_attention"])
@pytest.mark.parametrize("where", ["", "@previous", "@0", "@1", "+norope"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_signals_equal_eager_maps(deep_llava, side, name, where):
    """Read while sdpa runs, from the queries of the wanted rows; behind a first cut too."""
    eager = eager_copy(deep_llava.vlm)
    images = [[make_image(0)], [make_image(5), make_image(6)], []]
    batch = deep_llava.batch([LONG, TWO, NONE], images, padding_side=side)
    pruner = scripted(2, 3)
    pruner.needs = (name + where,)
    with torch.no_grad(), Watch(pruner) as watch:
        encoded = encode(deep_llava.vlm, batch, encode_needs(pruner))
        run_pruned(deep_llava.vlm, encoded, pruner, torch.tensor([5, 20, 9]))
    for inputs, _ in watch.calls:
        signal = inputs.signal(name + where)
        assert signal.shape == inputs.valid.shape and (signal >= 0).all()
    inputs, gone = watch.calls[1][0], watch.gone(encoded)[0]
    layer = {"": 3, "@previous": 2, "@0": 0, "@1": 1, "+norope": 3}[where]
    with torch.no_grad(), masked(eager, {2: gone[2]}):
        if where == "+norope":  # no rotation is rotation by nothing
            pass_through = eager.get_decoder().layers[3].register_forward_pre_hook(no_rotation, with_kwargs=True)
        maps = full_forward(eager, encoded, output_attentions=True).attentions[layer].mean(1)
        if where == "+norope":
            pass_through.remove()
    for row, sample in enumerate(encoded.sample.tolist()):
        cells = inputs.cells[row][inputs.valid[row]]
        slots = encoded.slots[row][cells[:, 1] * 6 + cells[:, 2]]
        ids = encoded.batch["input_ids"][sample]
        words = encoded.mask[sample] & (ids != deep_llava.vlm.config.image_token_id)
        if name == "last_attention":
            words &= torch.arange(len(ids)) == int(words.nonzero().max())
        words &= torch.arange(len(ids)) > slots.max()
        expected = maps[sample][words][:, slots].mean(0)
        if name == "self_attention":  # a token is seen by itself and those behind it, as many as there were
            lookers = encoded.slots[row] if layer < 2 else slots
            counts = (lookers[:, None] >= slots).sum(0)
            expected = maps[sample][lookers][:, slots].sum(0) / counts
        torch.testing.assert_close(
            watch.calls[1][0].signal(name + where)[row][: len(slots)], expected, rtol=0, atol=1e-5
        )


def test_signals_of_the_tower_and_hidden_states_follow_the_survivors(deep_llava, mixed):
    pruner = scripted(1, 3)
    pruner.needs = ("cls_attention", "hidden_states@1")
    with torch.no_grad(), Watch(pruner) as watch:
        encoded = encode(deep_llava.vlm, mixed, encode_needs(pruner))
        run_pruned(deep_llava.vlm, encoded, pruner, 5)
        states = full_forward(deep_llava.vlm, encoded, output_hidden_states=True).hidden_states[1]
    inputs, output = watch.calls[1][0], watch.calls[0][1]
    assert list(encoded.inputs.signals) == ["cls_attention"]
    assert torch.equal(inputs.signal("cls_attention"), encoded.inputs.signal("cls_attention").gather(1, output.index))
    kept = encoded.slots.gather(1, output.index)
    close(inputs.signal("hidden_states@1"), states[encoded.sample[:, None], kept])
    assert inputs.layer == 3 and inputs.step == 1 and inputs.features.shape[1] == output.index.shape[1]
    close(watch.calls[0][0].features, states[encoded.sample[:, None], encoded.slots])
    words = encoded.batch["input_ids"] != deep_llava.vlm.config.image_token_id
    close(watch.calls[0][0].text[0][watch.calls[0][0].text_valid[0]], states[0][words[0] & encoded.mask[0]])
