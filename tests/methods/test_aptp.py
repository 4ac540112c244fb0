"""APTP against loops over rungs, codes and tokens: gates, budgets, assignment; and its training."""

import math

import pytest
import torch
from made_inputs import DIM, TEXT, build, make_inputs
from tiny_llava import make_image

from prunezoo import PruneZooError, attach, build_pruner, load_pruner
from prunezoo.learned.aptp import falling_gates, nearness, opened
from trainers.training.routed_budgets import RoutedBudgetsModule, balanced, contrast

RUNGS = (0.1, 0.3, 0.6, 1.0)
PROMPTS = ["<s> USER: <image> what color ? ASSISTANT: red", "<s> USER: <image> what is above the ball ? ASSISTANT: red"]


def small(**options):
    torch.manual_seed(0)
    return build_pruner("aptp", **{"width": 32, "inner": "fastervlm", "codes": 3, "rungs": RUNGS, **options}).eval()


def slow_gates(logits, noise=None):
    chances = [math.exp(x) for x in logits]
    gates = []
    for i in range(len(logits)):
        above = min(max(sum(chances[i:]) / sum(chances), 1e-6), 1 - 1e-6)
        odds = math.log(above / (1 - above)) + 3 + (0 if noise is None else noise[i])
        gates.append(1 / (1 + math.exp(-odds / 0.4)))
    return [1.0, *gates[1:]]


def slow_cosine(one, two):
    return sum(a * b for a, b in zip(one, two, strict=True)) / math.hypot(*one) / math.hypot(*two)


@pytest.mark.parametrize("noisy", [False, True])
def test_gates_fall_along_the_ladder(noisy):
    logits, noise = torch.randn(5, 4) * 4, torch.randn(5, 4)
    found = falling_gates(logits, noise if noisy else None)
    for row in range(5):
        expected = slow_gates(logits[row].tolist(), noise[row].tolist() if noisy else None)
        assert found[row].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-5)
    hard = opened(found)
    assert ((hard == 0) | (hard == 1)).all() and (hard.diff(dim=-1) <= 0).all() and (hard[:, 0] == 1).all()


@torch.no_grad()
def test_a_prompt_gets_the_budget_of_the_nearest_code():
    inputs, pruner = make_inputs(), small()
    pruner.codes.copy_(torch.tensor([[9.0, 0, 0, 0], [0, 0, 9.0, 0], [0, 0, 0, 9.0]]))  # the first, third and last rung
    pruner.route.weight.mul_(30)
    assert pruner.shares.tolist() == pytest.approx([0.1, 0.6, 1.0])
    counts = pruner(inputs, "auto").count.tolist()
    for row, available in enumerate(inputs.valid.sum(1).tolist()):
        word, token = (
            x[row][real[row]].mean(0) for x, real in ((inputs.text, inputs.text_valid), (inputs.features, inputs.valid))
        )
        prompt = torch.cat([word / word.norm(), token / token.norm()])
        asked = slow_gates((pruner.route.weight @ prompt + pruner.route.bias).tolist())
        near = [slow_cosine(asked, slow_gates(code.tolist())) for code in pruner.codes]
        share = (0.1, 0.6, 1.0)[near.index(max(near))]
        assert counts[row] == max(1, round(share * available))
    fixed = pruner(inputs, 5)
    assert torch.equal(fixed.index, pruner.inner(inputs, 5).index)


@torch.no_grad()
def test_a_mean_stretches_all_codes_by_one_factor():
    pruner = small()
    pruner.given.copy_(torch.tensor([0.5, 0.25, 0.25]))
    shares = torch.tensor([[0.1, 0.6, 1.0]])
    for mean in (0.05, 0.2, 0.45, 0.7, 0.99):
        found = pruner.stretched(shares, torch.tensor([mean]))[0]
        assert float((found * pruner.given).sum()) == pytest.approx(mean, rel=1e-3)
        inside = found < 1 - 1e-6
        factors = (found / shares[0])[inside]
        assert (factors - factors[:1]).abs().max() < 1e-4 if inside.any() else mean > 0.9


