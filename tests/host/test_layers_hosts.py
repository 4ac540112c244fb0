"""The layer stage in models of other kinds: half precision, LoRA around them, compiled, with the masks of flash."""

from types import SimpleNamespace

import pytest
import torch
from layer_pruners import RAGGED, close, scripted
from peft import LoraConfig, get_peft_model
from tiny_llava import LONG, SHORT, make_image, make_llava

from prunezoo import PruneZooError, attach, encode
from prunezoo.host.stages.layer_cache import cut_mask


def test_bfloat16_agrees_with_float32(deep_llava, mixed):
    vlm = make_llava(num_hidden_layers=4)
    vlm.load_state_dict(deep_llava.vlm.state_dict())
    rough = {k: v.bfloat16() if v.is_floating_point() else v for k, v in mixed.items()}
    with attach(deep_llava.vlm, scripted(1, 3), keep=9):
        exact = deep_llava.vlm(**mixed).logits[:, -1]
    with attach(vlm.bfloat16(), scripted(1, 3), keep=9):
        logits = vlm(**rough).logits[:, -1]
        assert vlm.generate(**rough, max_new_tokens=3).shape[1] == mixed["input_ids"].shape[1] + 3
    assert logits.dtype == torch.bfloat16
    with torch.no_grad():
        plain = (vlm(**rough).logits[:, -1].float() - deep_llava.vlm(**mixed).logits[:, -1]).abs().max()
    assert (logits.float() - exact).abs().max() < 2 * plain  # as far apart as the bare models are


def test_peft_models(deep_llava, mixed):
    vlm = make_llava(num_hidden_layers=4)
    peft = get_peft_model(vlm, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    bare = peft(**mixed).logits
    with attach(peft, scripted(1, 3), keep=9) as run:
        short, sequences = peft(**mixed).logits, peft.generate(**mixed, max_new_tokens=3)
    assert run.stats.after == [9] * 8 and short.shape[1] < bare.shape[1]
    with attach(peft.get_base_model(), scripted(1, 3), keep=9):
        assert torch.equal(vlm(**mixed).logits, short) and torch.equal(
            vlm.generate(**mixed, max_new_tokens=3), sequences
        )
    with peft.disable_adapter(), attach(peft, scripted(1, 3), keep=9):
        assert (peft(**mixed).logits[:, -1] - short[:, -1]).abs().max() > 1e-4
    assert torch.equal(peft(**mixed).logits, bare)


def test_compiled_models(deep_llava):
    """Two layers, one prompt and one step: tracing is slow."""
    vlm, batch = make_llava(), deep_llava.batch([LONG, SHORT], [[make_image(0)], [make_image(1)]])
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 1).long()], 1)

    def talk():
        with torch.no_grad(), attach(vlm, scripted(1), keep=RAGGED[:2]):
            out = vlm(**batch, use_cache=True)
            return out.logits, vlm(mask[:, -1:], attention_mask=mask, past_key_values=out.past_key_values).logits

    expected = talk()
    vlm.compile(backend="eager")
    for one, two in zip(talk(), expected, strict=True):
        close(one, two)
    torch.compiler.reset()


def test_flash_attention_is_given_masks_of_two_dimensions(deep_llava, mixed):
    """The kernel is not here; what it would be given is: no gaps in the positions, (B, S) masks that hide filler."""
    vlm, given = make_llava(num_hidden_layers=4), {}
    vlm.load_state_dict(deep_llava.vlm.state_dict())
    pruner = scripted(1, 3)
    with attach(vlm, pruner, keep=RAGGED) as run:
        encoded = encode(vlm, mixed)
        vlm.config.text_config._attn_implementation = "flash_attention_2"
        prompt = run.layers.prefill(encoded)
        hidden = torch.randn(4, encoded.mask.shape[1], 32)
        rotary = run.layers.plan.decoder.rotary(hidden, torch.arange(hidden.shape[1])[None])
        for layer in range(4):
            kwargs = {"attention_mask": mixed["attention_mask"].bool(), "position_embeddings": rotary,
                      "position_ids": torch.arange(hidden.shape[1])[None], "past_key_values": None}  # fmt: skip
            hidden, given[layer] = prompt.layer(layer, hidden, kwargs)
    for layer in (1, 2, 3):
        mask, positions = given[layer]["attention_mask"], given[layer]["position_ids"]
        assert mask.shape == (4, positions.shape[1]) and mask.dtype == torch.bool
        assert torch.equal(positions[0], torch.arange(positions.shape[1]))
    words = int((mixed["attention_mask"].bool() & (mixed["input_ids"] != 4))[1].sum())
    assert int(given[3]["attention_mask"][1].sum()) == words + 20 + 1
    with attach(vlm, scripted(1), keep=3) as run:
        prompt = run.layers.prefill(encoded)
        kwargs["attention_mask"], hidden = torch.ones(4, 1, 9, 9), torch.randn(4, encoded.mask.shape[1], 32)
        with pytest.raises(PruneZooError, match="no mask of four dimensions"):
            prompt.layer(1, hidden, kwargs)
    window = SimpleNamespace(kernel="flash_attention_2", flash=True, window=lambda layer: 4)
    columns = torch.arange(6)[None]
    with pytest.raises(PruneZooError, match="counts its window over the tokens left"):
        cut_mask(window, 0, hidden, columns, columns, columns >= 0, True)
