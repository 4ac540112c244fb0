"""The layer stage on every family: a matrix of families and checks, ids ``layer-FAMILY-CHECK``.

A pruner whose choice is known stands in front of two layers. The oracle is the bare model, called as ever, whose layers
do not look at the tokens that went; it shares nothing with the code under test.
"""

import pytest
import torch
from families import ALL, FAMILIES, LARGE, MIXED, NEWER, ONE_EACH, SMALL, TALL, VIDEO_FAMILIES, Sample, tiny_family
from layer_oracle import Watch, masked
from layer_runs import CLOSE, NOW, Scattered, last_logits, stages
from prompt_oracle import blind, choose, drops, write
from torch.nn.functional import pad

from prunezoo import PruneZooError, attach, build_pruner, encode, full_forward
from prunezoo.core.plan import gather_rows
from prunezoo.host import run_gated, run_pruned
from prunezoo.host.families import find_family
from prunezoo.host.families.base import TAKES_FEATURES
from prunezoo.host.stages.prompt import TOKEN_TYPES

RAGGED = torch.tensor([3, 1, 5, 7])


def scattered(tiny):
    return Scattered(*stages(tiny.vlm.config.model_type, tiny.vlm))


def equals_oracle(tiny, samples, keep=0.5, side="left"):
    """The prompt's last logits in a direct call, with and without a cache; six steps of decoding."""
    vlm, pruner = tiny.vlm, scattered(tiny)
    batch = tiny.batch(samples, side)
    encoded = encode(vlm, batch)
    bare = last_logits(vlm(**batch).logits, encoded)
    with Watch(pruner) as watch, attach(vlm, pruner, keep) as run:
        logits = [vlm(**batch, use_cache=cached).logits[:, -1] for cached in (True, False)]
        again = write(vlm, batch) if side == "left" else None
    assert len(watch.calls) == (6 if again else 4)
    watch.calls = watch.calls[:2]
    gone, _ = watch.gone(encoded)
    first, second = (gone[layer] for layer in pruner.layers)
    assert (first.sum(1) < second.sum(1)).sum() == len(set(encoded.sample.tolist()))  # each stage takes some of each
    assert sum(run.stats.before) - sum(run.stats.after) == (3 if again else 2) * int(second.sum())
    with masked(vlm, gone):
        expected = last_logits(vlm(**batch).logits, encoded)
        written = write(vlm, batch) if again else None
    assert (expected - bare)[encoded.sample].abs().amax(1).min() > 1e-3
    for own in logits:
        torch.testing.assert_close(own, expected, **CLOSE)
    if again:
        assert torch.equal(again.sequences, written.sequences)
        torch.testing.assert_close(torch.stack(again.logits), torch.stack(written.logits), **CLOSE)


# The matrix


def keep_all(tiny):
    """Logits and generated tokens bit for bit."""
    batch = tiny.batch(MIXED)
    bare, written = tiny.vlm(**batch).logits, write(tiny.vlm, batch)
    with attach(tiny.vlm, scattered(tiny), keep=1.0) as run:
        assert torch.equal(tiny.vlm(**batch).logits, bare)
        again = write(tiny.vlm, batch)
    assert run.stats.before == run.stats.after and len(run.stats.before) == 8
    assert torch.equal(again.sequences, written.sequences)
    assert all(torch.equal(a, b) for a, b in zip(again.logits, written.logits, strict=True))


def half(tiny):
    """Four samples, padded on the left."""
    equals_oracle(tiny, ONE_EACH)


def one_sample(tiny):
    """No padding, so no mask: where gaps in the positions could be read as the seams of packed sequences."""
    equals_oracle(tiny, [Sample((LARGE,), 5)])


def ragged_counts(tiny):
    equals_oracle(tiny, MIXED, keep=RAGGED)


def two_images(tiny):
    equals_oracle(tiny, [Sample((LARGE, TALL), 4), Sample((SMALL, SMALL), 7)])


def right_padding(tiny):
    equals_oracle(tiny, MIXED, side="right")