def test_rows_are_given_out_evenly():
    torch.manual_seed(1)
    near = torch.rand(32, 4) * 0.1 + torch.tensor([0.5, 0.0, 0.0, 0.0])  # all are nearest to the first
    assert (near.argmax(1) == 0).all()
    plan = balanced(near)
    torch.testing.assert_close(plan.sum(1), torch.ones(32))
    assert torch.bincount(plan.argmax(1), minlength=4).min() >= 4


def test_likeness_of_gates_follows_that_of_prompts():
    prompts, gates = torch.randn(6, 8), torch.rand(6, 4).requires_grad_()
    like = [[slow_cosine(a, b) / 0.1 for b in prompts.tolist()] for a in prompts.tolist()]
    ours = [[slow_cosine(a, b) / 0.1 for b in gates.tolist()] for a in gates.tolist()]
    total = 0.0
    for one, two in zip(like, ours, strict=True):
        p = [math.exp(x) / sum(math.exp(y) for y in one) for x in one]
        q = [math.exp(x) / sum(math.exp(y) for y in two) for x in two]
        total -= sum(a * math.log(b) + (1 - a) * math.log(1 - b) for a, b in zip(p, q, strict=True))
    assert contrast(gates, prompts, 0.1).item() == pytest.approx(total / 36, rel=1e-3)
    assert nearness(gates, gates).diagonal().allclose(torch.ones(6))


@pytest.fixture
def module(tiny_llava):
    made = RoutedBudgetsModule(str(tiny_llava.folder), small(), "fastervlm", "float32", target=0.3)
    made.log = made.log_dict = lambda *_, **__: None
    return made


def test_each_token_has_the_gate_of_its_rung(module):
    scores, valid = torch.randn(2, 12), torch.ones(2, 12, dtype=torch.bool)
    valid[1, 7:] = False
    gates = torch.tensor([[1.0, 0.8, 0.4, 0.2], [1.0, 0.9, 0.5, 0.1]])
    found = module.token_gates(scores, valid, gates)
    for row in range(2):
        tokens = sorted(valid[row].nonzero()[:, 0].tolist(), key=lambda t, row=row: -float(scores[row, t]))
        ends = [max(round(share * len(tokens)), 1) for share in RUNGS]
        for rank, token in enumerate(tokens):
            rung = next(i for i, end in enumerate(ends) if rank < end)
            assert found[row, token] == gates[row, rung]
    assert not found[1, 7:].any()


@pytest.mark.parametrize("alone", [True, False])
def test_router_and_codes_learn(alone, module, tiny_llava):
    """The router alone from the answers at first, later from likeness; the codes once they are used."""
    torch.manual_seed(2)
    module.own, module.total_steps = float(alone), 10
    batch = tiny_llava.batch(PROMPTS * 2, [[make_image(i)] for i in range(4)])
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -1] = batch["input_ids"][:, -1]
    reached = set()
    for _ in range(3):
        module.zero_grad()
        module.training_step({**batch, "labels": labels}, 0).backward()
        reached |= {k for k, p in module.pruner.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert reached == {"route.weight", "route.bias"} | (set() if alone else {"codes"})
    assert all(parameter.grad is None for parameter in module.vlm.parameters())


def test_saved_it_sets_the_same_budgets_on_a_model(tiny_llava, tmp_path):
    pruner = small()
    pruner.calibrate(torch.rand(20, 3))
    loaded = load_pruner(pruner.save_pretrained(tmp_path / "aptp"))
    assert torch.equal(loaded.given, pruner.given)
    batch = tiny_llava.batch(PROMPTS, [[make_image(0)], [make_image(1)]])
    for keep in ("auto", "auto:9"):
        with attach(tiny_llava.vlm, loaded, keep=keep) as run, torch.no_grad():
            tiny_llava.vlm(**batch)
        assert all(1 <= count <= 36 for count in run.stats.after)


def test_ranges():
    for bad, said in (
        ({"rungs": (0.5, 0.1)}, "rungs"),
        ({"codes": 1}, "codes=1"),
        ({"inner": "budget"}, "another method of the prompt stage"),
        ({"inner": "tome"}, "another method of the prompt stage"),
        ({"inner": "pool"}, "must score them"),
    ):
        with pytest.raises(PruneZooError, match=said):
            small(**bad)
    assert build("aptp").config.width == DIM == TEXT
