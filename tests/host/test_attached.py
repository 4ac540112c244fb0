"""The prompt stage attached to a tiny LLaVA: ways of generating, and what is refused because it would fail silently."""

import pytest
import torch
from tiny_llava import LONG, NONE, SHORT, make_image, make_llava
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from prunezoo import PruneZooError, attach, build_pruner, encode, gated_forward, pruned_forward
from prunezoo.core.registry import pruner_class
from prunezoo.host.families.base import TAKES_FEATURES

STEPS = 5
GENERATE = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams, two returned": {"num_beams": 3, "num_return_sequences": 2},
    "dict": {"return_dict_in_generate": True, "output_logits": True},
    "static cache": {"cache_implementation": "static"},
    "chunked prefill": {"prefill_chunk_size": 8},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("options", GENERATE.values(), ids=GENERATE)
def test_generate_equals_a_prompt_shortened_by_hand(tiny, layouts, options):
    """Row by row, a model with nothing attached is given the embeddings and positions of what is left."""
    vlm, pruner = tiny.vlm, build_pruner("fastervlm").eval()
    with attach(vlm, pruner, keep=9) as run:
        if "prefill_chunk_size" in options and not TAKES_FEATURES:
            with pytest.raises(PruneZooError, match=r"transformers 5\.19"):
                vlm.generate(**layouts, max_new_tokens=STEPS, **options)
            return
        out = vlm.generate(**layouts, max_new_tokens=STEPS, **options)
    sequences = out if isinstance(out, torch.Tensor) else out.sequences
    length, copies = layouts["input_ids"].shape[1], options.get("num_return_sequences", 1)
    assert torch.equal(sequences[:, :length], layouts["input_ids"].repeat_interleave(copies, 0))
    assert run.stats.before == [36] * 4 and run.stats.after == [9] * 4 and run.stats.seconds > 0
    encoded = encode(vlm, layouts, pruner.needs)
    kept = pruner(encoded.inputs, 9)
    embeds = vlm.get_input_embeddings()(layouts["input_ids"])
    keep = encoded.mask & (layouts["input_ids"] != vlm.config.image_token_id)
    for row, slots, index, features in zip(
        encoded.sample, encoded.slots, kept.index, encoded.inputs.features, strict=True
    ):
        embeds[row, slots[index]] = features[index]
        keep[row, slots[index]] = True
    places = (encoded.mask.long().cumsum(1) - 1).clamp_min(0)
    plain = {k: v for k, v in options.items() if k.startswith("num")}
    for row in range(4):
        alone = vlm.generate(
            inputs_embeds=embeds[row][keep[row]][None],
            attention_mask=torch.ones(1, int(keep[row].sum()), dtype=torch.long),
            position_ids=places[row][keep[row]][None],
            max_new_tokens=STEPS,
            **plain,
        )
        ours = sequences[row * copies : (row + 1) * copies, length:]
        for mine, other in zip(ours, alone, strict=True):
            ended = int((other == vlm.config.text_config.eos_token_id).int().argmax()) + 1 if 2 in other else len(other)
            assert torch.equal(mine[:ended], other[:ended])


def test_generate_keeps_everything_bit_for_bit(tiny, layouts):
    for options in ({}, {"num_beams": 2, "num_return_sequences": 2}, {"use_cache": False}):
        bare = tiny.vlm.generate(**layouts, max_new_tokens=STEPS, **options)
        with attach(tiny.vlm, "pool", keep=1.0):
            assert torch.equal(tiny.vlm.generate(**layouts, max_new_tokens=STEPS, **options), bare)


def test_max_length_counts_the_callers_prompt(tiny):
    batch = tiny.batch([LONG], [[make_image(0)]])
    length = batch["input_ids"].shape[1]
    with attach(tiny.vlm, "uniform", keep=4):
        assert tiny.vlm.generate(**batch, max_length=length + 3, min_length=length + 3).shape[1] == length + 3
        assert tiny.vlm.generate(batch.pop("input_ids"), **batch, max_new_tokens=2).shape[1] <= length + 2


