"""Ways of calling a family's model while a pruner is attached: kinds of pruners, of generating, wrappers, gradients."""

from dataclasses import replace

import pytest
import torch
from families import FAMILIES, IMAGE, LARGE, MIXED, ONE_EACH, QWEN, Sample, here
from prompt_oracle import CLOSE, STEPS, blind, drops, write

from prunezoo import PruneZooError, attach, build_pruner, encode, full_forward, pruned_forward
from prunezoo.host.families.base import TAKES_FEATURES


@pytest.mark.parametrize("method", ["pool", "resize", "uniform", "divprune", "none", "full"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_pruner_runs(name, method):
    """Ragged images with tiles, clips where there are any, direct and in `generate`."""
    tiny = here(name)
    batch = tiny.batch([*MIXED, Sample((), 4, (4,))] if tiny.videos else MIXED)
    with torch.no_grad(), attach(tiny.vlm, method, keep=3) as run:
        assert tiny.vlm(**batch).logits.isfinite().all()
        assert tiny.vlm.generate(**batch, max_new_tokens=2).shape == (
            len(batch["input_ids"]),
            batch["input_ids"].shape[1] + 2,
        )
    if method not in ("none", "full"):
        newlines = name in ("llava_next", "llava_onevision")
        assert all(3 <= after <= 6 if newlines else after == 3 for after in run.stats.after)


OPTIONS = {"static_cache": {"cache_implementation": "static"}, "no_cache": {"use_cache": False}}
if TAKES_FEATURES:
    OPTIONS |= {"prompt_lookup": {"prompt_lookup_num_tokens": 2}, "chunked_prefill": {"prefill_chunk_size": 7}}
CALLS = [
    (name, option)
    for name in FAMILIES
    for option in OPTIONS  # in chunks, the bare models of the latter two cannot look ahead as they do in one piece
    if not (option == "chunked_prefill" and name in ("gemma3", "paligemma"))
]


@pytest.mark.parametrize(("name", "option"), CALLS)
def test_ways_of_generating_agree(name, option):
    """Each writes what the plain way writes of the shorter prompt, as the bare model does of the whole one."""
    tiny = here(name)
    batch = tiny.batch([Sample((LARGE,), 9)] if option == "prompt_lookup" else ONE_EACH)
    options = {"max_new_tokens": STEPS, **OPTIONS[option]}
    with torch.no_grad():
        assert torch.equal(tiny.vlm.generate(**batch, **options), tiny.vlm.generate(**batch, max_new_tokens=STEPS))
        with attach(tiny.vlm, "random", keep=0.5):
            plain = tiny.vlm.generate(**batch, max_new_tokens=STEPS)
            other = tiny.vlm.generate(**batch, **options)
    assert torch.equal(plain, other)


@pytest.mark.parametrize("name", FAMILIES)
def test_labels_are_shortened_with_the_prompt(name):
    tiny = here(name)
    batch = tiny.batch(MIXED, side="right", labels=True)
    with torch.no_grad(), attach(tiny.vlm, "random", keep=0.5):
        out = tiny.vlm(**batch)
    encoded = encode(tiny.vlm, batch)
    short = pruned_forward(tiny.vlm, encoded, build_pruner("random").eval()(encoded.inputs, 0.5))
    assert torch.equal(short.labels[short.labels != -100], batch["labels"][batch["labels"] != -100])
    assert short.labels.shape == short.logits.shape[:2] == out.logits.shape[:2]
    torch.testing.assert_close(short.logits, out.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.loss, tiny.vlm.loss_function(short.logits, short.labels, short.logits.shape[-1]))
    full = full_forward(tiny.vlm, encoded)
    answer = full.labels != -100  # what is left of the answers is read with less of the image before it
    assert (full.logits[answer] - short.logits[short.labels != -100]).abs().max() > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_without_any_image_token_the_prompt_is_text(name):
    """With positions numbered anew; in time, height and width that means nothing, and is refused."""
    tiny = here(name)
    batch = tiny.batch(MIXED)
    with torch.no_grad(), attach(tiny.vlm, "none", keep=1, positions="compact"):
        if name in QWEN:
            with pytest.raises(PruneZooError, match="use 'original' with Qwen"):
                tiny.vlm(**batch)
            return
        logits, written = tiny.vlm(**batch).logits, tiny.vlm.generate(**batch, max_new_tokens=3)
    for row, ids in enumerate(batch["input_ids"]):
        words = (ids != IMAGE) & batch["attention_mask"][row].bool()
        text = {key: value[row][words][None] for key, value in batch.items() if value.shape == batch["input_ids"].shape}
        plain = tiny.vlm.generate(**text, max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
        assert torch.equal(plain.sequences[0, -3:], written[row, -3:])
        torch.testing.assert_close(plain.logits[0][0], logits[row, -1], **CLOSE)


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "gemma3"])
def test_lora_around_the_model(name):
    """A direct call runs the wrapper's forward, the loop of `generate` that of the model inside."""
    peft = pytest.importorskip("peft")
    vlm, batch = here(name).build(), FAMILIES[name].batch([Sample((LARGE,), 5)])
    bare = vlm(**batch).logits
    words = r".*(language|text)_model.*\.(q_proj|v_proj)"
    lora = peft.get_peft_model(vlm, peft.LoraConfig(target_modules=words, init_lora_weights=False)).eval()
    with torch.no_grad():
        encoded = encode(lora, batch)
        output = build_pruner("random", seed=3).eval()(encoded.inputs, 0.5)
        assert (full_forward(lora, encoded).logits - bare).abs().max() > 1e-2
        with blind(vlm, drops(encoded, output)):
            expected, written = vlm(**batch).logits[:, -1], write(vlm, batch).sequences
        with attach(lora, build_pruner("random", seed=3), keep=0.5):
            torch.testing.assert_close(lora(**batch).logits[:, -1], expected, **CLOSE)
            for use_cache in (True, False):  # without a cache, gaps in positions could be read as packed sequences
                assert torch.equal(write(lora, batch, use_cache=use_cache).sequences, written)
    assert torch.equal(full_forward(lora, encoded).logits, lora(**batch).logits)


def test_a_compiled_model():
    vlm, batch = FAMILIES["llava"].build(), FAMILIES["llava"].batch(ONE_EACH)
    with torch.no_grad(), attach(vlm, "uniform", keep=5):
        expected, written = vlm(**batch).logits, vlm.generate(**batch, max_new_tokens=3)
    compiled = torch.compile(vlm, backend="eager")
    with torch.no_grad(), attach(compiled, "uniform", keep=5):
        torch.testing.assert_close(compiled(**batch).logits, expected, rtol=0, atol=1e-5)
        assert torch.equal(compiled.generate(**batch, max_new_tokens=3), written)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_the_same_with_checkpointing(name):
    vlm, batch = here(name).build(), FAMILIES[name].batch(MIXED)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            vlm.gradient_checkpointing_enable({"use_reentrant": False})
            vlm.train()
        encoded = encode(vlm, batch)
        features = encoded.inputs.features.detach().requires_grad_()
        encoded = replace(encoded, inputs=replace(encoded.inputs, features=features))
        output = build_pruner("uniform").eval()(encoded.inputs, 0.5)
        pruned_forward(vlm, encoded, output).logits[:, -1].square().sum().backward()
        kept = torch.zeros_like(encoded.inputs.valid).scatter(1, output.index[:, :1], True)
        assert (features.grad[kept] != 0).any(-1).all()
        found.append(features.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_models(name):
    """A pruner computes in its own type, the model gets tokens and newlines in its own."""
    vlm, batch = here(name).build().bfloat16(), FAMILIES[name].batch(MIXED)
    batch = {key: value.bfloat16() if key.startswith("pixel_values") else value for key, value in batch.items()}
    with torch.no_grad(), attach(vlm, "pool", keep=2):
        assert vlm(**batch).logits.dtype == torch.bfloat16
        assert vlm.generate(**batch, max_new_tokens=2).shape[0] == 4
