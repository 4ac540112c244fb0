"""What families refuse: models, inputs, and gates beyond a window that the host cannot make; and one that it can."""

import pytest
import torch
from families import FAMILIES, LARGE, SIDE, SMALL, TALL, WIDE, Sample, here, tiny_family
from families.gemma import Gemma3

from prunezoo import PruneZooError, attach, encode, gated_forward
from prunezoo.host.families import find_family


def test_a_prompt_longer_than_the_sliding_window():
    """Gemma 3: bit for bit with all tokens, gates under the model's own windows; the window counts tokens left."""
    here("gemma3")
    family = Gemma3()
    family.window = 12  # beyond an image's 9 tokens
    batch = family.batch([Sample((SMALL, WIDE), 9), Sample((TALL,), 12)])
    vlm = family.vlm
    with torch.no_grad():
        bare = vlm(**batch).logits
        assert (bare - FAMILIES["gemma3"].vlm(**batch).logits).abs().max() > 0.01
        encoded = encode(vlm, batch)
        ones = gated_forward(vlm, encoded, torch.ones(3, 9), log_eps=1e-9).logits[:, -1]
        torch.testing.assert_close(ones, bare[:, -1], rtol=0, atol=5e-5)
        with attach(vlm, "random", keep=1.0):
            assert torch.equal(vlm(**batch).logits, bare)
        with attach(vlm, "random", keep=2):
            assert torch.equal(vlm.generate(**batch, max_new_tokens=3)[:, :-3], batch["input_ids"])


def test_gates_are_refused_beyond_a_window_that_the_host_cannot_make():
    tiny = tiny_family("llava_onevision")
    vlm = tiny.build()
    text = vlm.config.text_config
    text.sliding_window, text.layer_types = 8, ["sliding_attention"] * text.num_hidden_layers
    encoded = encode(tiny.vlm, tiny.batch([Sample((SMALL,), 5)]))
    with pytest.raises(PruneZooError, match="sliding window of 8: use shorter prompts"):
        gated_forward(vlm, encoded, torch.ones(encoded.inputs.valid.shape))


def changed(name, **values):
    """A model with other values in its configuration."""
    vlm = FAMILIES[name].build()
    for key, value in values.items():
        setattr(vlm.config, key, value)
    return vlm


REFUSALS = {
    "llava with CLS": (
        lambda: find_family(changed("llava", vision_feature_select_strategy="full")),
        "clip_vision_model wi",
    ),
    "internvl with CLS": (lambda: find_family(changed("internvl", vision_feature_select_strategy="full")), "'default'"),
    "text model": (lambda: find_family(FAMILIES["llava"].vlm.get_decoder()), "supported: LLaVA, LLaVA-NeXT"),
    "model without a head": (lambda: find_family(FAMILIES["gemma3"].vlm.model), "ForConditionalGeneration"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_models_that_are_refused(case):
    call, remedy = REFUSALS[case]
    with pytest.raises(PruneZooError, match=remedy):
        call()


INPUTS = {
    "sizes for llava": ("llava", {"image_sizes": torch.tensor([[24, 24]])}, "image_sizes"),
    "no sizes for llava_next": ("llava_next", {"image_sizes": None}, "processor's image_sizes"),
    "another layer": ("llava", {"vision_feature_layer": -1}, "set it in the model's config"),
    "too few tiles": ("internvl", {"pixel_values": torch.zeros(1, 3, SIDE, SIDE)}, "use one processor"),
    "a broken run": ("internvl", {"input_ids": torch.tensor([[1, 3, 3, 3, 20]])}, "no multiple of the 9 of a tile"),
    "missing placeholders": ("gemma3", {"input_ids": torch.tensor([[1, 3, 3, 3, 20]])}, "9 tokens: use one processor"),
    "over two samples": ("llava", {"input_ids": torch.tensor([[1, *[3] * 8], [1, *[3] * 8]])}, "over two samples"),
    "a clip": ("idefics3", {"pixel_values_videos": torch.zeros(1, 2, 3, SIDE, SIDE)}, "frames as images"),
}


@pytest.mark.parametrize("case", INPUTS)
def test_inputs_that_are_refused(case):
    name, values, remedy = INPUTS[case]
    tiny = here(name)
    batch = {**tiny.batch([Sample((LARGE,), 3)]), **values}
    if batch["attention_mask"].shape != batch["input_ids"].shape:
        batch.pop("attention_mask")
    with torch.no_grad(), pytest.raises(PruneZooError, match=remedy):
        encode(tiny.vlm, batch)
