"""The prompt stage on a tiny LLaVA: layouts of batches, ways of generating, and the traps that fail without a word."""

from dataclasses import replace

import pytest
import torch
from tiny_llava import LONG, NONE, SHORT, TWO, make_image, make_llava
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from prunezoo import PruneZooError, attach, build_pruner, encode, full_forward, gated_forward, pruned_forward
from prunezoo.core.contract import PruneOutput
from prunezoo.core.plan import KeepPlan
from prunezoo.core.registry import pruner_class
from prunezoo.host.families.base import TAKES_FEATURES

TURNS = "<s> USER: <image> what color ? ASSISTANT: red </s> USER: is the box left ? ASSISTANT:"
STEPS = 5


@pytest.fixture
def tiny(tiny_llava):
    return tiny_llava


@pytest.fixture
def mixed(tiny):
    """Four layouts in one batch: no image, one, two, several turns; padded on the left."""
    images = [[make_image(i)] for i in range(2)]
    return tiny.batch([LONG, NONE, TWO, TURNS], [images[0], [], [make_image(5), make_image(6)], images[1]])


def right_padded(tiny, prompts, images):
    tiny.processor.tokenizer.padding_side = "right"
    try:
        return tiny.batch(prompts, images)
    finally:
        tiny.processor.tokenizer.padding_side = "left"


def ragged(encoded, counts):
    """Keep the first so many tokens of each image: a different number for each."""
    counts = torch.tensor(counts)
    valid = torch.arange(int(counts.max())) < counts[:, None]
    return PruneOutput(torch.arange(valid.shape[1]).expand_as(valid).masked_fill(~valid, 0), valid)


def oracle(vlm, encoded, output):
    """Logits of the last tokens where dropped tokens are there, and no one may look at them."""
    seen = encoded.mask.clone()
    for row, slots, index, valid in zip(encoded.sample, encoded.slots, output.index, output.valid, strict=True):
        seen[row, slots] = False
        seen[row, slots[index[valid]]] = True
    length = seen.shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).tril() & seen[:, None, None]
    batch = {**encoded.batch, "attention_mask": mask, "position_ids": torch.arange(length)[None]}
    return full_forward(vlm, replace(encoded, batch=batch, labels=None)).logits


# Encoding


def test_images_are_rows_with_their_own_prompt(tiny, mixed):
    encoded = encode(tiny.vlm, mixed)
    assert encoded.inputs.features.shape == (4, 36, 32) and encoded.sample.tolist() == [0, 2, 2, 3]
    ids, image = mixed["input_ids"], tiny.vlm.config.image_token_id
    assert (ids[encoded.sample[:, None], encoded.slots] == image).all()
    assert (encoded.slots[2] > encoded.slots[1].max()).all()
    assert encoded.inputs.cells[0, 7].tolist() == [0, 1, 1]
    for row, sample in enumerate(encoded.sample.tolist()):
        own = ids[sample][mixed["attention_mask"][sample].bool() & (ids[sample] != image)]
        text = encoded.inputs.text[row][encoded.inputs.text_valid[row]]
        assert torch.equal(text, tiny.vlm.get_input_embeddings()(own))


def test_the_answer_never_reaches_the_pruner(tiny):
    prompt = "<s> USER: <image> what color ? ASSISTANT: red </s>"
    batch = right_padded(tiny, [prompt, LONG + " blue </s>"], [[make_image(0)], [make_image(1)]])
    labels = torch.full_like(batch["input_ids"], -100)
    tokenizer = tiny.processor.tokenizer
    for row, ids in enumerate(batch["input_ids"]):
        start = int((ids == tokenizer.convert_tokens_to_ids("ASSISTANT:")).nonzero()[0]) + 1
        labels[row, start : start + 2] = ids[start : start + 2]
    encoded = encode(tiny.vlm, {**batch, "labels": labels})
    without = right_padded(tiny, [prompt.replace(" red </s>", ""), LONG], [[make_image(0)], [make_image(1)]])
    plain = encode(tiny.vlm, without)
    assert torch.equal(encoded.inputs.text_valid, plain.inputs.text_valid)
    valid = plain.inputs.text_valid
    assert torch.equal(encoded.inputs.text[valid], plain.inputs.text[valid])
    # Shortened labels keep the same tokens in the same order.
    output = build_pruner("uniform").eval()(encoded.inputs, 5)
    shorter = pruned_forward(tiny.vlm, encoded, output)
    assert torch.equal(shorter.labels[shorter.labels != -100], labels[labels != -100])
    assert shorter.logits.shape[:2] == shorter.labels.shape


