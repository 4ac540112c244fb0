"""What every registered pruner promises. A new method is tested here the moment it is registered; nothing to add."""

import dataclasses

import pytest
import torch
from input_oracle import blind_tower
from layer_oracle import Watch, masked
from made_inputs import ALL, DIM, GRIDS, TEXT, build, make_inputs, same, take_rows
from return_oracle import away_by_layer, by_layers, embedded
from tiny_llava import make_image

from prunezoo import PruneInputs, PrunerConfig, PruneZooError, attach, encode, load_pruner
from prunezoo.core.budgets import budget
from prunezoo.core.contract import Pruner
from prunezoo.core.registry import pruner_class, register_pruner
from prunezoo.host import encode_needs, full_forward, run_pruned
from prunezoo.learned.aptp import APTP
from prunezoo.learned.budget import BudgetPolicy
from prunezoo.learned.hourglass import Hourglass

EXACT = tuple(name for name in ALL if pruner_class(name).exact)
OUT_OF_RANGE = (
    0,
    -3,
    0.0,
    -0.5,
    1.5,
    float("nan"),
    float("inf"),
    True,
    "many",
    torch.tensor([1.0]),
    torch.tensor([0, 1, 1]),
)
LEARNED = tuple(
    name
    for name in ALL
    if any(True for _ in pruner_class(name)(**pruner_class(name).tiny_config(DIM, TEXT)).parameters())
)


@pytest.fixture(params=ALL)
def name(request):
    return request.param


@pytest.mark.parametrize("keep", [1, 7, 20, 1000, 0.01, 0.5, 1.0, torch.tensor([1, 20, 9])], ids=str)
def test_counts_order_and_padding(name, keep):
    inputs, pruner = make_inputs(pad=3), build(name)
    available = inputs.valid.sum(1)
    output = pruner(inputs, keep)
    if pruner.exact:
        assert torch.equal(output.count, budget(keep, available))
        if isinstance(keep, float):
            assert output.count.tolist() == [max(1, round(keep * n)) for n in available.tolist()]
    tokens = output.kept_features(inputs)
    for row, n in enumerate(available.tolist()):
        k = int(output.count[row])
        kept = output.index[row, :k]
        assert not output.valid[row, k:].any() and not output.index[row, k:].any()
        assert (kept.diff() > 0).all() and inputs.valid[row, kept].all() and k <= n
        assert tokens[row, :k].isfinite().all()


def test_permuting_the_batch_permutes_the_output(name):
    inputs, pruner, order = make_inputs(), build(name), [2, 0, 1]
    moved = take_rows(inputs, order)
    one, two = pruner(inputs, 0.4), pruner(moved, 0.4)
    for new, old in enumerate(order):
        same(one, two, old, new, one.kept_features(inputs), two.kept_features(moved))


def test_more_padding_changes_nothing(name):
    plain, padded, pruner = make_inputs(), make_inputs(pad=9, text_pad=4), build(name)
    one, two = pruner(plain, 6), pruner(padded, 6)
    for row in range(len(GRIDS)):
        same(one, two, row, row, one.kept_features(plain), two.kept_features(padded))


def test_ragged_batch_equals_singles(name):
    inputs, pruner = make_inputs(), build(name)
    batch = pruner(inputs, 0.4)
    for row, (h, w) in enumerate(GRIDS):
        single = take_rows(inputs, [row], h * w, 5 - row)
        alone = pruner(single, 0.4)
        same(batch, alone, row, 0, batch.kept_features(inputs), alone.kept_features(single))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_tokens_pass_unchanged(name, dtype):
    """Whatever the type of the pruner's weights."""
    inputs, pruner = make_inputs(), build(name).to(dtype)
    output = pruner(inputs, 1.0)
    if pruner.exact or name == "full":
        assert torch.equal(output.valid, inputs.valid)
        assert torch.equal(output.kept_features(inputs)[inputs.valid], inputs.features[inputs.valid])


def test_deterministic_in_eval(name):
    inputs = make_inputs()
    one, two = build(name)(inputs, 0.4), build(name)(inputs, 0.4)
    assert torch.equal(one.index, two.index) and one.gates is None
    assert torch.equal(one.kept_features(inputs), two.kept_features(inputs))
    if one.scores is not None:
        assert torch.equal(one.scores, two.scores)


def test_batch_of_text_gives_nothing(name):
    inputs = PruneInputs(torch.zeros(0, 0, DIM), torch.zeros(0, 0, dtype=torch.bool), torch.zeros(0, 0, 3).long())
    assert build(name)(inputs, 5).index.shape == (0, 0)


