"""Tokens that come back: few, all, few, in whatever state, against every layer run by hand over all columns."""

import pytest
import torch
from layer_oracle import Watch
from layer_pruners import Scripted, close, eager_copy
from return_oracle import away_by_layer, by_layers, embedded, write
from tiny_llava import LONG, NONE, SHORT, TWO, make_image

from prunezoo import PruneZooError, attach, build_pruner, encode
from prunezoo.host import run_gated, run_pruned
from prunezoo.host.stages.prompt import shorten_prompt

STEPS = 3
MODES = ("raw", "last")
PHASES = {
    "few, all, few": ((1, 2, 3), ([3, 20, 1, 36], [36] * 4, [5, 1, 9, 20])),
    "few, other few": ((1, 3), ([3, 20, 1, 36], [6, 10, 2, 30])),
    "few, all": ((1, 3), ([9, 9, 9, 9], [36] * 4)),
    "none, all, none": ((1, 2, 3), ([0, 9, 0, 0], [36] * 4, [0, 0, 4, 0])),
}


class Phases(Scripted):
    """Keeps what a table says, another one in each phase, of all tokens; as many of each image as `script` says."""

    name, exact = "phases", False
    comes_back = "last"
    script: tuple[list[int], ...] = ()

    def reduce(self, inputs, keep):
        assert inputs.valid.sum(1).tolist() == [36] * len(inputs.valid)  # all are shown, at every stage
        counts = self.script[inputs.step]
        return super().reduce(inputs, torch.tensor(counts))


def phases(name, mode):
    pruner = Phases().eval()
    pruner.layers, pruner.script = PHASES[name]
    pruner.comes_back = mode
    return pruner


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("name", "side"), [*((name, "left") for name in PHASES), ("few, all", "right"), ("few, other few", "right")]
)
def test_one_forward_equals_every_layer_by_hand(deep_llava, name, mode, side):
    vlm, images = deep_llava.vlm, [[make_image(0)], [make_image(5), make_image(6)], [], [make_image(1)]]
    batch = deep_llava.batch([LONG, TWO, NONE, SHORT], images, padding_side=side)
    pruner, rows = phases(name, mode), torch.arange(4)
    with torch.no_grad():
        encoded = encode(vlm, batch)
        with Watch(pruner) as watch:
            run = run_pruned(vlm, encoded, pruner, 5, output_hidden_states=True)
        away, embeds = away_by_layer(watch.calls, encoded), embedded(vlm, encoded)
        expected = by_layers(vlm, embeds, encoded.mask, away, mode)
        other = by_layers(vlm, embeds, encoded.mask, away, "raw" if mode == "last" else "last")
    last = encoded.mask.shape[1] - 1 - encoded.mask.flip(1).int().argmax(1)
    whole = side == "right" and set(pruner.script[-1]) == {36}  # the prompt is as it came
    close(run.host.logits[rows, last if whole else -1], expected[rows, last])
    # It matters in which state they come back, unless all left at the first stage, and as they came. Here layer 0 ran.
    assert (expected - other)[rows, last][:2].abs().amax(1).min() > 1e-3
    assert sorted(away) == list(pruner.layers)
    # The work is really less, and more where they are back.
    lengths = [state.shape[1] for state in run.host.hidden_states]
    for layer in range(4):
        gone = away[max((k for k in away if k <= layer), default=min(away))] & (layer >= min(away))
        assert lengths[layer + 1] == (encoded.mask & ~gone).sum(1).max()
    spans = [run.layers[:, layer].tolist() for layer in range(4)]
    assert spans[0] == [36] * 4 and all(spans[at] == script for at, script in zip(*PHASES[name], strict=True))
    assert run.output.count.tolist() == pruner.script[-1]


WAYS = {"greedy": {}, "eager": {}, "no cache": {"use_cache": False}}
CASES = [
    ("few, all, few", "greedy"),
    ("none, all, none", "greedy"),
    ("few, all", "eager"),
    ("few, all, few", "no cache"),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "way"), CASES)
def test_generating_equals_every_layer_by_hand(deep_llava, mixed, name, way, mode):
    """Caches: long in front, short in the layers between, long again, short at the end."""
    vlm = eager_copy(deep_llava.vlm) if way == "eager" else deep_llava.vlm
    pruner = phases(name, mode)
    options = {"max_new_tokens": STEPS, "return_dict_in_generate": True, "output_logits": True, **WAYS[way]}
    with torch.no_grad():
        with Watch(pruner) as watch, attach(vlm, pruner, keep=5) as run:
            out = vlm.generate(**mixed, **options)
        encoded = encode(vlm, mixed)
        away = away_by_layer(watch.calls[: len(pruner.layers)], encoded)
        expected = write(vlm, encoded, away, mode, STEPS)
    for one, two in zip(out.logits, expected, strict=True):
        close(one, two)
    assert run.stats.after[:4] == pruner.script[-1]
    if way != "no cache":
        for layer, kept in enumerate(out.past_key_values.layers):
            gone = away[max((k for k in away if k <= layer), default=min(away))] & (layer >= min(away))
            assert kept.get_seq_length() == (encoded.mask & ~gone).sum(1).max() + STEPS - 1


