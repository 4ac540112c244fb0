"""Signals against what eager models give away, and what they cost: nothing where nobody asks."""

import dataclasses

import pytest
import torch
from tiny_llava import LONG, NONE, TWO, make_image, make_llava
from torch.nn.modules.module import register_module_forward_pre_hook
from towers import small_tower
from transformers import LlavaForConditionalGeneration

from prunezoo import PruneZooError, build_pruner, encode
from prunezoo.core.contract import Pruner
from prunezoo.host.parts.tower import Tower
from prunezoo.host.signals.language import encode_needs
from prunezoo.host.signals.relevance import relevance_map
from prunezoo.host.signals.vision import mean_attention, watch_tower


@pytest.fixture
def tiny(tiny_llava):
    return tiny_llava


@pytest.fixture
def mixed(tiny):
    return tiny.batch([LONG, NONE, TWO], [[make_image(0)], [], [make_image(5), make_image(6)]])


@pytest.fixture(scope="module")
def eager(tiny_llava_folder):
    return LlavaForConditionalGeneration.from_pretrained(tiny_llava_folder, attn_implementation="eager").eval()


# The vision tower


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("feature_layer", [-2, -1, 2])
def test_vision_signals_of_any_block_equal_eager_maps(kind, feature_layer):
    model, pixels = small_tower(kind), torch.randn(3, 3, 20, 20)
    tower = Tower(model, feature_layer, has_cls=kind == "clip")
    last = {-2: 2, -1: 3, 2: 1}[feature_layer]
    kinds = ("received_attention", "vision_keys", "vision_values", *(["cls_attention"] if kind == "clip" else []))
    places = {"": last, "@0": 0, "@1": 1, "@-1": last, "@-2": last - 1}
    needs = tuple(name + place for name in kinds for place in places)
    with watch_tower(lambda: tower, needs) as signals:
        out = model(pixels)
    model.set_attn_implementation("eager")
    expected = model(pixels, output_attentions=True, output_hidden_states=True)
    assert torch.allclose(out.last_hidden_state, expected.last_hidden_state, atol=1e-5)
    for place, block in places.items():
        attention = expected.attentions[block].mean(1)
        first = attention.shape[1] - 25
        wanted = {"received_attention": attention.mean(1), "cls_attention": attention[:, 0]}
        normed = model.encoder.layers[block].layer_norm1(expected.hidden_states[block])
        wanted["vision_keys"] = model.encoder.layers[block].self_attn.k_proj(normed).unflatten(-1, (3, 8))
        wanted["vision_values"] = model.encoder.layers[block].self_attn.v_proj(normed).unflatten(-1, (3, 8))
        for name in kinds:
            torch.testing.assert_close(signals[name + place], wanted[name][:, first:], rtol=1e-4, atol=1e-5)
    assert (signals["received_attention"] - signals["received_attention@0"]).abs().max() > 1e-3