def second_turn(tiny):
    """More words on the same cache, whose length is another one in each layer."""
    vlm, pruner, batch = tiny.vlm, scattered(tiny), tiny.batch(MIXED)
    words = torch.randint(30, 60, (4, 3), generator=torch.Generator().manual_seed(0))

    def talk():
        first = write(vlm, batch, max_new_tokens=2)
        whole = {"input_ids": torch.cat([first.sequences, words], 1)}
        for name in ("attention_mask", *TOKEN_TYPES):  # as a caller passes them who has them
            if name in batch:
                whole[name] = pad(batch[name], (0, 5), value=int(name == "attention_mask"))
        return write(vlm, whole, past_key_values=first.past_key_values).logits

    with Watch(pruner) as watch, attach(vlm, pruner, keep=RAGGED):
        logits = talk()
    with masked(vlm, watch.gone(encode(vlm, batch))[0]):
        torch.testing.assert_close(torch.stack(logits), torch.stack(talk()), **CLOSE)


def gates(tiny):
    """Gates of 0 and 1 weigh as dropping does."""
    pruner = scattered(tiny)
    encoded = encode(tiny.vlm, tiny.batch(MIXED))
    hard = run_pruned(tiny.vlm, encoded, pruner, RAGGED).host.logits[:, -1]
    soft, outputs = run_gated(tiny.vlm, encoded, pruner.train(), RAGGED, log_eps=1e-9)
    torch.testing.assert_close(last_logits(soft.logits, encoded), hard, rtol=0, atol=5e-5)
    assert len(outputs) == 2


def detach(tiny):
    """Nothing is left behind, also when a call failed."""
    vlm, batch, pruner = tiny.vlm, tiny.batch(MIXED), scattered(tiny)
    bare, written = vlm(**batch).logits, write(vlm, batch).sequences
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in vlm.modules()]
    with attach(vlm, pruner, keep=2):
        assert vlm(**batch).logits.shape != bare.shape
        with pytest.raises(ValueError, match="typo"):
            vlm.generate(**batch, typo=1)
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in vlm.modules()]
    assert torch.equal(vlm(**batch).logits, bare) and torch.equal(write(vlm, batch).sequences, written)


RECURRENT = ("qwen3_5", "qwen3_5_moe", "minicpmv4_6", "lfm2_vl")
WHY = {"streams": "its layers carry several streams", "recurrent": "recurrent layers, from which no mask hides tokens"}
CHECKS = [keep_all, half, one_sample, ragged_counts, two_images, right_padding, second_turn, gates, detach]
FEW = {"deepseek_ocr2": [one_sample]}  # which reads pictures of a million pixels
CELLS = [
    pytest.param(name, check, id=f"layer-{name}-{check.__name__}") for name in ALL for check in FEW.get(name, CHECKS)
]


@pytest.mark.parametrize(("name", "check"), CELLS)
@torch.no_grad()
def test_matrix(name, check, record_property):
    outcome = "yes"
    try:
        check(tiny_family(name))
    except PruneZooError as error:
        outcome = f"refused: {error}"
    record_property("outcome", outcome)
    if name == "gemma3n" or (check is gates and name in RECURRENT):
        assert WHY["streams" if name == "gemma3n" else "recurrent"] in outcome
        return
    # Older releases may refuse more.
    assert outcome == "yes" or (not TAKES_FEATURES and "transformers 5.19 or later" in outcome)


# Beyond the matrix