def test_lengths_of_the_models_own_config_count_the_callers_prompt(tiny, monkeypatch):
    """A config of the caller's that says nothing of lengths leaves them to the model's."""
    batch = tiny.batch([LONG], [[make_image(0)]])
    length = batch["input_ids"].shape[1]
    for name in ("max_length", "min_length"):
        monkeypatch.setattr(tiny.vlm.generation_config, name, length + 3)
    with attach(tiny.vlm, "uniform", keep=4):
        for config in ({}, {"generation_config": GenerationConfig(do_sample=False)}):
            assert tiny.vlm.generate(**batch, **config).shape[1] == length + 3


def test_forward_takes_positions_labels_and_no_images(tiny, layouts):
    vlm = tiny.vlm
    labels = layouts["input_ids"].masked_fill(layouts["attention_mask"] == 0, -100)
    with attach(vlm, "uniform", keep=9) as run:
        out = vlm(layouts["input_ids"], layouts["pixel_values"], layouts["attention_mask"], labels=labels)
        assert out.logits.shape[1] < layouts["input_ids"].shape[1] and out.loss.isfinite()
        text = tiny.batch([NONE], [[]])
        logits = vlm(**text).logits
        assert len(run.stats.before) == 4
    assert torch.equal(logits, vlm(**text).logits)
    encoded = encode(vlm, {**layouts, "labels": labels})
    shorter = pruned_forward(vlm, encoded, build_pruner("uniform").eval()(encoded.inputs, 9))
    assert torch.equal(shorter.logits, out.logits)
    assert out.loss == vlm.loss_function(shorter.logits, shorter.labels, vlm.config.text_config.vocab_size)


@pytest.mark.parametrize("name", ["ppm", "policy", "explain_cnn", "atp", "fastv"])
def test_a_prompt_without_words_is_pruned(name, deep_llava):
    """Where every word is labelled, as in training on whole texts, none is left for the pruner."""
    cls = pruner_class(name)
    pruner, vlm = cls(**cls.tiny_config(32, 32)), deep_llava.vlm
    batch = deep_llava.batch([LONG], [[make_image(0)]])
    with attach(vlm, pruner, keep=9) as run:
        assert vlm(**batch, labels=batch["input_ids"]).loss.isfinite()
    assert run.stats.before == [36] and run.stats.after[0] < 36


def test_dropping_every_token_is_the_prompt_without_an_image(tiny):
    vlm, batch = tiny.vlm, tiny.batch([LONG, SHORT], [[make_image(0)], [make_image(1)]])
    with attach(vlm, "none", keep=1, positions="compact"):
        logits = vlm(**batch).logits[:, -1]
        assert vlm.generate(**batch, max_new_tokens=2).shape[0] == 2
    text = tiny.batch([LONG.replace("<image>", ""), SHORT.replace("<image>", "")], [[], []])
    torch.testing.assert_close(logits, vlm(**text).logits[:, -1], rtol=0, atol=2e-5)


def test_failing_calls_leave_nothing_behind(tiny, layouts):
    vlm = tiny.vlm
    bare = vlm(**layouts).logits
    with pytest.raises(ZeroDivisionError), attach(vlm, "uniform", keep=9):
        raise ZeroDivisionError
    with pytest.raises(ValueError, match="typo"), attach(vlm, "uniform", keep=9):
        vlm.generate(**layouts, typo=1)
    assert torch.equal(vlm(**layouts).logits, bare) and "generate" not in vars(vlm)


