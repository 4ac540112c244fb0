"""Every method that remembers streams: first calls are memoryless, reset is a first call, and nobody else's state."""

import dataclasses

import pytest
import torch
from made_inputs import ALL, build, make_inputs, same, take_rows
from tiny_llava import make_image

from prunezoo import PruneZooError, attach, encode
from prunezoo.core.contract import Pruner
from prunezoo.core.memory import Memory
from prunezoo.core.registry import pruner_class, register_pruner
from prunezoo.host import encode_needs, run_pruned

REMEMBERING = tuple(name for name in ALL if pruner_class(name).remembers)
DEPTH = 4
PROMPT = "<s> USER: <image> what ? ASSISTANT:"


@pytest.fixture(params=REMEMBERING)
def name(request):
    return request.param


class Stream:
    """Calls of a pruner with a memory, without a model."""

    def __init__(self, pruner, streams=None):
        self.pruner, self.memory = pruner, Memory()
        self.memory.streams = streams

    def __call__(self, inputs, keep):
        rows, outputs = len(inputs.valid), []
        sample = range(rows)
        for step in range(max(1, len(self.pruner.stages(DEPTH)))):  # in the layer stage, behind each of them
            inputs = dataclasses.replace(inputs, step=step)
            inputs = self.memory.recall(self.pruner, inputs, sample, rows)
            outputs.append(self.pruner(inputs, keep))
            self.memory.note(self.pruner, inputs, outputs[-1], sample, rows)
            inputs, keep = inputs.after(outputs[-1]), outputs[-1].count
        return outputs[0]


def equal(one, two):
    return (
        one.index.shape == two.index.shape and torch.equal(one.index, two.index) and torch.equal(one.valid, two.valid)
    )


def test_there_are_some_of_both_stages():
    assert {"changed", "vla_pruner"} <= set(REMEMBERING)


def test_the_first_call_is_memoryless_and_reset_makes_it_the_first_again(name):
    pruner, frames = build(name), [make_inputs(seed=seed) for seed in (0, 0, 1)]
    stream = Stream(pruner, "abc")
    first = stream(frames[0], 7)
    assert equal(first, pruner(frames[0], 7))
    second, third = stream(frames[1], 7), stream(frames[2], 7)
    assert not equal(third, pruner(frames[2], 7))  # it did remember
    assert torch.equal(second.count, first.count)
    stream.memory.reset()
    for frame, seen in zip(frames, (first, second, third), strict=True):
        again = stream(frame, 7)
        assert equal(again, seen) and torch.equal(again.scores, seen.scores)
    stream.memory.reset("b")
    fourth = stream(frames[0], 7)
    same(fourth, first, 1, 1, fourth.kept_features(frames[0]), first.kept_features(frames[0]))
    assert fourth.index[0].tolist() != first.index[0].tolist()


def test_a_batch_of_streams_is_each_alone_in_any_order(name):
    pruner, frames = build(name), [make_inputs(seed=seed, pad=seed) for seed in (0, 1, 2)]
    together = Stream(pruner, ("a", "b", "c"))
    outputs = [together(frame, 0.3) for frame in frames]
    alone = [Stream(pruner) for _ in range(3)]
    for frame, output in zip(frames, outputs, strict=True):
        for row in range(3):
            single = take_rows(frame, [row], int(frame.valid[row].sum()), 5 - row)
            own = alone[row](single, 0.3)
            same(output, own, row, 0, output.kept_features(frame), own.kept_features(single))
    together.memory.reset()
    together(frames[0], 0.3)
    together.memory.streams = ("c", "a", "b")
    moved = take_rows(frames[1], [2, 0, 1])
    output = together(moved, 0.3)
    for new, old in enumerate((2, 0, 1)):
        same(output, outputs[1], new, old, output.kept_features(moved), outputs[1].kept_features(frames[1]))


def test_what_is_held_is_no_part_of_the_pruner(name):
    pruner = build(name)
    stream = Stream(pruner, "abc")
    before = (dict(pruner.state_dict()), set(vars(pruner)), pruner.settings())
    stream(make_inputs().to(torch.float32), 7)
    assert (dict(pruner.state_dict()), set(vars(pruner)), pruner.settings()) == before
    assert all(not t.requires_grad for state in stream.memory._held.values() for t in state.values())