@pytest.mark.parametrize("name", NOW)
@pytest.mark.parametrize("signal", ["last_attention", "prompt_attention"])
@torch.no_grad()
def test_signals_equal_eager_maps(name, signal):
    """Of every decoder, at every layer in front of which a stage may stand, behind a cut too."""
    tiny = tiny_family(name)
    vlm, batch, pruner = tiny.vlm, tiny.batch(MIXED), scattered(tiny)
    pruner.needs = (signal, f"{signal}@previous", f"{signal}@0")
    encoded = encode(vlm, batch)
    with Watch(pruner) as watch:
        run_pruned(vlm, encoded, pruner, RAGGED)
    gone, _ = watch.gone(encoded)
    eager = tiny.build()
    eager.set_attn_implementation({"text_config": "eager"})
    words = encoded.mask & ~find_family(vlm).is_visual(encoded.batch["input_ids"])
    origin = torch.arange(encoded.slots.shape[1]).expand_as(encoded.slots)
    for stage, (inputs, output) in enumerate(watch.calls):
        layer = inputs.layer
        before = {k: v for k, v in gone.items() if k < layer}
        slots = gather_rows(encoded.slots, origin)
        with masked(eager, before):
            maps = full_forward(eager, encoded, output_attentions=True).attentions
        for suffix, at in (("", layer), ("@previous", layer - 1), ("@0", 0)):
            found = inputs.signal(signal + suffix)
            for row, sample in enumerate(encoded.sample.tolist()):
                own = slots[row][inputs.valid[row]]
                rows = words[sample] & (torch.arange(words.shape[1]) > own.max())
                if signal == "last_attention":
                    rows = rows & (torch.arange(words.shape[1]) == int(words[sample].nonzero().max()))
                expected = maps[at][sample].mean(0)[rows][:, own].mean(0)
                torch.testing.assert_close(found[row][: len(own)], expected, **CLOSE)
        assert stage == inputs.step
        origin = gather_rows(origin, output.index)


@pytest.mark.parametrize("name", [*NOW, *(name for name in ("qwen3_5", "gemma4_shared", "llama4") if name in NEWER)])
@torch.no_grad()
def test_a_dialogue_goes_on_behind_a_prompt_that_was_shortened(name):
    """The prompt stage, on a cache that is shorter than the caller's conversation; whole ids and new ones."""
    tiny = tiny_family(name)
    vlm, batch = tiny.vlm, tiny.batch(MIXED)
    encoded, output = choose(vlm, batch, 0.5)
    words = torch.randint(30, 60, (4, 3), generator=torch.Generator().manual_seed(0))

    def talk(own=slice(None)):
        first = write(vlm, batch, max_new_tokens=2)
        ids = torch.cat([first.sequences, words], 1)[:, own]
        mask = torch.cat([batch["attention_mask"], torch.ones(4, 5, dtype=torch.long)], 1)
        return write(vlm, {"input_ids": ids, "attention_mask": mask}, past_key_values=first.past_key_values).logits

    with blind(vlm, drops(encoded, output)):
        expected = torch.stack(talk())
    for own in (slice(None), slice(-4, None)):  # the last word written is not in the cache yet
        with attach(vlm, build_pruner("random", seed=3), keep=0.5):
            torch.testing.assert_close(torch.stack(talk(own)), expected, **CLOSE)


@pytest.mark.parametrize("window", [8, 20, 40])
@torch.no_grad()
def test_windows_count_original_columns(window):
    """Gemma 3, whose window is shorter than the prompt: layers that lost tokens still look back as far as they did."""
    tiny = type(FAMILIES["gemma3"])()
    tiny.window = window
    equals_oracle(tiny, ONE_EACH)
    equals_oracle(tiny, MIXED, keep=RAGGED)
    second_turn(tiny)
    batch, pruner = tiny.batch([Sample((SMALL,), 6)]), Scattered(1, 2)
    with attach(tiny.vlm, pruner, keep=3):
        greedy = tiny.vlm.generate(**batch, max_new_tokens=12)
        try:
            assert torch.equal(tiny.vlm.generate(**batch, max_new_tokens=12, prompt_lookup_num_tokens=2), greedy)
        except PruneZooError as error:
            assert not TAKES_FEATURES
            assert "assisted decoding in the layer stage needs" in str(error)  # noqa: PT017


def test_deepstack_levels_come_first():
    tiny = tiny_family("qwen3_vl")
    with pytest.raises(
        PruneZooError, match=r"in front of layer 1, and Qwen3-VL needs all .* configure layers from 2 on"
    ):
        attach(tiny.vlm, Scattered(1), keep=3)
    with pytest.raises(PruneZooError, match="M-RoPE"):
        attach(tiny.vlm, Scattered(2), keep=3, positions="compact")


def test_clips_are_pruned_like_images():
    for name in set(VIDEO_FAMILIES) & set(NOW):
        tiny = tiny_family(name)
        with torch.no_grad():
            equals_oracle(tiny, [Sample((LARGE,), 5, (4,)), Sample((), 4, (4,)), Sample((SMALL,), 4)])
