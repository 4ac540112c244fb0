"""The prompt stage on a tiny LLaVA: layouts of batches, gates, and the traps that fail without a word."""

from dataclasses import replace

import pytest
import torch
from tiny_llava import LONG, NONE, SHORT, TWO, make_image, make_llava
from transformers import LlavaForConditionalGeneration

from prunezoo import PruneZooError, attach, build_pruner, encode, full_forward, gated_forward, pruned_forward
from prunezoo.core.contract import PruneOutput
from prunezoo.core.plan import KeepPlan
from prunezoo.host.families.base import TAKES_FEATURES
from prunezoo.host.stages.prompt import shorten_prompt

STEPS = 5


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


# Nothing dropped


@pytest.mark.skipif(not TAKES_FEATURES, reason="from 5.19 on")
@pytest.mark.parametrize("name", ["full", "uniform"])
def test_nothing_is_moved_where_everything_is_kept(name, tiny):
    """Tokens of one image go into the model as they came out of the projector: attaching costs no copy of them."""
    batch = tiny.batch([LONG], [[make_image(0)]])
    encoded, pruner = encode(tiny.vlm, batch), build_pruner(name).eval()
    output = pruner(encoded.inputs, 1.0)
    left, plan = shorten_prompt(tiny.vlm, encoded, output)
    assert plan.identity and output.is_all(encoded.inputs)
    assert left.inputs.features is encoded.inputs.features and left.slots is encoded.slots
    (given,) = left.model_inputs(tiny.vlm)["mm_encoder_outputs"]["image"].pooler_output
    assert given.data_ptr() == encoded.inputs.features.data_ptr()
    fewer = build_pruner("uniform")(encoded.inputs, 35)
    assert not fewer.is_all(encoded.inputs)
    assert shorten_prompt(tiny.vlm, encoded, fewer)[0].inputs.features is not encoded.inputs.features


@pytest.mark.skipif(not TAKES_FEATURES, reason="from 5.19 on")
def test_rows_of_the_prompt_get_their_tokens_by_both_ways(tiny, layouts):
    """Where the host knows how tokens lie they are handed over as they lie; else by their columns. Both are one."""
    encoded = encode(tiny.vlm, layouts)
    asked = torch.tensor([9, 4, 36, 1])
    left, _ = shorten_prompt(tiny.vlm, encoded, build_pruner("uniform")(encoded.inputs, asked))
    unknown = replace(left, inputs=replace(left.inputs, known=None))
    known, slow = (one.model_inputs(tiny.vlm)["mm_encoder_outputs"]["image"].pooler_output for one in (left, unknown))
    assert [len(row) for row in known] == [9, 40, 1]
    assert all(torch.equal(a, b) for a, b in zip(known, slow, strict=True))


# Encoding


def test_images_are_rows_with_their_own_prompt(tiny, layouts):
    encoded = encode(tiny.vlm, layouts)
    assert encoded.inputs.features.shape == (4, 36, 32) and encoded.sample.tolist() == [0, 2, 2, 3]
    ids, image = layouts["input_ids"], tiny.vlm.config.image_token_id
    assert (ids[encoded.sample[:, None], encoded.slots] == image).all()
    assert (encoded.slots[2] > encoded.slots[1].max()).all()
    assert encoded.inputs.cells[0, 7].tolist() == [0, 1, 1]
    for row, sample in enumerate(encoded.sample.tolist()):
        own = ids[sample][layouts["attention_mask"][sample].bool() & (ids[sample] != image)]
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
def test_attention_signals_equal_eager_maps(tiny, layouts, name):
    eager = LlavaForConditionalGeneration.from_pretrained(tiny.folder, attn_implementation="eager").eval()
    signal = encode(tiny.vlm, layouts, (name,)).inputs.signals[name]
    with torch.no_grad():
        if name == "prompt_attention":
            encoded = encode(tiny.vlm, layouts)
            maps = eager(**layouts, output_attentions=True).attentions[0].mean(1)  # (B, L, L)
            wanted = []
            for sample, slots in zip(encoded.sample, encoded.slots, strict=True):
                ids = layouts["input_ids"][sample]
                rows = (torch.arange(len(ids)) > slots.max()) & (ids != tiny.vlm.config.image_token_id)
                wanted.append(maps[sample][rows][:, slots].mean(0))
            wanted = torch.stack(wanted)
        else:
            block = eager.model.vision_tower(layouts["pixel_values"], output_attentions=True).attentions[1].mean(1)
            wanted = (block[:, 0] if name == "cls_attention" else block.mean(1))[:, 1:]
    torch.testing.assert_close(signal, wanted, rtol=1e-5, atol=1e-7)


def test_signals_come_only_when_asked_for(tiny, layouts):
    assert not encode(tiny.vlm, layouts).inputs.signals
    assert encode(tiny.vlm, layouts, ("vision_keys",)).inputs.signals["vision_keys"].shape == (4, 36, 2, 12)
    with pytest.raises(PruneZooError, match="unknown signal 'cls'"):
        encode(tiny.vlm, layouts, ("cls",))


# Forwards


def test_full_forward_is_the_bare_model(tiny, layouts):
    with torch.no_grad():
        assert torch.equal(full_forward(tiny.vlm, encode(tiny.vlm, layouts)).logits, tiny.vlm(**layouts).logits)


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


def test_gates_equal_the_hard_drop_and_have_exact_gradients(tiny, layouts):
    vlm = tiny.vlm
    encoded = encode(vlm, layouts)
    output = ragged(encoded, [9, 20, 1, 36])
    gates = torch.zeros(encoded.inputs.valid.shape)
    for row, count in enumerate(output.count):
        gates[row, :count] = 1
    gated = gated_forward(vlm, encoded, gates, log_eps=1e-8).logits[:, -1]
    torch.testing.assert_close(gated, pruned_forward(vlm, encoded, output).logits[:, -1], rtol=0, atol=5e-5)
    ones = gated_forward(vlm, encoded, torch.ones_like(gates)).logits[:, -1]
    torch.testing.assert_close(ones, vlm(**layouts).logits[:, -1], rtol=0, atol=5e-5)

    # The gradient at closed gates too: against finite differences in double precision.
    double = make_llava().double()
    encoded = encode(double, {k: v.double() if v.is_floating_point() else v for k, v in layouts.items()})
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


def test_gates_are_refused_where_the_kernel_ignores_floats(tiny, layouts):
    vlm = make_llava()
    vlm.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(PruneZooError, match="flash_attention_2"):
        gated_forward(vlm, encode(tiny.vlm, layouts), torch.ones(4, 36))


def test_plan_fills_on_the_left_and_keeps_order():
    keep = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 0, 0, 1]], dtype=torch.bool)
    real = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    plan = KeepPlan.from_mask(keep, real, (4, 5), (3, 2))
    values = torch.tensor([[10, 11, 12, 13, 14], [20, 21, 22, 23, 24]])
    assert plan.take(values, -1).tolist() == [[11, 13, 14], [-1, 20, 24]]
    assert not plan.identity and KeepPlan.from_mask(~keep | keep, real, (4, 5), (4, 5)).identity
