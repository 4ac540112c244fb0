"""Caches that a pruned prompt filled: copies, later blocks, emptying, cropping; calls that come in between; threads."""

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import torch
from tiny_llava import make_image

from prunezoo import PruneZooError, attach

LONG = "<s> USER: <image> what color is the ball left ? ASSISTANT:"
NONE = "<s> USER: " + "is the ball red ? " * 10 + "ASSISTANT:"  # longer than the shortened prompt and what it lost
NEXT = " red </s> USER: is the box left ? ASSISTANT:"
OPTIONS = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(scope="module")
def talk(tiny_llava):
    """A first turn's batch, and a function that makes the second turn's inputs of its output."""
    batch, words = tiny_llava.batch([LONG], [[make_image(0)]]), tiny_llava.batch([NEXT], [[]])["input_ids"]

    def second(first):
        ids = torch.cat([first.sequences, words], 1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return tiny_llava.vlm, batch, second


def test_a_copied_cache_and_one_of_an_earlier_block_go_on_alike(talk):
    vlm, batch, second = talk
    with attach(vlm, "uniform", keep=4):
        first = vlm.generate(**batch, **OPTIONS)
        turn, copied = second(first), copy.deepcopy(first.past_key_values)
        later = copy.deepcopy(first.past_key_values)
        expected = vlm.generate(**turn, past_key_values=first.past_key_values, **OPTIONS).logits[0]
        of_copy = vlm.generate(**turn, past_key_values=copied, **OPTIONS).logits[0]
    with attach(vlm, "pool", keep=9):
        of_later = vlm.generate(**turn, past_key_values=later, **OPTIONS).logits[0]
    whole = vlm.generate(**turn, pixel_values=batch["pixel_values"], **OPTIONS).logits[0]
    assert (expected - whole).abs().max() > 1e-2
    assert torch.equal(of_copy, expected) and torch.equal(of_later, expected)


@pytest.mark.parametrize("pruner", ["uniform", "fastv"])
def test_an_emptied_cache_begins_anew(pruner, deep_llava):
    vlm, text = deep_llava.vlm, deep_llava.batch([NONE], [[]])
    expected = vlm.generate(**text, **OPTIONS)
    with attach(vlm, pruner, keep=4):
        cache = vlm.generate(**deep_llava.batch([LONG], [[make_image(0)]]), **OPTIONS).past_key_values
        for layer in cache.layers:
            layer.crop(-layer.get_seq_length())
        for _ in range(2):  # the second goes on behind the first
            out = vlm.generate(**text, past_key_values=cache, **OPTIONS)
            torch.testing.assert_close(out.logits[0], expected.logits[0], rtol=0, atol=1e-5)
            text = {"input_ids": out.sequences, "attention_mask": torch.ones_like(out.sequences)}
            expected = vlm.generate(**text, **OPTIONS)


def test_a_cache_cropped_into_its_pruned_prompt_is_refused(talk):
    vlm, batch, second = talk
    with attach(vlm, "uniform", keep=4):
        first = vlm.generate(**batch, **OPTIONS)
        turn, cache = second(first), first.past_key_values
        cache.crop(-4)  # two are answers
        with pytest.raises(PruneZooError, match="cropped into its pruned prompt"):
            vlm.generate(**turn, past_key_values=cache, **OPTIONS)
        with pytest.raises(PruneZooError, match="cropped into its pruned prompt"):
            vlm(batch["input_ids"][:, -2:], past_key_values=cache)


@pytest.mark.parametrize("pruner", ["fastervlm", "fastv"])
def test_threads_take_turns(pruner, deep_llava):
    vlm = deep_llava.vlm
    batches = [deep_llava.batch([LONG.replace("left ", "left " * i)], [[make_image(i)]]) for i in range(6)]
    with attach(vlm, pruner, keep=4), ThreadPoolExecutor(3) as pool:
        expected = [vlm.generate(**batch, max_new_tokens=8) for batch in batches]
        assert len({tuple(sequence[0, -8:].tolist()) for sequence in expected}) > 1
        for _ in range(3):
            threads = [pool.submit(vlm.generate, **batch, max_new_tokens=8) for batch in batches]
            assert all(torch.equal(thread.result(), one) for thread, one in zip(threads, expected, strict=True))


def test_leaving_waits_for_a_thread_that_generates(talk):
    vlm, batch, _ = talk
    begun, left = Event(), Event()

    class Wait:
        """At the first tokens, gives the block time to be left."""

        attached = None

        def put(self, _):
            begun.set()
            if self.attached is None:
                left.wait(0.5)
                self.attached = "generate" in vars(vlm)

        def end(self):
            pass

    streamer = Wait()
    with ThreadPoolExecutor(1) as pool:
        with attach(vlm, "uniform", keep=4):
            thread = pool.submit(vlm.generate, **batch, max_new_tokens=3, streamer=streamer)
            assert begun.wait(60)
        left.set()
        assert thread.result().shape[1] > batch["input_ids"].shape[1] and streamer.attached


def test_a_direct_call_from_another_thread_is_refused_while_one_generates(talk):
    vlm, batch, _ = talk

    class CallOnce:
        """Where a streamer is told of the first tokens, another thread calls the model."""

        error = None

        def put(self, _):
            if self.error is None:
                with ThreadPoolExecutor(1) as pool:
                    self.error = pool.submit(vlm, **batch).exception()

        def end(self):
            pass

    streamer = CallOnce()
    with attach(vlm, "uniform", keep=4):
        vlm.generate(**batch, max_new_tokens=2, streamer=streamer)
        assert vlm(**batch).logits.shape[1] < batch["input_ids"].shape[1]
    assert isinstance(streamer.error, PruneZooError) and "another thread generates" in str(streamer.error)


@pytest.mark.parametrize("pruner", ["uniform", "fastv"])
def test_a_streamer_may_ask_the_model_itself(pruner, deep_llava):
    vlm, batch = deep_llava.vlm, deep_llava.batch([LONG], [[make_image(0)]])

    class Ask:
        """Another question at each token."""

        def __init__(self):
            self.said = []

        def put(self, _):
            self.said.append(vlm.generate(**other, max_new_tokens=3))

        def end(self):
            pass

    with attach(vlm, pruner, keep=4) as run:
        other = deep_llava.batch([LONG], [[make_image(1)]])
        expected, alone = vlm.generate(**batch, max_new_tokens=4), vlm.generate(**other, max_new_tokens=3)
        ask = Ask()
        assert torch.equal(vlm.generate(**batch, max_new_tokens=4, streamer=ask), expected)
    assert len(ask.said) > 1 and all(torch.equal(answer, alone) for answer in ask.said)
    assert len(run.stats.before) == 3 + len(ask.said)
    call = Ask()
    call.put = lambda _: vlm(**other)
    with attach(vlm, pruner, keep=4), pytest.raises(PruneZooError, match="ask the model by `generate` too"):
        vlm.generate(**batch, max_new_tokens=4, streamer=call)


def test_a_reference_to_generate_from_before_is_refused(talk):
    vlm, batch, _ = talk
    generate = vlm.generate
    with attach(vlm, "uniform", keep=4), pytest.raises(PruneZooError, match="not a reference to it from before"):
        generate(**batch, max_new_tokens=2)


def test_calls_of_parts_of_the_model_pass_untouched(deep_llava):
    """The layers' hooks know only what they were told of the last call of the whole."""
    vlm, text = deep_llava.vlm, deep_llava.batch([NEXT], [[]])
    with attach(vlm, "fastv", keep=4):
        vlm(**deep_llava.batch([LONG], [[make_image(0)]]))
        states = vlm.model.language_model(**text).last_hidden_state
    assert torch.equal(states, vlm.model.language_model(**text).last_hidden_state)


@pytest.mark.parametrize("negative", [None, NONE])
@pytest.mark.parametrize("pruner", ["uniform", "fastv"])
def test_guidance_by_the_model_without_a_prompt(pruner, negative, deep_llava):
    vlm, batch = deep_llava.vlm, deep_llava.batch([LONG], [[make_image(0)]])
    other = {} if negative is None else {"negative_prompt_ids": deep_llava.batch([NONE], [[]])["input_ids"]}
    with attach(vlm, pruner, keep=4):
        plain = vlm.generate(**batch, **OPTIONS)
        guided = vlm.generate(**batch, **OPTIONS, output_scores=True, guidance_scale=2.0, **other)
    assert torch.equal(guided.logits[0], plain.logits[0])
    length = batch["input_ids"].shape[1]
    begin = other.get("negative_prompt_ids", batch["input_ids"][:, -1:])
    assert negative is None or begin.shape[1] > length
    for step, (logits, scores) in enumerate(zip(guided.logits, guided.scores, strict=True)):
        words = torch.cat([begin, guided.sequences[:, length : length + step]], 1)
        blind = vlm(words).logits[:, -1].log_softmax(-1)
        expected = blind + 2 * (logits.log_softmax(-1) - blind)
        assert (scores - logits.log_softmax(-1)).abs().max() > 1e-2
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)