def test_where_streams_are_not_clear_it_is_refused_in_one_line(name):
    pruner, memory = build(name), Memory()
    inputs, sample = make_inputs(), range(3)
    with pytest.raises(PruneZooError, match=f"'{name}' remembers streams, and this call has 3 samples: set"):
        memory.recall(pruner, inputs, sample, 3)
    for streams in ("ab", "aba", "abcd", ()):
        memory.streams = streams
        with pytest.raises(PruneZooError, match="must name 3 different streams"):
            memory.recall(pruner, inputs, sample, 3)
    memory.streams = "abc"
    with pytest.raises(PruneZooError, match="remembers in use only: train it without a memory"):
        memory.recall(pruner.train(), inputs, sample, 3)
    assert memory.recall(build("uniform"), inputs, sample, 3) is inputs


def test_a_later_stage_does_not_find_it(name):
    inputs = dataclasses.replace(make_inputs(), memory=(None,) * 3)
    assert inputs.after(build(name)(inputs, 5)).memory is None


def test_who_remembers_is_of_prompt_or_layer_stage_and_says_what():
    score = {"score": lambda self, inputs: inputs.features[..., 0], "remembers": True}
    for body in (score, {**score, "stage": "vision", "remember": lambda self, inputs, output: []}):
        with pytest.raises(PruneZooError, match="must be of prompt or layer stage and override"):
            register_pruner("no_memory")(type("NoMemory", (Pruner,), body))


# On a tiny model


def test_attach_keeps_the_state_and_forgets_it_on_leaving(name, deep_llava):
    vlm, pruner = deep_llava.vlm, build(name)
    frames = [deep_llava.batch([PROMPT], [[make_image(seed)]]) for seed in (0, 0, 1)]
    memory = Memory()
    with torch.no_grad():
        first = run_pruned(vlm, encode(vlm, frames[0], encode_needs(pruner)), pruner, 9)
        runs = [run_pruned(vlm, encode(vlm, f, encode_needs(pruner)), pruner, 9, memory=memory) for f in frames]
        bare = run_pruned(vlm, encode(vlm, frames[2], encode_needs(pruner)), pruner, 9)
        assert torch.equal(runs[0].host.logits, first.host.logits)
        assert not torch.equal(runs[2].output.index, bare.output.index)
        with attach(vlm, pruner, keep=9) as run:
            for frame, other in zip(frames, runs, strict=True):
                assert torch.equal(vlm(**frame).logits, other.host.logits)
            with pytest.raises(PruneZooError, match="has 2 samples: set"):
                vlm.generate(**deep_llava.batch([PROMPT] * 2, [[make_image(0)], [make_image(1)]]), max_new_tokens=1)
            run.reset()
            vlm.generate(**frames[0], max_new_tokens=1)
            assert torch.equal(vlm(**frames[1]).logits, runs[1].host.logits)
        with attach(vlm, pruner, keep=9) as other:  # what was left holds nothing
            assert torch.equal(vlm(**frames[0]).logits, first.host.logits)
            other.memory.streams = ("left", "right")
            pair = deep_llava.batch([PROMPT] * 2, [[make_image(0)], [make_image(1)]])
            moved = deep_llava.batch([PROMPT] * 2, [[make_image(1)], [make_image(2)]])
            once = vlm(**moved).logits
            other.reset()
            vlm(**pair)
            assert not torch.equal(vlm(**moved).logits, once)
            other.reset()
            assert torch.equal(vlm(**moved).logits, once)
        assert not run.memory._held and not other.memory._held


# The first of them


def test_a_picture_that_stands_still_is_shown_bit_by_bit():
    stream, inputs, seen = Stream(build("changed"), "abc"), make_inputs(), [set(), set(), set()]
    for call in range(4):
        output = stream(inputs, 9)
        for row, (index, valid) in enumerate(zip(output.index, output.valid, strict=True)):
            new = set(index[valid].tolist())
            left = int(inputs.valid[row].sum()) - len(seen[row])
            assert len(new - seen[row]) == min(9, left), call
            seen[row] |= new
    assert [len(own) for own in seen] == [36, 20, 21]


def test_what_moved_is_kept_and_a_slow_drift_adds_up():
    stream, inputs = Stream(build("changed"), "abc"), make_inputs()
    stream(inputs, 1.0)
    turned = dataclasses.replace(inputs, features=inputs.features.clone())
    turned.features[:, 5] *= -1
    assert stream(turned, 1).index[:, 0].tolist() == [5, 5, 5]
    random = torch.Generator().manual_seed(0)
    drift = torch.nn.functional.normalize(torch.randn(inputs.features.shape[-1], generator=random), dim=0)
    kept = []
    for step in range(1, 7):  # slot 3 a little more each time, slot 8 anew but about as much as it was before
        features = turned.features.clone()
        features[:, 3] += 0.4 * step * drift
        features[:, 8] += 0.5 * drift * (-1) ** step
        kept.append(stream(dataclasses.replace(turned, features=features), 1).index[0, 0].item())
    assert 3 in kept
