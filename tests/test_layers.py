"""The layer stage on a tiny LLaVA: ragged counts, several stages, decoding on caches of unequal length, the traps."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
from conftest import make_image, make_llava
from layer_oracle import Watch, masked
from peft import LoraConfig, get_peft_model

from modules import Pruner, PruneZooError, attach, build_pruner, encode, full_forward
from modules.core.contract import PruneOutput
from modules.host import encode_needs, run_gated, run_pruned
from modules.host.layer_cache import cut_mask
from modules.host.run import reduce_early

LONG = "<s> USER: <image> what color is the ball left ? ASSISTANT:"
SHORT = "<s> USER: <image> what ? ASSISTANT:"
TWO = "<s> USER: <image> <image> what box ? ASSISTANT:"
NONE = "<s> USER: is the ball red ? ASSISTANT:"
NEXT = " red </s> USER: is the box left ? ASSISTANT:"
STEPS = 6
RAGGED = torch.tensor([3, 20, 1, 36])  # tokens that the last stage leaves of the four images


class Scripted(Pruner):
    """Keeps what a fixed table of random numbers says; another table at each stage."""

    name, stage = "scripted", "layer"
    layers: tuple[int, ...] = (2,)

    def stages(self, depth):
        return self.layers

    def score(self, inputs):
        table = torch.rand(6, 6, generator=torch.Generator().manual_seed(inputs.step))
        return table[inputs.cells[..., 1], inputs.cells[..., 2]] + 0 * inputs.features[..., 0]


def scripted(*layers):
    pruner = Scripted().eval()
    pruner.layers = layers
    return pruner


@pytest.fixture
def tiny(deep_llava):
    return deep_llava


@pytest.fixture(params=["left", "right"])
def side(request, tiny):
    tiny.processor.tokenizer.padding_side = request.param
    yield request.param
    tiny.processor.tokenizer.padding_side = "left"


@pytest.fixture
def mixed(tiny):
    """One image, two, none, one; four images."""
    images = [[make_image(0)], [make_image(5), make_image(6)], [], [make_image(1)]]
    return tiny.batch([LONG, TWO, NONE, SHORT], images)


def last_real(encoded):
    """``(B,)`` the last column of each row that is no padding."""
    return encoded.mask.shape[1] - 1 - encoded.mask.flip(1).int().argmax(1)


def close(one, two):
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


# One forward


@pytest.mark.parametrize("layers", [(0,), (1,), (2,), (3,), (0, 2), (1, 3), (1, 2, 3)], ids=str)
def test_stages_with_ragged_counts_equal_nested_oracles(tiny, side, layers):
    batch = tiny.batch([LONG, TWO, NONE, SHORT], [[make_image(0)], [make_image(5), make_image(6)], [], [make_image(1)]])
    pruner, rows = scripted(*layers), torch.arange(4)
    with torch.no_grad():
        encoded = encode(tiny.vlm, batch)
        with Watch(pruner) as watch:
            run = run_pruned(tiny.vlm, encoded, pruner, RAGGED, output_hidden_states=True)
        gone, _ = watch.gone(encoded)
        with masked(tiny.vlm, gone):
            expected = full_forward(tiny.vlm, encoded).logits[rows, last_real(encoded)]
        bare = full_forward(tiny.vlm, encoded).logits[rows, last_real(encoded)]
    close(run.host.logits[:, -1], expected)
    assert sorted(gone) == list(layers) and (run.host.logits[:2, -1] - bare[:2]).abs().amax(1).min() > 1e-3
    assert torch.equal(run.output.count, RAGGED)
    # The work is really less: what leaves each layer has the length of its longest row.
    lengths = [state.shape[1] for state in run.host.hidden_states]
    for layer, length in enumerate(lengths[1:]):
        away = gone[max((k for k in gone if k <= layer), default=-1)] if layer >= layers[0] else None
        width = encoded.mask.shape[1] if away is None else int((encoded.mask & ~away).sum(1).max())
        assert length == width
    counts = [[len(out.index[0][out.valid[0]]) for _, out in watch.calls][i] for i in range(len(layers))]
    whole = [36, *counts]
    spans = [b - a for a, b in itertools.pairwise([0, *layers, 4])]
    assert float(run.tokens[0]) == pytest.approx(sum(n * span for n, span in zip(whole, spans, strict=True)) / 4)


def test_labels_give_the_models_own_loss(tiny, mixed):
    vlm, labels = tiny.vlm, mixed["input_ids"].masked_fill(mixed["attention_mask"] == 0, -100)
    with attach(vlm, scripted(1, 3), keep=7):
        out = vlm(**mixed, labels=labels)
    run = run_pruned(vlm, encode(vlm, {**mixed, "labels": labels}), scripted(1, 3), 7)
    assert torch.equal(out.logits, run.host.logits) and out.logits.shape[:2] == run.host.labels.shape
    assert out.logits.shape[1] < labels.shape[1]
    assert out.loss == vlm.loss_function(out.logits, run.host.labels, vlm.config.text_config.vocab_size)
    kept = run.host.labels != -100
    shown = [row[row != 4] for row in (run.host.labels[i][kept[i]] for i in range(4))]  # without placeholders
    assert all(torch.equal(a, b[(b != -100) & (b != 4)]) for a, b in zip(shown, labels, strict=True))


def test_merged_features_stand_at_their_anchors(tiny, mixed):
    class Halves(Scripted):
        """Every other token, averaged with the one after it."""

        exact = False

        def reduce(self, inputs, keep):
            index = torch.arange(0, inputs.valid.shape[1], 2).expand(len(inputs.valid), -1)
            merged = (inputs.features[:, ::2] + inputs.features[:, 1::2]) / 2
            return PruneOutput(index, inputs.valid[:, ::2], merged)

    pruner = Halves().eval()
    pruner.layers = (1, 2)
    with torch.no_grad():
        encoded = encode(tiny.vlm, mixed)
        with Watch(pruner) as watch:
            run = run_pruned(tiny.vlm, encoded, pruner, 9)
        gone, made = watch.gone(encoded)
        with masked(tiny.vlm, gone, made):
            expected = full_forward(tiny.vlm, encoded).logits[:, -1]
        with masked(tiny.vlm, gone):
            plain = full_forward(tiny.vlm, encoded).logits[:, -1]
    close(run.host.logits[:, -1], expected)
    assert (expected - plain)[0].abs().max() > 1e-3  # merging is not dropping
    assert run.output.index[0].tolist() == list(range(0, 36, 4))


@pytest.mark.parametrize("name", ["last_attention", "prompt_attention", "self_attention"])
@pytest.mark.parametrize("where", ["", "@previous", "@0", "@1", "+norope"])
def test_signals_equal_eager_maps(tiny, side, name, where):
    """Read while sdpa runs, from the queries of the wanted rows; behind a first cut too."""
    eager = make_llava(num_hidden_layers=4)
    eager.load_state_dict(tiny.vlm.state_dict())
    eager.set_attn_implementation({"text_config": "eager"})
    batch = tiny.batch([LONG, TWO, NONE], [[make_image(0)], [make_image(5), make_image(6)], []])
    pruner = scripted(2, 3)
    pruner.needs = (name + where,)
    with torch.no_grad(), Watch(pruner) as watch:
        encoded = encode(tiny.vlm, batch, encode_needs(pruner))
        run_pruned(tiny.vlm, encoded, pruner, torch.tensor([5, 20, 9]))
    for inputs, _ in watch.calls:
        signal = inputs.signal(name + where)
        assert signal.shape == inputs.valid.shape and (signal >= 0).all()
    inputs, gone = watch.calls[1][0], watch.gone(encoded)[0]
    layer = {"": 3, "@previous": 2, "@0": 0, "@1": 1, "+norope": 3}[where]
    with torch.no_grad(), masked(eager, {2: gone[2]}):
        if where == "+norope":  # no rotation is rotation by nothing
            pass_through = eager.get_decoder().layers[3].register_forward_pre_hook(_no_rotation, with_kwargs=True)
        maps = full_forward(eager, encoded, output_attentions=True).attentions[layer].mean(1)
        if where == "+norope":
            pass_through.remove()
    for row, sample in enumerate(encoded.sample.tolist()):
        cells = inputs.cells[row][inputs.valid[row]]
        slots = encoded.slots[row][cells[:, 1] * 6 + cells[:, 2]]
        ids = encoded.batch["input_ids"][sample]
        words = encoded.mask[sample] & (ids != tiny.vlm.config.image_token_id)
        if name == "last_attention":
            words &= torch.arange(len(ids)) == int(words.nonzero().max())
        words &= torch.arange(len(ids)) > slots.max()
        expected = maps[sample][words][:, slots].mean(0)
        if name == "self_attention":  # a token is seen by itself and those behind it, as many as there were
            lookers = encoded.slots[row] if layer < 2 else slots
            counts = (lookers[:, None] >= slots).sum(0)
            expected = maps[sample][lookers][:, slots].sum(0) / counts
        torch.testing.assert_close(
            watch.calls[1][0].signal(name + where)[row][: len(slots)], expected, rtol=0, atol=1e-5
        )


def _no_rotation(_, args, kwargs):
    cos, sin = kwargs["position_embeddings"]
    return args, {**kwargs, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}


def test_signals_of_the_tower_and_hidden_states_follow_the_survivors(tiny, mixed):
    pruner = scripted(1, 3)
    pruner.needs = ("cls_attention", "hidden_states@1")
    with torch.no_grad(), Watch(pruner) as watch:
        encoded = encode(tiny.vlm, mixed, encode_needs(pruner))
        run_pruned(tiny.vlm, encoded, pruner, 5)
        states = full_forward(tiny.vlm, encoded, output_hidden_states=True).hidden_states[1]
    inputs, output = watch.calls[1][0], watch.calls[0][1]
    assert list(encoded.inputs.signals) == ["cls_attention"]
    assert torch.equal(inputs.signal("cls_attention"), encoded.inputs.signal("cls_attention").gather(1, output.index))
    kept = encoded.slots.gather(1, output.index)
    close(inputs.signal("hidden_states@1"), states[encoded.sample[:, None], kept])
    assert inputs.layer == 3 and inputs.step == 1 and inputs.features.shape[1] == output.index.shape[1]
    close(watch.calls[0][0].features, states[encoded.sample[:, None], encoded.slots])
    words = encoded.batch["input_ids"] != tiny.vlm.config.image_token_id
    close(watch.calls[0][0].text[0][watch.calls[0][0].text_valid[0]], states[0][words[0] & encoded.mask[0]])


# Generating


GENERATE = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beams, two returned": {"num_beams": 3, "num_return_sequences": 2},
    "eager": {},
    "no cache": {"use_cache": False},
    "sampling, two returned": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("options", GENERATE.items(), ids=GENERATE)
@pytest.mark.parametrize("layers", [(1,), (1, 3)], ids=str)
def test_generating_equals_the_oracle(tiny, mixed, options, layers):
    """The ragged trap: rows that lost different numbers of tokens must be repaired at every later step."""
    name, options = options
    tiny.vlm.set_attn_implementation({"text_config": "eager" if name == "eager" else "sdpa"})
    pruner = scripted(*layers)
    torch.manual_seed(1)
    with Watch(pruner) as watch, attach(tiny.vlm, pruner, keep=RAGGED) as run:
        kept = {"max_new_tokens": STEPS, "return_dict_in_generate": True, "output_logits": True, **options}
        out = tiny.vlm.generate(**mixed, **kept)
    watch.calls = watch.calls[: len(layers)]
    gone, _ = watch.gone(encode(tiny.vlm, mixed))
    with masked(tiny.vlm, gone):
        torch.manual_seed(1)
        expected = tiny.vlm.generate(**mixed, **kept)
    tiny.vlm.set_attn_implementation({"text_config": "sdpa"})
    assert torch.equal(out.sequences, expected.sequences)
    for step, (one, two) in enumerate(zip(out.logits, expected.logits, strict=True)):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5, msg=lambda m, step=step: f"step {step}: {m}")
    assert run.stats.before == [36] * 4 and run.stats.after == [3, 20, 1, 36] and len(run.stats.tokens) == 4
    if name == "greedy":
        bare = tiny.vlm.generate(**mixed, **kept)
        assert (out.logits[0] - bare.logits[0])[:2].abs().max() > 1e-2
        lengths = [layer.get_seq_length() for layer in out.past_key_values.layers]
        real = mixed["attention_mask"].bool()
        for layer, length in enumerate(lengths):
            away = max((k for k in gone if k <= layer), default=None)
            width = real.shape[1] if away is None else int((real & ~gone[away]).sum(1).max())
            assert length == width + STEPS - 1


def test_keeping_everything_is_the_bare_model_bit_for_bit(tiny, mixed):
    for options in ({}, {"num_beams": 2, "num_return_sequences": 2}, {"use_cache": False}):
        bare = tiny.vlm.generate(**mixed, max_new_tokens=STEPS, **options)
        with attach(tiny.vlm, scripted(1, 2), keep=1.0):
            assert torch.equal(tiny.vlm.generate(**mixed, max_new_tokens=STEPS, **options), bare)
            assert torch.equal(tiny.vlm(**mixed).logits, tiny.vlm(**mixed).logits)


def test_assisted_decoding_equals_greedy(tiny):
    batch = tiny.batch([LONG + " left left left"], [[make_image(0)]])
    assistant = make_llava(num_hidden_layers=4)
    assistant.load_state_dict(tiny.vlm.state_dict())
    assistant.lm_head.weight.data += 0.3 * torch.randn(assistant.lm_head.weight.shape)
    widths = []  # of each forward: a step with candidates has more than one column
    handle = tiny.vlm.model.register_forward_pre_hook(
        lambda *call: widths.append(call[2]["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        with attach(tiny.vlm, scripted(1, 3), keep=9) as run:
            greedy = tiny.vlm.generate(**batch, max_new_tokens=12)
            assert widths[1:] == [1] * 11
            for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": assistant}):
                widths.clear()
                assert torch.equal(tiny.vlm.generate(**batch, max_new_tokens=12, **options), greedy)
                # Candidates behind the prompt, and in a later step; more than were taken, so that caches were cropped.
                assert widths[0] > batch["input_ids"].shape[1] and max(widths[1:]) > 1
                assert sum(widths) > batch["input_ids"].shape[1] + 12
    finally:
        handle.remove()
    assert run.stats.after == [9, 9, 9]
    assert not torch.equal(tiny.vlm.generate(**batch, max_new_tokens=12), greedy)


@pytest.mark.parametrize("pruners", [["scripted"], ["uniform", "scripted"], ["uniform"]], ids=str)
def test_a_second_turn_with_several_sequences(tiny, mixed, pruners):
    vlm, keeps = tiny.vlm, [9, 4][: len(pruners)]
    pruners = [scripted(1, 3) if name == "scripted" else build_pruner(name) for name in pruners]
    options = {"max_new_tokens": 2, "return_dict_in_generate": True, "output_logits": True}
    torch.manual_seed(0)
    with attach(vlm, pruners, keep=keeps):
        both = vlm.generate(**mixed, **options, do_sample=True, num_return_sequences=2)
        mask = torch.cat([mixed["attention_mask"].repeat_interleave(2, 0), torch.ones(8, 2).long()], 1)
        logits = vlm.generate(
            both.sequences, attention_mask=mask, past_key_values=both.past_key_values, **options
        ).logits
        # Each sequence as the only one of its prompt.
        for copy_ in range(2):
            alone = vlm(**mixed, use_cache=True, position_ids=(mixed["attention_mask"].cumsum(1) - 1).clamp_min(0))
            cache, own = alone.past_key_values, both.sequences[copy_::2, -2:]
            places = mask[copy_::2].cumsum(1)[:, -2:] - 1
            again = vlm(own, attention_mask=mask[copy_::2], past_key_values=cache, position_ids=places).logits[:, -1]
            close(logits[0][copy_::2], again)


@pytest.mark.parametrize("form", ["whole", "new", "forward"])
def test_a_second_turn_on_the_same_cache(tiny, mixed, form):
    """The words of the next turn, padded themselves, stand behind a prompt that has another length in each layer."""
    vlm, pruner = tiny.vlm, scripted(1, 3)
    words = tiny.batch([NEXT, " no", " red </s> USER: what ?", NEXT], [[]] * 4)
    options = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}

    def talk():
        first = vlm.generate(**mixed, **options)
        cache, held = first.past_key_values, first.sequences.shape[1] - 1
        ids = torch.cat([first.sequences, words["input_ids"]], 1)
        mask = torch.cat([mixed["attention_mask"], torch.ones(4, 4).long(), words["attention_mask"]], 1)
        if form == "forward":
            out = vlm(input_ids=ids[:, held:], attention_mask=mask, past_key_values=cache)
            step = vlm(
                input_ids=out.logits[:, -1:].argmax(-1),
                attention_mask=torch.cat([mask, torch.ones(4, 1).long()], 1),
                past_key_values=cache,
            )
            return [out.logits[:, -1], step.logits[:, -1]]
        own = ids if form == "whole" else ids[:, held:]
        return vlm.generate(own, attention_mask=mask, past_key_values=cache, **options).logits

    with torch.no_grad():
        with Watch(pruner) as watch, attach(vlm, pruner, keep=RAGGED) as run:
            logits = talk()
        with masked(vlm, watch.gone(encode(vlm, mixed))[0]):
            expected = talk()
    for one, two in zip(logits, expected, strict=True):
        close(one, two)
    assert run.stats.after == [3, 20, 1, 36]


def test_compact_positions_are_numbered_anew_behind_each_cut(tiny, mixed):
    vlm, pruner = tiny.vlm, scripted(1, 3)
    options = {"max_new_tokens": STEPS, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad(), Watch(pruner) as watch:
        with attach(vlm, pruner, keep=RAGGED, positions="compact"):
            out = vlm.generate(**mixed, **options)
        gone = watch.gone(encode(vlm, mixed))[0]
        with masked(vlm, gone, compact=True):
            expected = vlm.generate(**mixed, **options)
        with masked(vlm, gone):
            original = vlm.generate(**mixed, **options)
    for one, two in zip(out.logits, expected.logits, strict=True):
        close(one, two)
    assert (expected.logits[0] - original.logits[0]).abs().max() > 1e-3


def test_counts_that_a_pruner_chooses_itself(tiny, mixed):
    """Not exact: as many as it likes, another number for every image, none of one."""

    class Threshold(Scripted):
        exact = False

        def reduce(self, inputs, keep):
            scores = self.score(inputs).masked_fill(~inputs.valid, -1)
            scores[1] = -1
            counts = (scores > 0.4).sum(1)
            assert len(set(counts.tolist())) > 1 or inputs.step
            return super().reduce(inputs, counts)

    pruner = Threshold().eval()
    pruner.layers = (1, 2)
    with torch.no_grad(), Watch(pruner) as watch:
        with attach(tiny.vlm, pruner, keep=5):
            out = tiny.vlm.generate(**mixed, max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
        with masked(tiny.vlm, watch.gone(encode(tiny.vlm, mixed))[0]):
            expected = tiny.vlm.generate(**mixed, max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
    for one, two in zip(out.logits, expected.logits, strict=True):
        close(one, two)


# Several pruners


class Together(Pruner):
    """A prompt-stage and a layer-stage pruner in one."""

    name = "together"

    def __init__(self, *parts):
        super().__init__()
        self.members = torch.nn.ModuleList(parts)

    def parts(self, keep):
        return tuple(zip(self.members, (18, keep), strict=True))


def test_stages_work_together(tiny, mixed):
    vlm, inner = tiny.vlm, scripted(1, 2)
    first = build_pruner("uniform").eval()
    with torch.no_grad(), Watch(inner) as watch:
        encoded = encode(vlm, mixed)
        run = run_pruned(vlm, encoded, Together(first, inner), 4)
        with attach(vlm, [first, inner], keep=[18, 4]) as listed:
            assert torch.equal(vlm(**mixed).logits, run.host.logits)
            sequences = vlm.generate(**mixed, max_new_tokens=3)
        with attach(vlm, Together(first, inner), keep=4) as combined:
            assert torch.equal(vlm.generate(**mixed, max_new_tokens=3), sequences)
    assert torch.equal(sequences[:, : mixed["input_ids"].shape[1]], mixed["input_ids"])
    # By hand: what the first one leaves is a prompt of its own.
    left = first(encoded.inputs, 18)
    inputs = watch.calls[0][0]
    assert torch.equal(inputs.cells, encoded.inputs.cells.gather(1, left.index[..., None].expand(-1, -1, 3)))
    kept = left.index.gather(1, watch.calls[0][1].index).gather(1, watch.calls[1][1].index)
    assert torch.equal(run.output.index, kept)
    seen = encoded.mask.clone()
    for row, slots in zip(encoded.sample, encoded.slots, strict=True):
        seen[row, slots] = False
    for row, slots, index in zip(encoded.sample, encoded.slots, left.index, strict=True):
        seen[row, slots[index]] = True
    gone, away = {0: encoded.mask & ~seen}, encoded.mask & ~seen
    slots = encoded.slots.gather(1, left.index)
    for inputs, output in watch.calls[:2]:
        away = away.clone()
        for row, found in zip(encoded.sample, slots, strict=True):
            away[row, found] = True
        slots = slots.gather(1, output.index)
        for row, found in zip(encoded.sample, slots, strict=True):
            away[row, found] = False
        gone[inputs.layer] = away
    with masked(vlm, gone):
        close(run.host.logits[:, -1], full_forward(vlm, encoded).logits[:, -1])
    for stats in (listed.stats, combined.stats):
        assert [(s.pruner, s.layer) for s in stats.stages] == [("uniform", None), ("scripted", 1), ("scripted", 2)]
        assert stats.before[:4] == [36] * 4 and stats.stages[1].before[:4] == [18] * 4 and stats.after[:4] == [4] * 4
    middle = combined.stats.stages[1].after[0]
    assert combined.stats.tokens[0] == run.tokens[0] == (18 + middle + 2 * 4) / 4


def test_vision_prompt_and_layer_stage_in_one(tiny, mixed):
    vlm, inner = tiny.vlm, scripted(1, 2)
    early = [(build_pruner("tome").eval(), 24), (build_pruner("uniform").eval(), 12)]
    with torch.no_grad():
        with Watch(inner) as watch, attach(vlm, [*(pruner for pruner, _ in early), inner], keep=[24, 12, 4]) as run:
            logits = vlm(**mixed).logits[:, -1]
            sequences = vlm.generate(**mixed, max_new_tokens=3)
        # What the first two leave is a prompt that the bare model reads, not looking at what the third drops.
        left = reduce_early(vlm, encode(vlm, mixed), early, "original").encoded
        watch.calls = watch.calls[:2]
        with masked(vlm, watch.gone(left)[0]):
            close(logits, full_forward(vlm, left).logits[:, -1])
    assert torch.equal(sequences[:, : mixed["input_ids"].shape[1]], mixed["input_ids"])
    assert [stage.after[0] for stage in run.stats.stages] == [24, 12, 7, 4] and run.stats.before == [36] * 8
    assert run.stats.tokens[0] == (12 + 7 + 2 * 4) / 4


def test_adapters_of_all_pruners_are_on_while_attached(tiny):
    states = []

    class Adapting(Scripted):
        def adapt(self, vlm):
            class Change:
                def __enter__(self):
                    states.append("on")

                def __exit__(self, *_):
                    states.append("off")

            return Change()

    pruner = Adapting()
    pruner.layers = (1,)
    with attach(tiny.vlm, pruner, keep=3):
        assert states == ["on"]
    assert states == ["on", "off"]


# Training


def test_gates_equal_the_drop_and_reach_every_stage(tiny, mixed):
    vlm = tiny.vlm
    encoded = encode(vlm, mixed)
    for pruner in (scripted(2), scripted(1, 3), Together(Ranked(), scripted(1, 3))):
        hard = run_pruned(vlm, encoded, pruner.eval(), RAGGED)
        host, outputs = run_gated(vlm, encoded, pruner.train(), RAGGED, log_eps=1e-8)
        torch.testing.assert_close(host.logits[:, -1], hard.host.logits[:, -1], rtol=0, atol=5e-5)
        assert torch.equal(outputs[-1].index.sort()[0], hard.output.index.sort()[0])
        assert host.logits.shape[1] == mixed["input_ids"].shape[1]
        assert (host.logits - full_forward(vlm, encoded).logits)[:2, -1].abs().max() > 1e-3


class Ranked(Pruner):
    """Keeps the tokens with the largest norm."""

    name = "ranked"

    def score(self, inputs):
        return inputs.features.norm(dim=-1)


class Weighted(Scripted):
    """Soft gates from a learned weight a stage."""

    exact = False

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.layers = (1, 3)

    def reduce(self, inputs, keep):
        output = super().reduce(inputs, keep)
        gates = (self.score(inputs) + self.weight[inputs.step]).sigmoid() * inputs.valid
        return PruneOutput(output.index, output.valid, gates=gates) if self.training else output


@pytest.mark.parametrize("checkpointing", [False, True])
def test_soft_gates_multiply_and_get_exact_gradients(mixed, checkpointing):
    vlm = make_llava(num_hidden_layers=4).double()
    if checkpointing:
        vlm.gradient_checkpointing_enable()
        vlm.train()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in mixed.items()}
    encoded, pruner = encode(vlm, batch), Weighted().double().train()

    def loss():
        host, outputs = run_gated(vlm, encoded, pruner, 5)
        assert all(output.gates.shape == (4, 36) for output in outputs)  # what is ajar is still there
        return host.logits[:, -1].square().sum()

    loss().backward()
    for number in range(2):
        with torch.no_grad():
            pruner.weight[number] += 0.05  # norms compute in float32 whatever the type of the model, so no smaller
            high = loss()
            pruner.weight[number] -= 0.1
            low = loss()
            pruner.weight[number] += 0.05
        assert float(pruner.weight.grad[number]) == pytest.approx(float(high - low) / 0.1, rel=0.02)
        assert pruner.weight.grad[number].abs() > 1e-6


def test_what_has_no_gates_is_refused(tiny, mixed):
    encoded = encode(tiny.vlm, mixed)
    with pytest.raises(PruneZooError, match="'scripted' gave no gates"):
        run_gated(tiny.vlm, encoded, scripted(1), 5)
    with pytest.raises(PruneZooError, match="'uniform' gave no gates"):
        run_gated(tiny.vlm, encoded, build_pruner("uniform").train(), 5)


def test_hooks_run_once_under_gradient_checkpointing(mixed):
    vlm = make_llava(num_hidden_layers=4)
    projector = vlm.model.multi_modal_projector.linear_2.weight.requires_grad_()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            vlm.gradient_checkpointing_enable()
        vlm.train()
        projector.grad, pruner = None, scripted(1, 3)
        with attach(vlm, pruner, keep=RAGGED) as run, Watch(pruner) as watch:
            vlm(**mixed, use_cache=False).logits[:, -1].sum().backward()
        assert len(watch.calls) == 2 and run.stats.after == RAGGED.tolist()
        gradients.append(projector.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients)


# Hosts


def test_bfloat16_agrees_with_float32(tiny, mixed):
    vlm = make_llava(num_hidden_layers=4)
    vlm.load_state_dict(tiny.vlm.state_dict())
    rough = {k: v.bfloat16() if v.is_floating_point() else v for k, v in mixed.items()}
    with attach(tiny.vlm, scripted(1, 3), keep=9):
        exact = tiny.vlm(**mixed).logits[:, -1]
    with attach(vlm.bfloat16(), scripted(1, 3), keep=9):
        logits = vlm(**rough).logits[:, -1]
        assert vlm.generate(**rough, max_new_tokens=3).shape[1] == mixed["input_ids"].shape[1] + 3
    assert logits.dtype == torch.bfloat16
    with torch.no_grad():
        plain = (vlm(**rough).logits[:, -1].float() - tiny.vlm(**mixed).logits[:, -1]).abs().max()
    assert (logits.float() - exact).abs().max() < 2 * plain  # as far apart as the bare models are


def test_peft_models(tiny, mixed):
    vlm = make_llava(num_hidden_layers=4)
    peft = get_peft_model(vlm, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    bare = peft(**mixed).logits
    with attach(peft, scripted(1, 3), keep=9) as run:
        short, sequences = peft(**mixed).logits, peft.generate(**mixed, max_new_tokens=3)
    assert run.stats.after == [9] * 8 and short.shape[1] < bare.shape[1]
    with attach(peft.get_base_model(), scripted(1, 3), keep=9):
        assert torch.equal(vlm(**mixed).logits, short) and torch.equal(
            vlm.generate(**mixed, max_new_tokens=3), sequences
        )
    with peft.disable_adapter(), attach(peft, scripted(1, 3), keep=9):
        assert (peft(**mixed).logits[:, -1] - short[:, -1]).abs().max() > 1e-4
    assert torch.equal(peft(**mixed).logits, bare)


def test_compiled_models(tiny):
    """Two layers, one prompt and one step: tracing is slow."""
    vlm, batch = make_llava(), tiny.batch([LONG, SHORT], [[make_image(0)], [make_image(1)]])
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 1).long()], 1)

    def talk():
        with torch.no_grad(), attach(vlm, scripted(1), keep=RAGGED[:2]):
            out = vlm(**batch, use_cache=True)
            return out.logits, vlm(mask[:, -1:], attention_mask=mask, past_key_values=out.past_key_values).logits

    expected = talk()
    vlm.compile(backend="eager")
    for one, two in zip(talk(), expected, strict=True):
        close(one, two)
    torch.compiler.reset()


# Refusals


def test_what_would_fail_silently_is_refused(tiny, mixed):
    vlm, pruner = tiny.vlm, scripted(1, 3)
    bare = vlm(**mixed).logits
    options = {"max_new_tokens": 2, "return_dict_in_generate": True}
    with attach(vlm, pruner, keep=RAGGED):
        with pytest.raises(PruneZooError, match="static one cannot be"):
            vlm.generate(**mixed, **options, cache_implementation="static")
        with pytest.raises(PruneZooError, match="leave prefill_chunk_size unset"):
            vlm.generate(**mixed, **options, prefill_chunk_size=16)
        out = vlm.generate(**mixed, **options)
        cache, last = out.past_key_values, out.sequences[:, -1:]
        mask = torch.cat([mixed["attention_mask"], torch.ones(4, 2).long()], 1)
        with pytest.raises(PruneZooError, match="images cannot be added to a filled cache"):
            vlm(**mixed, past_key_values=cache)
        with pytest.raises(PruneZooError, match="attention_mask of the whole conversation"):
            vlm(last, attention_mask=mask[:, -3:], past_key_values=cache)
        with pytest.raises(PruneZooError, match="pruned elsewhere"):
            vlm(last, attention_mask=mask, past_key_values=copy.deepcopy(cache))
        fewer = vlm.generate(**mixed, **options).past_key_values
        fewer.batch_select_indices(torch.tensor([0, 1]))
        with pytest.raises(PruneZooError, match="not as the pruner left it"):
            vlm(last[:2], attention_mask=mask[:2], past_key_values=fewer)
        cache.crop(-8)
        with pytest.raises(PruneZooError, match="cropped into its pruned prompt"):
            vlm(last, attention_mask=mask, past_key_values=cache)
    assert torch.equal(vlm(**mixed).logits, bare)


def test_a_failed_call_does_not_reach_into_the_next(tiny, mixed):
    vlm, text = tiny.vlm, tiny.batch([NONE], [[]])
    bare = vlm(**text).logits
    with attach(vlm, ["uniform", scripted(1)], keep=[9, 3]) as run:
        for options in ({"typo": 1}, {"cache_implementation": "static"}, {"logits_processor": [1]}):
            with pytest.raises((ValueError, AttributeError, PruneZooError)):
                vlm.generate(**mixed, **options)
            assert torch.equal(vlm(**text).logits, bare)
    assert run.stats.before == run.stats.tokens == [] or len(run.stats.before) == 4  # the last failed behind the prompt


def test_tuples_are_remembered_too(tiny, mixed):
    vlm, mask = tiny.vlm, torch.cat([mixed["attention_mask"], torch.ones(4, 1).long()], 1)
    for pruner in ("uniform", scripted(1, 3)):
        with attach(vlm, pruner, keep=5) as run:
            logits, cache = vlm(**mixed, use_cache=True, return_dict=False)[:2]
            step = vlm(mixed["input_ids"][:, -1:], attention_mask=mask, past_key_values=cache).logits
            other = vlm(**mixed, use_cache=True)
            again = vlm(mixed["input_ids"][:, -1:], attention_mask=mask, past_key_values=other.past_key_values).logits
            assert torch.equal(logits, other.logits) and torch.equal(step, again)
        assert run.stats.kv_bytes_saved > 0


def test_other_conversations_pass_untouched(tiny, mixed):
    vlm, text = tiny.vlm, tiny.batch([NONE], [[]])
    whole = vlm.generate(**mixed, max_new_tokens=3, return_dict_in_generate=True)
    expected = vlm.generate(**text, max_new_tokens=4)
    mask = torch.cat([mixed["attention_mask"], torch.ones(4, 3).long()], 1)
    spare = copy.deepcopy(whole.past_key_values)
    step = vlm(whole.sequences[:, -1:], attention_mask=mask, past_key_values=spare).logits
    with attach(vlm, scripted(1, 3), keep=5) as run:
        vlm(**mixed)
        assert torch.equal(vlm.generate(**text, max_new_tokens=4), expected)
        assert torch.equal(vlm(**text).logits[:, -1].argmax(-1), expected[:, text["input_ids"].shape[1]])
        other = vlm(whole.sequences[:, -1:], attention_mask=mask, past_key_values=whole.past_key_values)
        assert torch.equal(other.logits, step)
    assert len(run.stats.before) == 4


def test_models_and_stages_that_do_not_fit_are_refused(tiny):
    for layers, message in (
        ((), "configure layers that it has"),
        ((4,), r"layers \[4\], the decoder has 4"),
        ((2, 1), "ascending"),
        ((0, 0), "needs all image tokens in front of layer 1 .*: configure layers from 1 on"),
    ):
        with pytest.raises(PruneZooError, match=message):
            attach(tiny.vlm, scripted(*layers), keep=3)
    late = scripted(1, 3)
    late.needs = ("last_attention@2",)
    with pytest.raises(PruneZooError, match="'last_attention@2' in front of layer 1: that layer runs later"):
        attach(tiny.vlm, late, keep=3)
    with pytest.raises(PruneZooError, match=r"ranked \(prompt\), ranked \(prompt\)"):
        attach(tiny.vlm, [Ranked(), Ranked()], keep=[3, 3])
    with pytest.raises(PruneZooError, match="vision, prompt, layer in turn"):
        attach(tiny.vlm, [scripted(1), Ranked()], keep=[3, 3])
    with pytest.raises(PruneZooError, match="2 pruners need a list of 2 keeps, got 3"):
        attach(tiny.vlm, [Ranked(), scripted(1)], keep=3)
    flex = make_llava(num_hidden_layers=4)
    flex.config.text_config._attn_implementation = "flex_attention"
    with pytest.raises(PruneZooError, match="'flex_attention' cannot be cut"):
        attach(flex, scripted(1), keep=3)


def test_flash_attention_is_given_masks_of_two_dimensions(tiny, mixed):
    """The kernel is not here; what it would be given is: no gaps in the positions, (B, S) masks that hide filler."""
    vlm, given = make_llava(num_hidden_layers=4), {}
    vlm.load_state_dict(tiny.vlm.state_dict())
    pruner = scripted(1, 3)
    with attach(vlm, pruner, keep=RAGGED) as run:
        encoded = encode(vlm, mixed)
        vlm.config.text_config._attn_implementation = "flash_attention_2"
        prompt = run.layers.prefill(encoded)
        hidden = torch.randn(4, encoded.mask.shape[1], 32)
        rotary = run.layers.decoder.rotary(hidden, torch.arange(hidden.shape[1])[None])
        for layer in range(4):
            kwargs = {"attention_mask": mixed["attention_mask"].bool(), "position_embeddings": rotary,
                      "position_ids": torch.arange(hidden.shape[1])[None], "past_key_values": None}  # fmt: skip
            hidden, given[layer] = prompt.layer(layer, hidden, kwargs)
    for layer in (1, 2, 3):
        mask, positions = given[layer]["attention_mask"], given[layer]["position_ids"]
        assert mask.shape == (4, positions.shape[1]) and mask.dtype == torch.bool
        assert torch.equal(positions[0], torch.arange(positions.shape[1]))
    words = int((mixed["attention_mask"].bool() & (mixed["input_ids"] != 4))[1].sum())
    assert int(given[3]["attention_mask"][1].sum()) == words + 20 + 1
    with attach(vlm, scripted(1), keep=3) as run:
        prompt = run.layers.prefill(encoded)
        kwargs["attention_mask"], hidden = torch.ones(4, 1, 9, 9), torch.randn(4, encoded.mask.shape[1], 32)
        with pytest.raises(PruneZooError, match="no mask of four dimensions"):
            prompt.layer(1, hidden, kwargs)
    window = SimpleNamespace(kernel="flash_attention_2", flash=True, window=lambda layer: 4)
    columns = torch.arange(6)[None]
    with pytest.raises(PruneZooError, match="counts its window over the tokens left"):
        cut_mask(window, 0, hidden, columns, columns, columns >= 0, True)


# What it tells


def test_stats_print_tokens_and_bytes(tiny, mixed):
    vlm = tiny.vlm
    with attach(vlm, scripted(1, 3), keep=6) as run:
        assert str(run.stats).splitlines()[0] == "layer stage, layer 1: no images so far"
        cache = vlm(**mixed, use_cache=True).past_key_values
    whole = vlm(**mixed, use_cache=True).past_key_values

    def size(cache):
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    assert run.stats.kv_bytes_saved == size(whole) - size(cache) > 0
    lines = str(run.stats).splitlines()
    assert lines[1].startswith("layer stage, layer 3: 4 images, 60 -> 24 tokens (40.0 %), ")
    assert (
        lines[2].startswith("18.0 tokens an image, mean over decoder layers; ") and "KiB of KV cache saved" in lines[2]
    )
    assert run.stats.seconds > 0
    with attach(vlm, "uniform", keep=6) as run:
        cache = vlm(**mixed, use_cache=True).past_key_values
    assert run.stats.kv_bytes_saved == size(whole) - size(cache) > 0 and run.stats.tokens == [6.0] * 4


# The prompt stage on a cache


@pytest.mark.parametrize("form", ["whole", "new", "forward"])
@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("layered", [False, True])
def test_a_second_turn_on_a_shortened_prompt(tiny, mixed, form, positions, layered):
    """The same dialogue, with the prompt's pictures pruned first, against all of it in one prompt."""
    vlm = tiny.vlm
    pruners, keeps = ([build_pruner("uniform"), scripted(1, 3)], [9, 5]) if layered else (["uniform"], [9])
    words = tiny.batch([NEXT, " no", " red </s> USER: what ?", NEXT], [[]] * 4)
    with torch.no_grad(), attach(vlm, pruners, keep=keeps, positions=positions):
        options = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}
        first = vlm.generate(**mixed, **options)
        held = first.sequences.shape[1] - 1
        ids = torch.cat([first.sequences, words["input_ids"]], 1)
        mask = torch.cat([mixed["attention_mask"], torch.ones(4, 3).long(), words["attention_mask"]], 1)
        if form == "forward":
            logits = vlm(ids[:, held:], attention_mask=mask, past_key_values=first.past_key_values).logits[:, -1]
        else:
            own = ids if form == "whole" else ids[:, held:]
            out = vlm.generate(own, attention_mask=mask, past_key_values=first.past_key_values, **options)
            logits = out.logits[0]
            assert torch.equal(out.sequences[:, : own.shape[1]], own)
            third = torch.cat([out.sequences, words["input_ids"]], 1)
            longer = torch.cat([mask, torch.ones(4, 3).long(), words["attention_mask"]], 1)
            if form == "whole":
                again = vlm.generate(third, attention_mask=longer, past_key_values=out.past_key_values, **options)
                assert torch.equal(again.sequences[:, : third.shape[1]], third)
        if not layered:
            whole = {**mixed, "input_ids": ids, "attention_mask": mask}
            expected = vlm.generate(**whole, **options).logits[0]
            # A direct call counts columns where `generate` counts tokens: padding of the new words moves positions.
            rows = slice(None) if form != "forward" else words["attention_mask"].all(1)
            close(logits[rows], expected[rows])