def test_bfloat16_agrees_with_float32(name):
    # Inputs that bfloat16 can hold, so only the computation differs. Eight bits a value leave near ties undecided: we
    # ask that nine tenths of the kept tokens are the same.
    rough = make_inputs(grids=((6, 6), (6, 6))).to(torch.bfloat16)
    exact = rough.to(torch.float32)
    one, two = build(name)(exact, 18), build(name).bfloat16()(rough, 18)
    for row in range(2):
        first, second = set(one.index[row].tolist()), set(two.index[row].tolist())
        assert len(first & second) >= 0.9 * len(first)
    if torch.equal(one.index, two.index):
        torch.testing.assert_close(one.kept_features(exact), two.kept_features(rough).float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("keep", OUT_OF_RANGE, ids=str)
def test_keep_out_of_range_is_an_error(name, keep):
    with pytest.raises(PruneZooError, match="keep"):
        build(name)(make_inputs(), keep)


def test_unknown_config_key_is_an_error_that_names_it(name):
    with pytest.raises(PruneZooError, match="unknown config key 'tempretaure'"):
        pruner_class(name)(tempretaure=1.0)


def test_static_rules(name):
    pruner = build(name)
    assert pruner.stage in ("input", "vision", "prompt", "layer")
    assert pruner.stage != "input" or not pruner.needs
    assert pruner.stage == "layer" or not pruner.comes_back
    assert pruner.stage == "vision" or not pruner.restore
    assert "module" not in dict(pruner.named_modules())
    assert dataclasses.is_dataclass(pruner.config_class) and pruner.config_class.__dataclass_params__.frozen
    assert PrunerConfig.from_dict.__func__(type(pruner.config), pruner.config.to_dict()) == pruner.config
    assert (pruner_class(name).__doc__ or "").strip()


def test_saved_and_loaded_gives_the_same_bits(name, tmp_path):
    inputs, pruner = make_inputs(), build(name, seed=3)
    loaded = load_pruner(pruner.save_pretrained(tmp_path / name))
    assert type(loaded) is type(pruner) and not loaded.training and loaded.config == pruner.config
    one, two = pruner(inputs, 0.4), loaded(inputs, 0.4)
    assert torch.equal(one.index, two.index) and torch.equal(one.kept_features(inputs), two.kept_features(inputs))


@pytest.mark.parametrize("learned", LEARNED)
def test_every_parameter_gets_a_gradient(learned):
    pruner, inputs = build(learned).train(), make_inputs()
    optimizer = torch.optim.SGD(pruner.parameters(), lr=0.1)
    moved = set()
    # Three steps, since what stands behind a map that starts at zero gets its first gradient only after one.
    for _ in range(3):
        optimizer.zero_grad()
        output = pruner(inputs, 0.4)
        loss = sum(pruner.loss_terms(output).values(), torch.zeros(()))
        if output.gates is not None:
            assert torch.equal(output.gates.detach(), output.gates.detach().round())
            assert torch.equal(output.gates.sum(1), output.count.float())
            loss = loss + (output.gates * torch.randn_like(output.gates)).sum()
        if output.features is not None and output.features.requires_grad:
            loss = loss + output.features[output.valid].square().sum()
        if isinstance(pruner, BudgetPolicy | APTP):  # it learns from what its budgets earned, not through what was kept
            loss = loss + pruner.values(inputs).square().sum()
        if isinstance(pruner, Hourglass):  # a head of it reads what the language model made of the tokens
            loss = loss + pruner.recovered(inputs, output, output.features.detach())[inputs.valid].square().sum()
        loss.backward()
        for key, parameter in pruner.named_parameters():
            if parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0:
                moved.add(key)
        optimizer.step()
    assert moved == {key for key, _ in pruner.named_parameters()}


@pytest.mark.parametrize("learned", LEARNED)
def test_scores_are_checked_for_nan(learned):
    pruner = build(learned)
    with torch.no_grad():
        for parameter in pruner.parameters():
            parameter.fill_(torch.nan)
    with pytest.raises(PruneZooError, match="NaN"):
        pruner(make_inputs(), 3)


@pytest.mark.parametrize("learned", LEARNED)
def test_learned_methods_are_not_loaded_by_name(learned):
    with pytest.raises(PruneZooError, match=f"'{learned}'"):
        load_pruner(learned)


# On a tiny model


def ragged_batch(tiny):
    prompts = ["<s> USER: <image> what color is the ball ? ASSISTANT:", "<s> USER: <image> what ? ASSISTANT:"]
    return tiny.batch(prompts, [[make_image(0)], [make_image(1)]])


@pytest.mark.parametrize("exact", [*EXACT, "full"])
def test_keeping_everything_is_the_bare_model(exact, deep_llava):
    vlm, batch = deep_llava.vlm, ragged_batch(deep_llava)
    pruner = build(exact, vlm=vlm)
    with torch.no_grad():
        logits, sequences = vlm(**batch).logits, vlm.generate(**batch, max_new_tokens=5)
        with attach(vlm, pruner, keep=1.0) as run:
            run.memory.streams = ("left", "right")  # for who remembers
            assert torch.equal(vlm(**batch).logits, logits)
            assert torch.equal(vlm.generate(**batch, max_new_tokens=5), sequences)


def test_keeping_half_equals_a_masking_oracle(name, deep_llava):
    """Nothing shorter: the dropped tokens stay and no one may look at them; merged ones stand at their anchors."""
    vlm, batch = deep_llava.vlm, ragged_batch(deep_llava)
    pruner = build(name, vlm=vlm)
    with torch.no_grad():
        encoded = encode(vlm, batch, encode_needs(pruner))
        with Watch(pruner) as watch:
            run = run_pruned(vlm, encoded, pruner, 0.5)
        if pruner.comes_back:
            away = away_by_layer(watch.calls, encoded)
            oracle = by_layers(vlm, embedded(vlm, encoded), encoded.mask, away, pruner.comes_back)[:, -1]
        elif pruner.stage == "layer":
            with masked(vlm, *watch.gone(encoded)):
                oracle = full_forward(vlm, encoded).logits[:, -1]
        elif pruner.stage == "input":
            alive = torch.zeros_like(encoded.inputs.valid).scatter(1, run.output.index, True)
            with blind_tower(vlm, [alive]):
                oracle = masked_prompt(vlm, encode(vlm, batch), run.output).logits[:, -1]
        else:
            oracle = masked_prompt(vlm, encoded, run.output).logits[:, -1]
        bare = vlm(**batch).logits[:, -1]
    logits = run.host.logits[:, -1]
    torch.testing.assert_close(logits, oracle, rtol=0, atol=2e-5)
    if name != "full":
        assert (logits - bare).abs().max() > 1e-3


def masked_prompt(vlm, encoded, output):
    embeds = vlm.get_input_embeddings()(encoded.batch["input_ids"])
    seen = encoded.mask.clone()
    tokens = output.kept_features(encoded.inputs)
    for row, slots in zip(encoded.sample.tolist(), encoded.slots, strict=True):
        seen[row, slots] = False
        kept = slots[output.index[row, : output.count[row]]]
        seen[row, kept] = True
        embeds[row, kept] = tokens[row, : output.count[row]]
    mask = torch.ones(seen.shape[1], seen.shape[1], dtype=torch.bool).tril() & seen[:, None, None]
    return vlm(inputs_embeds=embeds, attention_mask=mask)


def test_detaching_restores_the_model(name, deep_llava):
    vlm, batch = deep_llava.vlm, ragged_batch(deep_llava)
    pruner = build(name, vlm=vlm).train()
    for part in [*pruner.children()][:1]:
        part.eval()
    modes = [part.training for part in pruner.modules()]
    before, state = vlm(**batch).logits, set(vars(vlm))
    hooks = [len(vars(m)["_forward_hooks"]) + len(vars(m)["_forward_pre_hooks"]) for m in vlm.modules()]
    with attach(vlm, pruner, keep=4) as run:
        assert not pruner.training
        run.memory.streams = ("left", "right")  # for who remembers
        vlm(**batch)
    assert torch.equal(vlm(**batch).logits, before) and set(vars(vlm)) == state
    assert pruner.training and [part.training for part in pruner.modules()] == modes
    assert [len(vars(m)["_forward_hooks"]) + len(vars(m)["_forward_pre_hooks"]) for m in vlm.modules()] == hooks
    left = 36 if pruner.restore else 4
    assert run.stats.before == [36, 36] and (not pruner.exact or run.stats.after == [left, left])


# The registry and the base class


class _Broken(Pruner):
    """Breaks the promise that its behaviour names."""

    behaviour = "nan"

    def score(self, inputs):
        if self.behaviour == "nan":
            return torch.full(inputs.valid.shape, torch.nan)
        return torch.zeros(3)


def test_nan_score_and_wrong_shape_are_errors():
    pruner = _Broken()
    with pytest.raises(PruneZooError, match="scored NaN"):
        pruner(make_inputs(), 3)
    pruner.behaviour = "shape"
    with pytest.raises(PruneZooError, match=r"must return \(B, N\)"):
        pruner(make_inputs(), 3)


@pytest.mark.parametrize("bad", ["Upper", "trailing_", "1st", "with-dash", "full"])
def test_bad_or_taken_names_are_refused(bad):
    with pytest.raises(PruneZooError, match=bad):
        register_pruner(bad)(_Broken)


def test_a_class_without_a_method_of_its_own_is_refused():
    with pytest.raises(PruneZooError, match=r"score\(\) or reduce\(\)"):
        register_pruner("empty")(type("Empty", (Pruner,), {}))


def test_unknown_pruner_names_the_nearest_one():
    with pytest.raises(PruneZooError, match=r"did you mean 'divprune'"):
        pruner_class("divprun")


def test_missing_signal_names_the_remedy():
    inputs = dataclasses.replace(make_inputs(), signals={})
    with pytest.raises(PruneZooError, match="cls_attention"):
        build("fastervlm")(inputs, 3)