@pytest.mark.parametrize("mode", MODES)
def test_beams_equal_each_sequence_by_hand(deep_llava, mixed, mode):
    """The states that wait are those of each copy; what beams wrote is scored word by word."""
    vlm, pruner = deep_llava.vlm, phases("few, all, few", mode)
    options = {"max_new_tokens": STEPS, "num_beams": 3, "num_return_sequences": 3, "return_dict_in_generate": True}
    with torch.no_grad():
        with Watch(pruner) as watch, attach(vlm, pruner, keep=5):
            out = vlm.generate(**mixed, **options, output_scores=True, length_penalty=0.0)
        encoded = encode(vlm, mixed)
        away = {k: v.repeat_interleave(3, 0) for k, v in away_by_layer(watch.calls, encoded).items()}
        words = out.sequences[:, mixed["input_ids"].shape[1] :]
        embeds = torch.cat([embedded(vlm, encoded).repeat_interleave(3, 0), vlm.get_input_embeddings()(words)], 1)
        real = torch.cat([encoded.mask.repeat_interleave(3, 0), torch.ones_like(words).bool()], 1)
        logits = by_layers(vlm, embeds, real, away, mode, (real.cumsum(1) - 1).clamp_min(0))
    said = logits[:, -STEPS - 1 : -1].log_softmax(-1).gather(2, words[..., None])[..., 0]
    ended = (words == vlm.generation_config.eos_token_id).cumsum(1).roll(1, 1)
    ended[:, 0] = 0
    close(out.sequences_scores, said.masked_fill(ended > 0, 0).sum(1))


