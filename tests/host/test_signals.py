"""Signals against what eager models give away, and what they cost: nothing where nobody asks."""

import dataclasses

import pytest
import torch
from tiny_llava import LONG, NONE, TWO, make_image, make_llava
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import LlavaForConditionalGeneration

from prunezoo import PruneZooError, build_pruner, encode
from prunezoo.core.contract import Pruner
from prunezoo.core.signals import KINDS, MAP_KINDS, STATE_KINDS, WORD_KINDS
from prunezoo.host.parts.decoder import Decoder
from prunezoo.host.signals import language, layer_maps
from prunezoo.host.signals.language import encode_needs
from prunezoo.host.signals.relevance import relevance_map


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


def recorded(vlm, batch, layer):
    """What a layer's attention and MLP take and give, and its neurons, and its maps ``(B, H, L, L)``."""
    block, made = vlm.model.language_model.layers[layer], {}
    into = {"attention_in": block.self_attn, "mlp_in": block.mlp, "neurons": block.mlp.down_proj}
    out = {"attention_out": block.self_attn, "mlp_out": block.mlp}

    def enter(name):
        return lambda _, args, kwargs: made.update({name: args[0] if args else kwargs["hidden_states"]})

    def leave(name):
        return lambda _, args, output: made.update({name: output[0] if isinstance(output, tuple) else output})

    handles = [part.register_forward_pre_hook(enter(name), with_kwargs=True) for name, part in into.items()]
    handles += [part.register_forward_hook(leave(name)) for name, part in out.items()]
    with torch.no_grad():
        output = vlm(**batch, output_attentions=True, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    return made, output.hidden_states[layer], output.attentions[layer]


@pytest.mark.parametrize(("side", "layer"), [("left", 0), ("right", 1)])
def test_maps_and_states_of_any_layer_equal_eager_ones(tiny, eager, side, layer):
    tiny.processor.tokenizer.padding_side = side
    try:
        batch = tiny.batch([LONG, NONE, TWO], [[make_image(0)], [], [make_image(5), make_image(6)]])
    finally:
        tiny.processor.tokenizer.padding_side = "left"
    kinds = (*MAP_KINDS, *STATE_KINDS, *WORD_KINDS)
    encoded = encode(tiny.vlm, batch, tuple(f"{kind}@{layer}" for kind in kinds))
    made, states, maps = recorded(eager, batch, layer)
    columns, real = encoded.words
    decoder = eager.model.language_model
    close = {"rtol": 1e-4, "atol": 1e-5}
    for row, (sample, slots) in enumerate(zip(encoded.sample.tolist(), encoded.slots, strict=True)):
        words = columns[sample, real[sample]]
        taken = {"R N": slots, "R T": words}
        counts = {"R N": slice(None), "R T": real[sample]}
        heads = maps[sample].movedim(0, -1)  # (L, L, H)
        wanted = {
            "layer_head_attention": heads[slots][:, slots],
            "word_head_attention": heads[words][:, slots].transpose(0, 1),
            "seen_word_head_attention": heads[slots][:, words],
            "among_words_head_attention": heads[words][:, words],
        }
        for kind, expected in wanted.items():
            got = encoded.inputs.signal(f"{kind}@{layer}")[row]
            if "T" in KINDS[kind].axes:
                assert not got[:, ~real[sample]].any()
                got = got[:, real[sample]]
            got = got[real[sample]] if kind.startswith("among") else got
            torch.testing.assert_close(got, expected, **close)
            if kind.replace("_head", "") in KINDS:
                mean = encoded.inputs.signal(f"{kind.replace('_head', '')}@{layer}")[row]
                mean = mean[:, real[sample]] if kind.startswith("word") else mean
                torch.testing.assert_close(mean, expected.mean(-1), **close)
        for prefix, axes in (("", "R N"), ("word_", "R T")):
            at = taken[axes]
            parts = {name: part[sample, at] for name, part in made.items()}
            norms = {name: part.norm(dim=-1) for name, part in parts.items()}
            expected = {"hidden_states": states[sample, at], "mlp_activations": parts["neurons"]}
            expected["normed_states"] = decoder.norm(expected["hidden_states"])
            for half in ("attention", "mlp"):
                dots = (parts[half + "_in"] * parts[half + "_out"]).sum(-1)
                norm_in, norm_out = norms[half + "_in"], norms[half + "_out"]
                expected[half + "_change"] = torch.stack([norm_out / norm_in, dots / norm_in / norm_out], -1)
            for kind, values in expected.items():
                got = encoded.inputs.signal(f"{prefix}{kind}@{layer}")[row]
                torch.testing.assert_close(got[counts[axes]], values, **close)
                assert axes == "R N" or not got[~real[sample]].any()


def test_maps_of_a_layer_are_made_some_rows_at_a_time(tiny, mixed, monkeypatch):
    needs = ("layer_attention", "word_attention@1", "self_attention")
    whole, asked, rows = encode(tiny.vlm, mixed, needs).inputs, [], Decoder.attention_rows

    def spy(self, layer, hidden, rotary, some, mask):
        asked.append(some.shape[1])
        return rows(self, layer, hidden, rotary, some, mask)

    monkeypatch.setattr(Decoder, "attention_rows", spy)
    monkeypatch.setattr(layer_maps, "ROWS", 5)
    monkeypatch.setattr(language, "ROWS", 5)
    pieces = encode(tiny.vlm, mixed, needs).inputs
    assert max(asked) == 5 and len(asked) > 16
    for name in needs:
        torch.testing.assert_close(pieces.signal(name), whole.signal(name), rtol=1e-4, atol=1e-6)


def test_keys_of_a_layer_are_those_that_attention_multiplies(tiny, mixed, eager):
    """The weights of the last word made again from keys, at position 0 or where the words stand."""
    encoded = encode(tiny.vlm, mixed, ("layer_keys@1", "layer_keys@1+norope"))
    seen = []
    handle = eager.model.language_model.layers[1].self_attn.k_proj.register_forward_hook(lambda *a: seen.append(a[2]))
    with torch.no_grad():
        eager(**mixed)
    handle.remove()
    plain = seen[0][encoded.sample[:, None], encoded.slots]
    keys, rotated = encoded.inputs.signal("layer_keys@1+norope"), encoded.inputs.signal("layer_keys@1")
    torch.testing.assert_close(keys.flatten(2), plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rotated.norm(dim=-1), keys.norm(dim=-1), rtol=1e-4, atol=1e-5)
    assert (rotated - keys).abs().max() > 1e-3


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
    asked, more, after = calls_and_hooks(vlm, mixed, ("vision_outputs", "cls_value", "vision_attention@0", "pixels"))
    assert more == most + 6 and after == left and asked == called


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
    names = (
        "received_attention",
        "cls_attention@0",
        "vision_attention",
        "last_attention@1",
        "hidden_states@1",
        "pixels",
    )
    both = encode(tiny.vlm, tiny.batch([LONG, TWO], [[make_image(0)], [make_image(5), make_image(6)]]), names)
    alone = encode(tiny.vlm, tiny.batch([LONG], [[make_image(0)]]), names)
    for name in names:
        torch.testing.assert_close(both.inputs.signal(name)[:1], alone.inputs.signal(name), rtol=1e-4, atol=1e-5)
    assert dataclasses.replace(alone.inputs, signals={}).signals == {}