@pytest.mark.parametrize("name", ["cls_attention", "received_attention", "prompt_attention"])
def test_attention_signals_equal_eager_maps(tiny, mixed, name):
    eager = LlavaForConditionalGeneration.from_pretrained(tiny.folder, attn_implementation="eager").eval()
    signal = encode(tiny.vlm, mixed, (name,)).inputs.signals[name]
    with torch.no_grad():
        if name == "prompt_attention":
            encoded = encode(tiny.vlm, mixed)
            maps = eager(**mixed, output_attentions=True).attentions[0].mean(1)  # (B, L, L)
            wanted = []
            for sample, slots in zip(encoded.sample, encoded.slots, strict=True):
                ids = mixed["input_ids"][sample]
                rows = (torch.arange(len(ids)) > slots.max()) & (ids != tiny.vlm.config.image_token_id)
                wanted.append(maps[sample][rows][:, slots].mean(0))
            wanted = torch.stack(wanted)
        else:
            block = eager.model.vision_tower(mixed["pixel_values"], output_attentions=True).attentions[1].mean(1)
            wanted = (block[:, 0] if name == "cls_attention" else block.mean(1))[:, 1:]
    torch.testing.assert_close(signal, wanted, rtol=1e-5, atol=1e-7)


def test_signals_come_only_when_asked_for(tiny, mixed):
    assert not encode(tiny.vlm, mixed).inputs.signals
    assert encode(tiny.vlm, mixed, ("vision_keys",)).inputs.signals["vision_keys"].shape == (4, 36, 2, 12)
    with pytest.raises(PruneZooError, match="unknown signal 'cls'"):
        encode(tiny.vlm, mixed, ("cls",))


# Forwards


def test_full_forward_is_the_bare_model(tiny, mixed):
    with torch.no_grad():
        assert torch.equal(full_forward(tiny.vlm, encode(tiny.vlm, mixed)).logits, tiny.vlm(**mixed).logits)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_ragged_counts_equal_the_oracle(tiny, side, positions):
    """The ragged trap: rows lose different numbers of tokens, so the shorter batch needs padding of its own."""
    prompts, images = [LONG, TWO, NONE, SHORT], [[make_image(0)], [make_image(1), make_image(2)], [], [make_image(3)]]
    batch = tiny.batch(prompts, images) if side == "left" else right_padded(tiny, prompts, images)
    with torch.no_grad():
        encoded = encode(tiny.vlm, batch)
        output = ragged(encoded, [3, 20, 1, 36])
        shorter = pruned_forward(tiny.vlm, encoded, output, positions)
        expected = oracle(tiny.vlm, encoded, output)
    last = encoded.mask.shape[1] - 1 - encoded.mask.flip(1).int().argmax(1)
    error = (shorter.logits[:, -1] - expected[torch.arange(4), last]).abs().amax(1)
    assert error[2] < 2e-5  # a sample without an image loses nothing
    if positions == "original":
        assert error.max() < 2e-5
    else:
        assert error[:2].min() > 1e-3  # numbered anew, the model reads something else


def test_packed_sequence_trap(tiny):
    """Gaps in the positions, one row, no cache, no padding: `transformers` reads seams where no mask is given."""
    batch = tiny.batch([SHORT], [[make_image(0)]])
    with torch.no_grad():
        encoded = encode(tiny.vlm, batch)
        output = build_pruner("uniform").eval()(encoded.inputs, 0.5)
        expected = oracle(tiny.vlm, encoded, output)[:, -1]
        for use_cache in (False, True):
            logits = pruned_forward(tiny.vlm, encoded, output, use_cache=use_cache).logits[:, -1]
            torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)
        # `generate` drops a mask of ones, so the same trap waits there.
        with attach(tiny.vlm, "uniform", keep=0.5):
            cached = tiny.vlm.generate(**batch, max_new_tokens=STEPS)
            options = {"use_cache": False, "output_logits": True, "return_dict_in_generate": True}
            uncached = tiny.vlm.generate(**batch, max_new_tokens=STEPS, **options)
    assert torch.equal(cached, uncached.sequences)
    torch.testing.assert_close(uncached.logits[0], expected, rtol=0, atol=2e-5)


