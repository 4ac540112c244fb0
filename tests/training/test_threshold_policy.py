"""Thresholds by policy gradient: draws, prices and gradient against their definitions; the recipe, killed or not."""

import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from labelled import labelled
from tiny_llava import make_image
from torch.distributions import Normal

from prunezoo import PruneZooError, build_pruner, encode, load_pruner
from prunezoo.host.run import run_pruned
from prunezoo.learned.atp import REACH
from trainers.fit import main
from trainers.training.adaptive import AdaptiveModule
from trainers.training.threshold_policy import Rollout, ThresholdPolicyModule, drawn_thresholds

CONFIGS = Path(__file__).parent.parent.parent / "configs"
ATP = {"layers": [0, 2], "hidden": 16, "width": 32}
DRAWS, TOKENS = 6, 36


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What a user brings: a JSON, a folder of pictures, and an ATP to start from."""
    folder = tmp_path_factory.mktemp("world")
    entries = []
    for number in range(20):
        make_image(number).save(folder / f"{number}.png")
        talk = [{"from": "human", "value": "<image>\nwhat color is the ball ?"}, {"from": "gpt", "value": "red"}]
        entries.append({"id": str(number), "image": f"{number}.png", "conversations": talk})
    (folder / "data.json").write_text(json.dumps(entries))
    torch.manual_seed(5)
    trained = build_pruner("atp", **ATP)
    with torch.no_grad():
        for head in trained.thresholds:
            head.displacement.weight.normal_(std=0.1)
            head.level.weight.normal_(std=0.1)
    trained.save_pretrained(folder / "atp")
    return folder


@pytest.fixture
def make(world, deep_llava):
    def build(pruner=None, warm_start=world / "atp", **options):
        torch.manual_seed(0)
        pruner = pruner or build_pruner("atp", **ATP)
        options = {"draws": DRAWS, "budgets": (1 / 9, 1 / 3), **options}
        return ThresholdPolicyModule(str(deep_llava.folder), pruner, warm_start and str(warm_start), **options)

    return build


@pytest.fixture
def batch(deep_llava):
    return labelled(deep_llava)


def same_weights(one, two):
    return all(torch.equal(weight, two.state_dict()[name]) for name, weight in one.state_dict().items())


# Draws


@torch.no_grad()
def test_an_answer_is_that_of_the_pruned_model_whose_thresholds_are_the_drawn_ones(make, batch):
    """Draw by draw and sample by sample: each alone, with heads that say what was drawn."""
    module = make()
    asked = torch.tensor([5, 9])
    draws, worth, tokens = module.answer(encode(module.vlm, batch), asked)
    assert [draw.number for draw in draws] == [0, 1] and worth.shape == tokens.shape == (DRAWS, 2)
    assert len(tokens[:, 0].unique()) > 2 and len(tokens[:, 1].unique()) > 2
    for sample in range(2):
        alone = encode(module.vlm, {name: value[sample : sample + 1] for name, value in batch.items()})
        for g in range(DRAWS):
            handles = [
                head.register_forward_hook(lambda _head, _given, said, drawn=drawn: (drawn, said[1]))
                for head, draw in zip(module.pruner.thresholds, draws, strict=True)
                for drawn in [draw.displacement[sample * DRAWS + g][None]]
            ]
            run = run_pruned(module.vlm, alone, module.pruner.eval(), int(asked[sample]))
            for handle in handles:
                handle.remove()
            assert run.tokens[0] == tokens[g, sample]
            wanted = run.host.labels[0, 1:]
            slots = run.host.logits[0, :-1].log_softmax(-1)[wanted != -100]
            likelihood = slots.gather(1, wanted[wanted != -100][:, None]).mean()
            torch.testing.assert_close(worth[g, sample], likelihood, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_draws_lie_around_what_a_head_says_and_leave_no_trace(make):
    pruner = make().pruner
    head, said = pruner.thresholds[0], torch.randn(4000, pruner.thresholds[0].enter.in_features)
    before = head(said)
    with drawn_thresholds(pruner.train(), 0.3) as draws:
        assert not pruner.training, "in training the batch would shift together"
        drawn, level = head(said)
    noise = drawn - before[0]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 0.3) < 0.02 and torch.equal(level, before[1])
    assert torch.equal(draws[0].displacement, drawn) and torch.equal(draws[0].statistics, said)
    after = head(said)
    assert pruner.training and torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])


@torch.no_grad()
def test_an_image_that_is_asked_for_all_keeps_all(make, batch):
    module = make(spread=50.0)
    asked = torch.tensor([TOKENS, 5])
    _, worth, tokens = module.answer(encode(module.vlm, batch), asked)
    assert (tokens[:, 0] == TOKENS).all() and len(tokens[:, 1].unique()) > 1
    assert worth[:, 0].std() < 1e-5 < worth[:, 1].std()


# Gradient


def test_the_gradient_is_that_of_the_density_of_what_was_drawn(make, batch):
    """Of all layers together, weighted by the advantage, by hand and by autograd."""
    module = make(kl_weight=0.0, level_weight=0.0, spread=0.4)
    rollout = module.roll_out(dict(batch))
    assert rollout.advantage.abs().max() > 0.1 and rollout.advantage.mean(0).abs().max() < 1e-5
    module.loss(rollout).backward()
    advantage = rollout.advantage.T.flatten()  # as rows: the draws of a sample stand together
    for draw, head in zip(rollout.draws, module.pruner.thresholds, strict=True):
        with torch.no_grad():
            mean, _ = head(draw.statistics)
        noise = (draw.displacement - mean)[:, 0]
        by_hand = -(advantage * noise / 0.4**2).mean() * REACH
        torch.testing.assert_close(head.displacement.bias.grad, by_hand[None], rtol=1e-4, atol=1e-5)
        shift = torch.zeros((), requires_grad=True)
        (-(advantage * Normal(mean[:, 0] + shift, 0.4).log_prob(draw.displacement[:, 0])).mean()).backward()
        torch.testing.assert_close(head.displacement.bias.grad[0], REACH * shift.grad, rtol=1e-4, atol=1e-5)
    assert all(weight.grad is None for weight in module.pruner.corrections.parameters())


@pytest.mark.parametrize("sign", [1, -1])
def test_a_reward_for_tokens_lowers_thresholds_and_a_price_raises_them(sign, make, batch, monkeypatch):
    """`displacement` is what the threshold rises by, so less of it keeps more."""
    module = make(price=0.0 if sign > 0 else 5.0, price_rate=0.0, kl_weight=0.0, draws=16)
    answer = module.answer

    def paid(encoded, asked):
        draws, worth, tokens = answer(encoded, asked)
        return draws, tokens if sign > 0 else torch.zeros_like(worth), tokens

    monkeypatch.setattr(module, "answer", paid)
    before = [head.displacement.bias.item() for head in module.pruner.thresholds]
    optimizer = torch.optim.Adam([head.displacement.bias for head in module.pruner.thresholds], lr=0.02)
    for _ in range(4):
        optimizer.zero_grad()
        module.loss(module.roll_out(dict(batch))).backward()
        optimizer.step()
    after = [head.displacement.bias.item() for head in module.pruner.thresholds]
    assert all(sign * (new - old) < -0.02 for old, new in zip(before, after, strict=True))


def test_the_advantage_counts_the_price_and_is_of_its_group(make, batch, monkeypatch):
    module = make(price=0.7, price_rate=0.0, budgets=(1 / 3,))
    seen = []
    answer = module.answer
    monkeypatch.setattr(module, "answer", lambda *given: seen.append(answer(*given)) or seen[-1])
    rollout = module.roll_out(dict(batch))
    _, worth, tokens = seen[0]
    reward = worth - 0.7 * tokens / 12
    torch.testing.assert_close(rollout.advantage, (reward - reward.mean(0)) / (reward.std(0) + 0.2))


def test_the_policy_and_the_spatial_threshold_are_held_to_the_start(make, batch):
    """Both terms are nothing at first; then they are what the definitions say."""
    module = make(kl_weight=2.0, level_weight=3.0, spread=0.4)
    rollout = module.roll_out(dict(batch))
    still = Rollout(rollout.draws, torch.zeros_like(rollout.advantage))
    assert module.loss(still) == 0.0
    with torch.no_grad():
        for head in module.pruner.thresholds:
            head.displacement.bias.add_(0.1)
            head.level.bias.add_(0.5)
    kl = 2 * (0.1 * REACH) ** 2 / (2 * 0.4**2)  # of two layers
    torch.testing.assert_close(module.loss(still).item(), 2.0 * kl + 3.0 * 0.25, rtol=1e-4, atol=1e-4)


# Prices


def test_a_price_rises_while_its_budget_is_exceeded_and_falls_to_nothing(make):
    module = make(price=0.1, price_rate=0.2, budgets=(1 / 9, 2 / 9, 1 / 3))
    used = torch.tensor([[1.2, 0.4, 2.0], [1.0, 0.6, 2.0]])
    module.move_prices(used, torch.tensor([0, 1, 0]))
    torch.testing.assert_close(module.prices, torch.tensor([0.1 + 0.2 * 0.55, 0.1 - 0.2 * 0.5, 0.1]).clamp_min(0))
    module.move_prices(used, torch.tensor([1, 1, 1]))
    module.move_prices(torch.full((2, 1), 0.1), torch.tensor([1]))
    assert module.prices[1] == 0.0 and module.prices[2] == pytest.approx(0.1)
    assert torch.equal(module.state_dict()["prices"], module.prices)


def test_the_tokens_come_to_those_asked_for(make, batch):
    """Thresholds that keep far too much, and a reward that does not mind: the price brings them back."""
    module = make(warm_start=None, price_rate=0.1, spread=0.5, budgets=(1 / 3,), draws=12)
    with torch.no_grad():
        for head in module.pruner.thresholds:
            head.displacement.bias.fill_(-0.5)
    optimizer = torch.optim.Adam((p for p in module.pruner.parameters() if p.requires_grad), lr=0.02)
    means = []
    for _ in range(30):
        optimizer.zero_grad()
        rollout = module.roll_out(dict(batch))
        module.loss(rollout).backward()
        optimizer.step()
        with torch.no_grad():
            _, _, tokens = module.answer(encode(module.vlm, batch), torch.tensor([12, 12]))
        means.append(float(tokens.mean() / 12))
    assert means[0] > 1.4 and min(means) < 1.1


# The recipe


@pytest.fixture
def fit(world, deep_llava, monkeypatch):
    """Run it on the world; gives back the last checkpoint."""
    monkeypatch.setattr(sys, "argv", ["fit"])

    def run(recipe, out, *extra):
        main(
            [
                f"--config={CONFIGS / recipe}.yaml", f"--model.vlm={deep_llava.folder}",
                f"--model.pruner.config={json.dumps(ATP)}", f"--model.warm_start={world / 'atp'}",
                "--model.measure=[0.5]", "--data=trainers.data.modules.LlavaJsonDataModule",
                f"--data.json={world / 'data.json'}", f"--data.images={world}", "--data.batch_size=4",
                "--data.workers=0", "--data.validation_share=0.2", "--trainer.accelerator=cpu",
                "--trainer.precision=32", "--trainer.max_steps=6", "--trainer.val_check_interval=6",
                "--trainer.num_sanity_val_steps=0", "--trainer.log_every_n_steps=1",
                "--trainer.enable_model_summary=false", "--trainer.enable_progress_bar=false",
                "--checkpoint.every_n_train_steps=2", f"--out={out}", *extra,
            ]
        )  # fmt: skip
        return torch.load(out / "training" / "checkpoints" / "last.ckpt", weights_only=False)

    return run


def test_a_killed_run_goes_on_as_if_it_had_not_been(fit, tmp_path, world):
    recipe = ("atp_rl_tiny", "--model.budgets=[0.1111,0.3333]", "--model.draws=4", "--model.lr=0.01")
    straight = fit(recipe[0], tmp_path / "straight", *recipe[1:])
    stop = ("--trainer.callbacks+=spies.StopAt", "--trainer.callbacks.step=2")
    with pytest.raises(SystemExit) as stopped:
        fit(recipe[0], tmp_path / "killed", *recipe[1:], *stop)
    assert stopped.value.code == 128 + signal.SIGTERM
    resumed = fit(recipe[0], tmp_path / "killed", *recipe[1:], "--ckpt_path=last")
    assert straight["global_step"] == resumed["global_step"] == 6
    weights = straight["state_dict"]
    assert all(torch.equal(weights[name], resumed["state_dict"][name]) for name in weights)
    assert len(weights["prices"]) == 2 and (weights["prices"] != 0.1).all()
    assert not any(name.startswith("start") for name in weights)
    rows = (tmp_path / "straight" / "training" / "logs" / "version_0" / "metrics.csv").read_text().splitlines()
    wanted = {"train/reward", "train/tokens_spread", "train/price_0.111", "train/tokens_0.333", "val/accuracy_0.500"}
    assert wanted <= set(rows[0].split(","))
    began, ended = (load_pruner(folder) for folder in (world / "atp", tmp_path / "killed"))
    assert same_weights(began.corrections, ended.corrections) and not same_weights(began.thresholds, ended.thresholds)


def test_the_control_starts_from_the_same_weights(fit, tmp_path, world, deep_llava):
    """Distillation goes on from a trained ATP, and all of it learns."""
    began = load_pruner(world / "atp")
    module = AdaptiveModule(
        str(deep_llava.folder), build_pruner("atp", **ATP), "float32", warm_start=str(world / "atp")
    )
    assert same_weights(began, module.pruner) and all(weight.requires_grad for weight in module.pruner.parameters())
    fit("atp_tiny", tmp_path, "--model.guide_share=0", "--trainer.max_steps=2", "--trainer.limit_val_batches=0")
    ended = load_pruner(tmp_path)
    assert not same_weights(began.corrections, ended.corrections)


def test_a_warm_start_of_another_config_is_refused(world, make):
    with pytest.raises(PruneZooError, match=r"other sizes than model.pruner: taper=1.0 \(there 0.5\)"):
        make(build_pruner("atp", **{**ATP, "taper": 1.0}))
    with pytest.raises(PruneZooError, match=r"is a 'uniform': a warm start is from the method of model.pruner, 'atp'"):
        make(warm_start="uniform")


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"draws": 1}, "draws=1"),
        ({"spread": 0.0}, "spread=0.0"),
        ({"budgets": ()}, "budgets"),
        ({"budgets": (0.5, 0.5)}, "all different"),
        ({"budgets": (0.5, 1.5)}, r"in \(0, 1\]"),
        ({"price": -0.1}, "price=-0.1"),
    ],
)
def test_a_wrong_number_is_refused(wrong, named, make):
    with pytest.raises(PruneZooError, match=named):
        make(**wrong)


def test_what_has_no_thresholds_is_refused(make):
    with pytest.raises(PruneZooError, match=r"model.pruner is 'uniform', which has no thresholds: take an 'atp'"):
        make(build_pruner("uniform"))
    with pytest.raises(PruneZooError, match="'atp' with adaptive=false"):
        make(build_pruner("atp", **ATP, adaptive=False))


def test_a_budget_that_the_first_layers_have_spent_is_refused(make):
    late = {**ATP, "layers": [1, 2]}
    with pytest.raises(PruneZooError, match=r"budgets: 0.25 cannot be met.* use 0.250 of the tokens"):
        make(build_pruner("atp", **late), None, budgets=(0.25, 0.5))
    make(build_pruner("atp", **late), None, budgets=(0.3, 0.5))


def test_several_images_a_sample_are_refused(make, mixed):
    with pytest.raises(PruneZooError, match="one image a sample"):
        make().roll_out({**mixed, "labels": mixed["input_ids"]})