@pytest.mark.parametrize(("mode", "compact"), [("raw", False), ("last", True)])
def test_a_second_turn_on_the_same_cache(deep_llava, mixed, mode, compact):
    vlm, pruner = deep_llava.vlm, phases("few, all, few", mode)
    words = deep_llava.batch([" red </s> USER: is the box left ? ASSISTANT:", " no", " what ?", " red ?"], [[]] * 4)
    options = {"max_new_tokens": STEPS, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        with Watch(pruner) as watch, attach(vlm, pruner, 5, "compact" if compact else "original"):
            first = vlm.generate(**mixed, **options)
            ids = torch.cat([first.sequences, words["input_ids"]], 1)
            mask = torch.cat([mixed["attention_mask"], torch.ones(4, STEPS).long(), words["attention_mask"]], 1)
            second = vlm.generate(ids, attention_mask=mask, past_key_values=first.past_key_values, **options)
        encoded = encode(vlm, mixed)
        away = away_by_layer(watch.calls, encoded)
        expected = write(vlm, encoded, away, mode, STEPS, compact, [(words["input_ids"], words["attention_mask"])])
    for one, two in zip([*first.logits, *second.logits], expected, strict=True):
        close(one, two)


@pytest.mark.parametrize("mode", MODES)
def test_coming_back_over_a_layer_that_does_nothing_is_the_bare_model_bit_for_bit(deep_llava, mixed, mode):
    """Layer 0 and 1 add nothing; tokens that miss layer 1 have missed nothing, in whatever state they come back."""
    vlm = eager_copy(deep_llava.vlm)
    vlm.set_attn_implementation({"text_config": "sdpa"})
    for layer in vlm.get_decoder().layers[:2]:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    pruner = Phases().eval()
    pruner.layers, pruner.script, pruner.comes_back = (1, 2), ([3, 20, 1, 36], [36] * 4), mode
    real = mixed["attention_mask"].bool()
    logits = vlm(**mixed).logits[real]
    for options in ({}, {"num_beams": 2, "num_return_sequences": 2}, {"use_cache": False}):
        options = {"max_new_tokens": STEPS, "return_dict_in_generate": True, "output_logits": True, **options}
        bare = vlm.generate(**mixed, **options)
        with attach(vlm, pruner, keep=1.0) as run:
            assert torch.equal(vlm(**mixed).logits[real], logits)
            out = vlm.generate(**mixed, **options)
        assert torch.equal(out.sequences, bare.sequences)
        assert all(torch.equal(one, two) for one, two in zip(out.logits, bare.logits, strict=True))
        assert run.stats.stages[0].after[:4] == [3, 20, 1, 36] and run.stats.tokens[0] == (36 * 3 + 3) / 4


def test_stages_are_told_what_was_away_and_read_signals_of_all(deep_llava, mixed):
    vlm, pruner = deep_llava.vlm, phases("few, other few", "last")
    pruner.needs = ("last_attention", "hidden_states@1", "cls_attention")
    with torch.no_grad():
        encoded = encode(vlm, mixed, ("cls_attention",))
        with Watch(pruner) as watch:
            run_pruned(vlm, encoded, pruner, 5)
    (first, left), (second, _) = watch.calls
    assert first.away is None and (~second.away).sum(1).tolist() == [3, 20, 1, 36]
    for row in range(4):
        kept = left.index[row][left.valid[row]]
        assert (~second.away[row]).nonzero()[:, 0].tolist() == kept.tolist()
        # As they left, and as they are by now.
        assert torch.equal(second.features[row][second.away[row]], first.features[row][second.away[row]])
        assert (second.features[row, kept] - first.features[row, kept]).abs().max() > 1e-3
        # The layer as it would run with all of them back.
        assert (second.signal("last_attention")[row] > 0).all()
    assert torch.equal(second.signal("cls_attention"), encoded.inputs.signal("cls_attention"))
    assert torch.equal(second.signal("hidden_states@1"), first.features)


def test_labels_follow_tokens_that_come_back(deep_llava, mixed):
    vlm, labels = deep_llava.vlm, mixed["input_ids"].masked_fill(mixed["attention_mask"] == 0, -100)
    with attach(vlm, phases("few, all", "raw"), keep=7):
        out = vlm(**mixed, labels=labels)
    assert out.logits.shape[:2] == labels.shape
    assert out.loss == vlm.loss_function(out.logits, labels, vlm.config.text_config.vocab_size)


def test_what_cannot_come_back_is_refused(deep_llava, mixed):
    vlm, pruner = deep_llava.vlm, phases("few, all", "raw")
    with pytest.raises(PruneZooError, match="'phases' has tokens come back, which gates cannot: train it with"):
        run_gated(vlm, encode(vlm, mixed), pruner.train(), 5)
    pruner.layers = (0, 2)
    with pytest.raises(PruneZooError, match=r"drops tokens in front of layer 0, .* configure layers from 1 on"):
        attach(vlm, pruner, keep=5)


def test_behind_a_shortened_prompt_what_that_left_comes_back(deep_llava, mixed):
    vlm, first, later = deep_llava.vlm, build_pruner("uniform").eval(), build_pruner("lvlm_csp").eval()
    with torch.no_grad():
        encoded = encode(vlm, mixed)
        short, _ = shorten_prompt(vlm, encoded, first(encoded.inputs, 18))
        with Watch(later) as watch, attach(vlm, [first, later], keep=[18, 3]) as run:
            logits = vlm(**mixed).logits[:, -1]
        away = away_by_layer(watch.calls, short)
        places = short.batch["position_ids"]
        expected = by_layers(vlm, embedded(vlm, short), short.mask, away, "raw", places)[:, -1]
    close(logits, expected)
    assert [stage.after[0] for stage in run.stats.stages] == [18, 4, 18, 3]
    assert [stage.before[0] for stage in run.stats.stages] == [36, 18, 4, 18]


def test_assisted_decoding_equals_greedy(deep_llava):
    """Candidates stand behind the prompt already in the forward that brings tokens back."""
    vlm, batch = deep_llava.vlm, deep_llava.batch([LONG], [[make_image(0)]])
    with attach(vlm, "lvlm_csp", keep=3):
        greedy = vlm.generate(**batch, max_new_tokens=10)
        assert torch.equal(vlm.generate(**batch, max_new_tokens=10, prompt_lookup_num_tokens=2), greedy)


def test_padding_in_every_row_stays_hidden_when_all_are_back(deep_llava):
    """As many real columns in each row, so nothing is ragged; and still not all of them may be seen."""
    vlm, batch = deep_llava.vlm, deep_llava.batch([LONG, LONG], [[make_image(0)], [make_image(1)]])
    batch["input_ids"] = torch.nn.functional.pad(batch["input_ids"], (3, 0), value=0)
    batch["attention_mask"] = torch.nn.functional.pad(batch["attention_mask"], (3, 0), value=0)
    pruner = phases("few, all", "last")
    pruner.script = ([4, 4], [36, 36])
    with torch.no_grad():
        encoded = encode(vlm, batch)
        with Watch(pruner) as watch, attach(vlm, pruner, keep=5):
            out = vlm.generate(**batch, max_new_tokens=STEPS, return_dict_in_generate=True, output_logits=True)
        expected = write(vlm, encoded, away_by_layer(watch.calls, encoded), "last", STEPS)
    for one, two in zip(out.logits, expected, strict=True):
        close(one, two)