def test_gates_equal_the_hard_drop_and_have_exact_gradients(tiny, mixed):
    vlm = tiny.vlm
    encoded = encode(vlm, mixed)
    output = ragged(encoded, [9, 20, 1, 36])
    gates = torch.zeros(encoded.inputs.valid.shape)
    for row, count in enumerate(output.count):
        gates[row, :count] = 1
    gated = gated_forward(vlm, encoded, gates, log_eps=1e-8).logits[:, -1]
    torch.testing.assert_close(gated, pruned_forward(vlm, encoded, output).logits[:, -1], rtol=0, atol=5e-5)
    ones = gated_forward(vlm, encoded, torch.ones_like(gates)).logits[:, -1]
    torch.testing.assert_close(ones, vlm(**mixed).logits[:, -1], rtol=0, atol=5e-5)

    # The gradient at closed gates too: against finite differences in double precision.
    double = make_llava().double()
    encoded = encode(double, {k: v.double() if v.is_floating_point() else v for k, v in mixed.items()})
    gates = gates.double().requires_grad_()
    gated_forward(double, encoded, gates).logits[:, -1].square().sum().backward()
    for row, slot in ((0, 20), (2, 5), (3, 7)):
        step = torch.zeros_like(gates)
        step[row, slot] = 1e-3  # norms compute in float32 whatever the type of the model, so no smaller
        with torch.no_grad():
            high, base = (
                gated_forward(double, encoded, gates + s).logits[:, -1].square().sum() for s in (step, 0 * step)
            )
        assert float(gates.grad[row, slot]) == pytest.approx(float(high - base) / 1e-3, rel=0.1, abs=1e-3)


def test_gates_are_refused_where_the_kernel_ignores_floats(tiny, mixed):
    vlm = make_llava()
    vlm.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(PruneZooError, match="flash_attention_2"):
        gated_forward(vlm, encode(tiny.vlm, mixed), torch.ones(4, 36))


# Attached


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
def test_generate_equals_a_prompt_shortened_by_hand(tiny, mixed, options):
    """Row by row, a model with nothing attached is given the embeddings and positions of what is left."""
    vlm, pruner = tiny.vlm, build_pruner("fastervlm").eval()
    with attach(vlm, pruner, keep=9) as run:
        if "prefill_chunk_size" in options and not TAKES_FEATURES:
            with pytest.raises(PruneZooError, match=r"transformers 5\.19"):
                vlm.generate(**mixed, max_new_tokens=STEPS, **options)
            return
        out = vlm.generate(**mixed, max_new_tokens=STEPS, **options)
    sequences = out if isinstance(out, torch.Tensor) else out.sequences
    length, copies = mixed["input_ids"].shape[1], options.get("num_return_sequences", 1)
    assert torch.equal(sequences[:, :length], mixed["input_ids"].repeat_interleave(copies, 0))
    assert run.stats.before == [36] * 4 and run.stats.after == [9] * 4 and run.stats.seconds > 0
    encoded = encode(vlm, mixed, pruner.needs)
    kept = pruner(encoded.inputs, 9)
    embeds = vlm.get_input_embeddings()(mixed["input_ids"])
    keep = encoded.mask & (mixed["input_ids"] != vlm.config.image_token_id)
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


def test_generate_keeps_everything_bit_for_bit(tiny, mixed):
    for options in ({}, {"num_beams": 2, "num_return_sequences": 2}, {"use_cache": False}):
        bare = tiny.vlm.generate(**mixed, max_new_tokens=STEPS, **options)
        with attach(tiny.vlm, "pool", keep=1.0):
            assert torch.equal(tiny.vlm.generate(**mixed, max_new_tokens=STEPS, **options), bare)


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


def test_forward_takes_positions_labels_and_no_images(tiny, mixed):
    vlm = tiny.vlm
    labels = mixed["input_ids"].masked_fill(mixed["attention_mask"] == 0, -100)
    with attach(vlm, "uniform", keep=9) as run:
        out = vlm(mixed["input_ids"], mixed["pixel_values"], mixed["attention_mask"], labels=labels)
        assert out.logits.shape[1] < mixed["input_ids"].shape[1] and out.loss.isfinite()
        text = tiny.batch([NONE], [[]])
        logits = vlm(**text).logits
        assert len(run.stats.before) == 4
    assert torch.equal(logits, vlm(**text).logits)
    encoded = encode(vlm, {**mixed, "labels": labels})
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