def test_what_would_fail_silently_is_refused(tiny, layouts):
    vlm = tiny.vlm
    with attach(vlm, "uniform", keep=9):
        cache = vlm(**layouts, use_cache=True).past_key_values
        with pytest.raises(PruneZooError, match="attention_mask of the whole conversation"):
            vlm(layouts["input_ids"][:, -1:], past_key_values=cache, attention_mask=torch.ones(4, 3))
        with pytest.raises(PruneZooError, match="pass the whole conversation"):
            vlm(**layouts, past_key_values=cache)
        filled = vlm.generate(**layouts, max_new_tokens=2, return_dict_in_generate=True)
        with pytest.raises(PruneZooError, match="may be padded"):
            vlm.generate(filled.sequences, past_key_values=filled.past_key_values)
        with pytest.raises(PruneZooError, match="pixel_values"):
            vlm(input_ids=layouts["input_ids"], mm_encoder_outputs={"image": object()})
        with pytest.raises(PruneZooError, match="attention_mask"):
            vlm.generate(input_ids=layouts["input_ids"], pixel_values=layouts["pixel_values"])
        with pytest.raises(PruneZooError, match="attached already"), attach(vlm, "pool", keep=3):
            pass
        with pytest.raises(PruneZooError, match="placeholders"):
            vlm(input_ids=layouts["input_ids"][:, :-30], pixel_values=layouts["pixel_values"])
        with pytest.raises(PruneZooError, match="input_ids"):
            vlm(inputs_embeds=torch.zeros(1, 3, 32), pixel_values=layouts["pixel_values"])
        with pytest.raises(PruneZooError, match="input_ids"):
            vlm.generate(inputs_embeds=torch.zeros(1, 3, 32), pixel_values=layouts["pixel_values"])
        with pytest.raises(PruneZooError, match="input_ids, not with inputs_embeds"):
            vlm.generate(inputs_embeds=torch.zeros(4, 3, 32), past_key_values=filled.past_key_values)
        seen = torch.ones(4, 1, *layouts["input_ids"].shape[1:] * 2).tril()
        with pytest.raises(PruneZooError, match="the processor's attention_mask"):
            vlm(**{**layouts, "attention_mask": seen})
        with pytest.raises(PruneZooError, match="logits_to_keep as a tensor"):
            vlm(**layouts, logits_to_keep=torch.tensor([3]))


def test_wrong_arguments_are_refused_before_any_call(tiny):
    for keep in (0, 1.5, -1):
        with pytest.raises(PruneZooError, match="keep"):
            attach(tiny.vlm, "uniform", keep=keep)
    with pytest.raises(PruneZooError, match="positions='packed'"):
        attach(tiny.vlm, "uniform", keep=3, positions="packed")


def test_unsupported_models_are_refused_by_name():
    text = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(PruneZooError, match=r"LlamaForCausalLM \(llama\) is not supported; supported: LLaVA"):
        attach(LlamaForCausalLM(text), "uniform", keep=3)
    with pytest.raises(PruneZooError, match="Linear"):
        attach(torch.nn.Linear(1, 1), "uniform", keep=3)
    siglip = {"model_type": "siglip_vision_model", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
              "num_attention_heads": 1, "image_size": 8, "patch_size": 4}  # fmt: skip
    config = LlavaConfig(vision_config=siglip, text_config=text, vision_feature_select_strategy="default")
    with pytest.raises(PruneZooError, match="siglip_vision_model"):
        attach(LlavaForConditionalGeneration(config), "uniform", keep=3)


@pytest.mark.parametrize("name", ["uniform", "pool", "fastervlm", "ppm"])
def test_a_float32_pruner_serves_a_bfloat16_model(tiny, layouts, name):
    """The pruner works in its own type; the model gets tokens and gates in its own."""
    vlm, cls = make_llava().bfloat16(), pruner_class(name)
    pruner = cls(**cls.tiny_config(32, 32))
    with attach(vlm, pruner, keep=9):
        assert vlm(**layouts).logits.dtype == torch.bfloat16
        assert vlm.generate(**layouts, max_new_tokens=2).shape[0] == 4
    encoded = encode(vlm, layouts, pruner.needs)
    gates = pruner.train()(encoded.inputs, 9).gates
    if gates is not None:
        assert gated_forward(vlm, encoded, gates).logits.isfinite().all()