def test_attention_is_made_in_pieces_and_minds_the_mask():
    torch.manual_seed(0)
    query, key = torch.randn(2, 1500, 2, 4), torch.randn(2, 1500, 2, 4)
    whole = (torch.einsum("bqhd,bkhd->bhqk", query, key) * 0.5).softmax(-1).mean((1, 2))
    torch.testing.assert_close(mean_attention(query, key, 0.5, None), whole, rtol=1e-4, atol=1e-7)
    seen = torch.arange(1500) < torch.tensor([[1500], [700]])
    short = mean_attention(query[1:, :700], key[1:, :700], 0.5, None)
    number = torch.zeros(2, 1, 1, 1500).masked_fill(~seen[:, None, None], torch.finfo(torch.float32).min)
    for mask in (seen[:, None, None].expand(-1, 1, 1500, -1), number):
        masked = mean_attention(query, key, 0.5, mask)
        torch.testing.assert_close(masked[1, :700], short[0], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(masked[0], whole[0], rtol=1e-4, atol=1e-7)
        assert not masked[1, 700:].any()


def test_a_tower_says_what_it_has_not():
    tower = Tower(small_tower("siglip"), -2, has_cls=False)
    with pytest.raises(PruneZooError, match="received_attention"), watch_tower(lambda: tower, ("cls_attention",)):
        pass
    for block in (3, -4):  # the fourth block runs, but behind the projected one
        with (
            pytest.raises(PruneZooError, match="blocks are 0 to 2"),
            watch_tower(lambda: tower, (f"vision_keys@{block}",)),
        ):
            pass
    with pytest.raises(PruneZooError, match="patch embedding"):
        Tower(small_tower("clip"), 0).block_index()


# The decoder


def last_row(tiny, batch, encoded, maps):
    """(R, N): the row of the last real column, head mean."""
    last = encoded.mask.shape[1] - 1 - encoded.mask.flip(1).int().argmax(1)
    return torch.stack([maps[s, last[s]][slots] for s, slots in zip(encoded.sample, encoded.slots, strict=True)])


def word_rows(tiny, batch, encoded, maps):
    """(R, N): the mean of the rows of real words behind the image."""
    rows = []
    for sample, slots in zip(encoded.sample, encoded.slots, strict=True):
        ids = batch["input_ids"][sample]
        words = (torch.arange(len(ids)) > slots.max()) & (ids != tiny.vlm.config.image_token_id) & encoded.mask[sample]
        rows.append(maps[sample][words][:, slots].mean(0))
    return torch.stack(rows)


@pytest.mark.parametrize("side", ["left", "right"])
def test_decoder_signals_of_any_layer_equal_eager_ones(tiny, eager, side):
    tiny.processor.tokenizer.padding_side = side
    try:
        batch = tiny.batch([LONG, NONE, TWO], [[make_image(0)], [], [make_image(5), make_image(6)]])
    finally:
        tiny.processor.tokenizer.padding_side = "left"
    kinds = ("prompt_attention", "prompt_head_attention", "last_attention", "hidden_states")
    needs = tuple(kind + place for kind in kinds for place in ("", "@0", "@1"))
    encoded = encode(tiny.vlm, batch, needs)
    signals = encoded.inputs.signals
    with torch.no_grad():
        expected = eager(**batch, output_attentions=True, output_hidden_states=True)
    for place, layer in (("", 0), ("@0", 0), ("@1", 1)):
        maps = expected.attentions[layer].mean(1)  # (B, L, L)
        close = {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(signals["prompt_attention" + place], word_rows(tiny, batch, encoded, maps), **close)
        torch.testing.assert_close(signals["last_attention" + place], last_row(tiny, batch, encoded, maps), **close)
        heads = [word_rows(tiny, batch, encoded, head) for head in expected.attentions[layer].unbind(1)]
        torch.testing.assert_close(signals["prompt_head_attention" + place], torch.stack(heads, -1), **close)
        states = expected.hidden_states[layer][encoded.sample[:, None], encoded.slots]
        torch.testing.assert_close(signals["hidden_states" + place], states, rtol=1e-4, atol=1e-5)
    assert (signals["last_attention"] - signals["last_attention@1"]).abs().max() > 1e-4


@pytest.mark.parametrize("layer", [0, 1])
def test_norope_leaves_the_rotary_embedding_out(tiny, mixed, eager, layer):
    """An eager layer on the same states, told that every token stands at position 0."""
    needs = (f"last_attention@{layer}+norope", f"prompt_attention@{layer}+norope", f"last_attention@{layer}")
    encoded = encode(tiny.vlm, mixed, needs)
    with torch.no_grad():
        states = eager(**mixed, output_hidden_states=True).hidden_states[layer]
        decoder = eager.model.language_model
        still = decoder.rotary_emb(states, torch.zeros(states.shape[:2], dtype=torch.long))
        allowed = torch.ones(states.shape[1], states.shape[1]).tril().bool() & encoded.mask[:, None, None]
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
        block = decoder.layers[layer]
        maps = block.self_attn(block.input_layernorm(states), position_embeddings=still, attention_mask=mask)[1].mean(1)
    signals = encoded.inputs.signals
    torch.testing.assert_close(signals[needs[0]], last_row(tiny, mixed, encoded, maps), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(signals[needs[1]], word_rows(tiny, mixed, encoded, maps), rtol=1e-4, atol=1e-6)
    assert (signals[needs[0]] - signals[needs[2]]).abs().max() > 1e-4


def labelled(tiny, answer):
    """A prompt with an answer in it, of which `encode` must not let a signal know."""
    batch = tiny.batch([f"{LONG} {answer} </s>", f"{NONE} {answer} </s>"], [[make_image(0)], []])
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -2:] = batch["input_ids"][:, -2:]
    return {**batch, "labels": labels}


@pytest.mark.parametrize("name", ["last_attention@1", "prompt_attention@1", "hidden_states@1", "relevance"])
def test_the_answer_reaches_no_signal(tiny, name):
    one, other = (encode(tiny.vlm, labelled(tiny, answer), (name,)) for answer in ("red", "blue"))
    bare = encode(tiny.vlm, tiny.batch([LONG, NONE], [[make_image(0)], []]), (name,))
    for encoded in (one, other):
        torch.testing.assert_close(encoded.inputs.signals[name], bare.inputs.signals[name], rtol=1e-4, atol=1e-6)
    assert bare.inputs.signals[name].abs().max() > 0


def test_relevance_is_the_map_of_the_next_token(tiny, mixed):
    encoded = encode(tiny.vlm, mixed, ("relevance",))
    expected = relevance_map(tiny.vlm, encode(tiny.vlm, mixed))
    assert torch.equal(encoded.inputs.signals["relevance"], expected) and expected.max() > 0


@pytest.mark.parametrize("name", ["last_attention@previous", "hidden_states@previous"])
def test_previous_is_for_the_layer_stage(tiny, mixed, name):
    with pytest.raises(PruneZooError, match=f"{name}.*layer stage"):
        encode(tiny.vlm, mixed, (name,))


def test_a_layer_that_is_not_there_is_an_error(tiny, mixed):
    with pytest.raises(PruneZooError, match="layer 2 is wanted; this model's are 0 to 1"):
        encode(tiny.vlm, mixed, ("hidden_states@2",))


# What they cost


def calls_and_hooks(vlm, batch, needs):
    """The modules that `encode` calls, in order, and how many hooks there were on any module in the meantime."""
    called, hooks = [], []
    names = {module: name for name, module in vlm.named_modules()}

    def count():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in names)

    handle = register_module_forward_pre_hook(lambda m, _: (called.append(names.get(m, "")), hooks.append(count()))[0])
    try:
        encode(vlm, batch, needs)
    finally:
        handle.remove()
    return called, max(hooks), count()


def test_what_nobody_asks_for_costs_nothing(mixed):
    vlm = make_llava()
    vlm.model.get_image_features(mixed["pixel_values"])  # transformers puts on, for good, hooks of its own
    called, most, left = calls_and_hooks(vlm, mixed, ())
    assert most == left and not any("language_model.layers" in name for name in called)
    assert called.count("model.vision_tower") == 1
    # Against a run that asks: hooks are seen, and gone afterwards; the tower still runs once.
    asked, more, after = calls_and_hooks(vlm, mixed, ("received_attention", "vision_values@0"))
    assert more == most + 4 and after == left and asked == called


@pytest.mark.parametrize("layer", [0, 1])
def test_no_more_layers_run_than_needed(mixed, layer):
    vlm = make_llava()
    called, _, _ = calls_and_hooks(vlm, mixed, (f"last_attention@{layer}", "hidden_states@0"))
    run = {int(name.split(".")[3]) for name in called if name.endswith("mlp") and "language_model.layers" in name}
    assert run == set(range(layer)) and "lm_head" not in called


def test_encode_brings_what_a_stage_does_not_make_itself():
    needs = ("last_attention@previous", "vision_keys", "hidden_states", "relevance")
    for stage, expected in (("prompt", needs), ("vision", ()), ("layer", ("vision_keys", "relevance"))):
        pruner = type("Asking", (Pruner,), {"stage": stage, "needs": needs})()
        assert encode_needs(pruner) == expected
    assert encode_needs(build_pruner("visionzip")) == ("cls_attention", "vision_keys")


def test_signals_are_those_of_their_images(tiny):
    """Rows do not know of each other, whatever else is in the batch."""
    names = ("received_attention", "cls_attention@0", "last_attention@1", "hidden_states@1")
    both = encode(tiny.vlm, tiny.batch([LONG, TWO], [[make_image(0)], [make_image(5), make_image(6)]]), names)
    alone = encode(tiny.vlm, tiny.batch([LONG], [[make_image(0)]]), names)
    for name in names:
        torch.testing.assert_close(both.inputs.signal(name)[:1], alone.inputs.signal(name), rtol=1e-4, atol=1e-5)
    assert dataclasses.replace(alone.inputs, signals={}).signals == {}