def test_failing_calls_leave_nothing_behind(tiny, mixed):
    vlm = tiny.vlm
    bare = vlm(**mixed).logits
    with pytest.raises(ZeroDivisionError), attach(vlm, "uniform", keep=9):
        raise ZeroDivisionError
    with pytest.raises(ValueError, match="typo"), attach(vlm, "uniform", keep=9):
        vlm.generate(**mixed, typo=1)
    assert torch.equal(vlm(**mixed).logits, bare) and "generate" not in vars(vlm)


def test_what_would_fail_silently_is_refused(tiny, mixed):
    vlm = tiny.vlm
    with attach(vlm, "uniform", keep=9):
        cache = vlm(**mixed, use_cache=True).past_key_values
        with pytest.raises(PruneZooError, match="attention_mask of the whole conversation"):
            vlm(mixed["input_ids"][:, -1:], past_key_values=cache, attention_mask=torch.ones(4, 3))
        with pytest.raises(PruneZooError, match="pass the whole conversation"):
            vlm(**mixed, past_key_values=cache)
        filled = vlm.generate(**mixed, max_new_tokens=2, return_dict_in_generate=True)
        with pytest.raises(PruneZooError, match="may be padded"):
            vlm.generate(filled.sequences, past_key_values=filled.past_key_values)
        with pytest.raises(PruneZooError, match="pixel_values"):
            vlm(input_ids=mixed["input_ids"], mm_encoder_outputs={"image": object()})
        with pytest.raises(PruneZooError, match="attention_mask"):
            vlm.generate(input_ids=mixed["input_ids"], pixel_values=mixed["pixel_values"])
        with pytest.raises(PruneZooError, match="attached already"), attach(vlm, "pool", keep=3):
            pass
        with pytest.raises(PruneZooError, match="placeholders"):
            vlm(input_ids=mixed["input_ids"][:, :-30], pixel_values=mixed["pixel_values"])
        with pytest.raises(PruneZooError, match="input_ids"):
            vlm(inputs_embeds=torch.zeros(1, 3, 32), pixel_values=mixed["pixel_values"])
        with pytest.raises(PruneZooError, match="input_ids"):
            vlm.generate(inputs_embeds=torch.zeros(1, 3, 32), pixel_values=mixed["pixel_values"])
        with pytest.raises(PruneZooError, match="input_ids, not with inputs_embeds"):
            vlm.generate(inputs_embeds=torch.zeros(4, 3, 32), past_key_values=filled.past_key_values)
        seen = torch.ones(4, 1, *mixed["input_ids"].shape[1:] * 2).tril()
        with pytest.raises(PruneZooError, match="the processor's attention_mask"):
            vlm(**{**mixed, "attention_mask": seen})
        with pytest.raises(PruneZooError, match="logits_to_keep as a tensor"):
            vlm(**mixed, logits_to_keep=torch.tensor([3]))


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


def test_plan_fills_on_the_left_and_keeps_order():
    keep = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 0, 0, 1]], dtype=torch.bool)
    real = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    plan = KeepPlan.from_mask(keep, real, (4, 5), (3, 2))
    values = torch.tensor([[10, 11, 12, 13, 14], [20, 21, 22, 23, 24]])
    assert plan.take(values, -1).tolist() == [[11, 13, 14], [-1, 20, 24]]
    assert not plan.identity and KeepPlan.from_mask(~keep | keep, real, (4, 5), (4, 5)).identity


@pytest.mark.parametrize("name", ["uniform", "pool", "fastervlm", "ppm"])
def test_a_float32_pruner_serves_a_bfloat16_model(tiny, mixed, name):
    """The pruner works in its own type; the model gets tokens and gates in its own."""
    vlm, cls = make_llava().bfloat16(), pruner_class(name)
    pruner = cls(**cls.tiny_config(32, 32))
    with attach(vlm, pruner, keep=9):
        assert vlm(**mixed).logits.dtype == torch.bfloat16
        assert vlm.generate(**mixed, max_new_tokens=2).shape[0] == 4
    encoded = encode(vlm, mixed, pruner.needs)
    gates = pruner.train()(encoded.inputs, 9).gates
    if gates is not None:
        assert gated_forward(vlm, encoded, gates).logits.isfinite().all()
