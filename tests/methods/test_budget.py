"""The budget policy: estimators against the exact gradient, a bandit with a known optimum, prices, the recipe."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_llava import make_image

from prunezoo import attach, build_pruner, encode, load_pruner
from prunezoo.core.contract import PruneInputs
from prunezoo.host import run_pruned
from trainers import teacher
from trainers.data.conversation import ConversationCollator
from trainers.data.suite import load_suite
from trainers.evaluate import main as evaluate
from trainers.fit import main
from trainers.training.budget_policy import BudgetModule, entropy, policy_loss
from trainers.upkeep.policy_record import main as policy_record

CONFIGS = Path(__file__).parent.parent.parent / "configs"
READER = {"width": 32, "hidden": 16, "heads": 2, "blocks": 1, "text_blocks": 1}
ARMS = (0.1, 0.3, 1.0)


def make_policy(**overrides):
    torch.manual_seed(0)
    return build_pruner("budget", inner="uniform", reader_config=READER, arms=ARMS, **overrides).eval()


@pytest.mark.parametrize("estimator", ["reinforce", "grpo"])
def test_drawn_gradients_agree_with_the_exact_one(estimator):
    """REINFORCE is unbiased; GRPO, which standardises, points the same way."""
    torch.manual_seed(1)
    logits = torch.tensor([[0.5, -0.3, 0.1]], requires_grad=True)
    gain = torch.tensor([[1.0, 3.0, -0.5]])
    (exact,) = torch.autograd.grad(policy_loss(logits, gain, "exact", 2), logits)
    p = logits.detach().softmax(-1)
    torch.testing.assert_close(exact, -p * (gain - (p * gain).sum()))  # the known answer
    rows = 20_000
    (drawn,) = torch.autograd.grad(policy_loss(logits.expand(rows, 3), gain.expand(rows, 3), estimator, 4), logits)
    assert torch.cosine_similarity(drawn, exact).item() > 0.99
    if estimator == "reinforce":
        torch.testing.assert_close(drawn, exact, rtol=0.05, atol=0.01)


def test_an_arm_is_as_many_tokens_as_its_share_is():
    """1/36 of 90 tokens is 2.5, and half a token more or less in another precision."""
    torch.manual_seed(0)
    policy = build_pruner("budget", inner="uniform", reader_config=READER, arms=(1 / 36, 1.0)).eval()
    cells = torch.cartesian_prod(torch.tensor([0]), torch.arange(9), torch.arange(10))[None]
    valid, word = torch.ones(1, 90, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool)
    inputs = PruneInputs(torch.randn(1, 90, 32), valid, cells, torch.randn(1, 1, 32), word)
    with torch.no_grad():
        policy.head.bias.copy_(torch.tensor([9.0, -9.0]))
        assert policy(inputs, "auto").count.tolist() == policy(inputs, 1 / 36).count.tolist() == [2]


@pytest.mark.parametrize("estimator", ["exact", "reinforce", "grpo"])
def test_a_bandit_with_a_known_optimum_is_solved(estimator):
    """Two kinds of question; the one is answered by every arm, the other by the dearest alone."""
    torch.manual_seed(2)
    gain = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 1.0]]) - 0.3 * torch.tensor(ARMS)
    logits = torch.zeros(2, 3, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(150):
        loss = policy_loss(logits, gain, estimator, 8)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert logits.argmax(-1).tolist() == [0, 2]
    assert logits.detach().softmax(-1).amax(-1).min() > 0.9


def test_prices_lead_to_the_means_that_were_calibrated():
    policy = make_policy()
    values = torch.rand(4000, 3, generator=torch.Generator().manual_seed(3)).cumsum(1)
    policy.calibrate(values, 0.25)
    for mean in (0.15, 0.25, 0.5, 0.9):
        price = policy.price_of(torch.full((len(values),), mean))
        assert policy.shares[policy.best_arm(values, price)].mean().item() == pytest.approx(mean, abs=0.01)
    assert policy.shares[policy.best_arm(values, policy.price_of(torch.full((len(values),), 0.01)))].mean() < 0.11


def test_auto_keeps_what_the_policy_thinks_right(tiny_llava, tmp_path):
    """From the folder too; any other budget is the inner pruner's own."""
    policy = make_policy()
    prompts = ["<s> USER: <image> what ? ASSISTANT:", "<s> USER: <image> what color is the ball ? ASSISTANT:"]
    batch = tiny_llava.batch(prompts, [[make_image(0)], [make_image(1)]], padding_side="right")
    encoded = encode(tiny_llava.vlm, batch)
    with torch.no_grad():
        policy.head.weight.data *= 20
        # at a price of 1 what the one question is given is what the other is not
        policy.head.bias.data += policy.shares - policy.values(encoded.inputs).mean(0)
        values = policy.values(encoded.inputs)
        wanted = policy.shares[policy.best_arm(values, torch.ones(2))]
        policy.calibrate(values, wanted.mean().item())
    loaded = load_pruner(policy.save_pretrained(tmp_path / "budget"))
    tokens = run_pruned(tiny_llava.vlm, encoded, loaded, "auto").tokens.tolist()
    assert tokens[0] != tokens[1] and tokens == (36 * wanted).round().tolist()
    with attach(tiny_llava.vlm, loaded, keep="auto") as attached:
        tiny_llava.vlm(**batch)
    assert attached.stats.after == tokens
    fixed = run_pruned(tiny_llava.vlm, encoded, loaded, 9).host.logits
    assert torch.equal(fixed, run_pruned(tiny_llava.vlm, encoded, build_pruner("uniform"), 9).host.logits)


@pytest.fixture
def fit(tiny_llava_folder, tmp_path, monkeypatch):
    """Run the recipe on the smallest model; gives back the last checkpoint."""
    monkeypatch.setattr(sys, "argv", ["fit"])

    def run(out, *extra, command=main):
        command(
            [
                f"--config={CONFIGS / 'budget_tiny.yaml'}",
                f"--model.vlm={tiny_llava_folder}",
                "--model.pruner.config.inner=uniform",
                "--model.pruner.config.inner_config={}",
                "--model.inner=uniform",
                "--model.reader=null",
                *(f"--model.pruner.config.reader_config.{key}={value}" for key, value in READER.items()),
                f"--data.arms={tmp_path / 'arms'}",
                "--data.train_items=32",
                "--data.shard_items=8",
                "--data.batch_size=8",
                "--data.workers=0",
                "--data.validation_items=16",
                "--trainer.max_steps=6",
                "--trainer.val_check_interval=6",
                "--trainer.accelerator=cpu",
                "--trainer.log_every_n_steps=1",
                "--trainer.enable_model_summary=false",
                "--trainer.enable_progress_bar=false",
                "--checkpoint.every_n_train_steps=2",
                f"--out={out}",
                *extra,
            ]
        )
        last = out / "training" / "checkpoints" / "last.ckpt"
        return torch.load(last, weights_only=False)["state_dict"] if last.exists() else None

    return run


def test_the_recipe_goes_from_rewards_to_a_folder_that_sets_budgets(fit, tmp_path, capsys):
    straight = fit(tmp_path / "straight", "--model.target=0.2", "--model.lr=0.01")
    log = (tmp_path / "straight" / "training" / "logs" / "version_0" / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(log[0].split(","), line.split(","), strict=True)) for line in log[1:]]
    values = [float(row["train/value"]) for row in rows if row["train/value"]]
    assert values[-1] < values[0]
    assert {"train/reward", "train/entropy", "train/information", "train/price"} <= set(rows[0])
    share, price = ([float(row[f"train/{name}"]) for row in rows if row["train/share"]] for name in ("share", "price"))
    risen = [after > before for before, after in pairwise(price)]
    assert risen == [mean > 0.2 for mean in share[1:]]  # the dual ascent: dearer where more is spent than wanted
    validated = next(row for row in rows if row["val/tokens_auto"])
    histogram = [float(value) for name, value in validated.items() if name.startswith("val/reading_at_") and value]
    assert len(histogram) == 6 and sum(histogram) == pytest.approx(1)

    arms, begun = tmp_path / "arms", json.loads((tmp_path / "arms" / "manifest.json").read_text())
    assert len(begun["shards"]) == 4
    written = {path: path.stat().st_mtime_ns for path in arms.glob("*.safetensors")}
    stop = ("--trainer.callbacks+=spies.StopAt", "--trainer.callbacks.step=2")
    with pytest.raises(SystemExit):
        fit(tmp_path / "killed", "--model.target=0.2", "--model.lr=0.01", *stop)
    resumed = fit(tmp_path / "killed", "--model.target=0.2", "--model.lr=0.01", "--ckpt_path=last")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)  # the price too
    assert written == {path: path.stat().st_mtime_ns for path in arms.glob("*.safetensors")}

    policy = load_pruner(tmp_path / "straight")
    with pytest.raises(SystemExit):
        fit(tmp_path / "other", "--model.pruner.config.arms=[0.1,0.5]")
    assert "was made with arms=" in capsys.readouterr().err
    assert policy.name == "budget" and bool((policy.means.diff() <= 0).all())


def test_rewards_can_be_made_ahead_by_several_processes(fit, tmp_path, capsys):
    fit(tmp_path / "ahead", "--data.processes=2", command=teacher.main)
    assert "rewards of arms of 32 out of 32 items" in " ".join(capsys.readouterr().out.split())
    arms = tmp_path / "arms"
    written = {path: path.read_bytes() for path in sorted(arms.glob("*"))}
    assert len(written) == 5
    fit(tmp_path / "after", "--trainer.max_steps=2")
    assert written == {path: path.read_bytes() for path in sorted(arms.glob("*"))}
    ppm = [
        f"--config={CONFIGS / 'ppm_tiny.yaml'}",
        "--data.class_path=trainers.caches.arms.SuiteArms",
        f"--data.arms={arms}",
    ]
    with pytest.raises(SystemExit):
        teacher.main(ppm)
    assert "'ppm' has no arms" in capsys.readouterr().err


def test_what_an_arm_earns_is_what_the_really_pruned_model_says(fit, tmp_path, tiny_llava):
    """Of one item, by hand: probability, mean log-probability, and whether it is the first choice."""
    fit(tmp_path / "run", "--trainer.max_steps=1", "--trainer.val_check_interval=1")
    shard = load_file(tmp_path / "arms" / "00000.safetensors")
    item = load_suite("scenes", split="train")[3]
    batch = ConversationCollator(tiny_llava.processor)([item])
    arms = (0.0278, 0.0625, 0.1111, 0.25, 0.4444, 1.0)
    for number, arm in enumerate(arms):
        run = run_pruned(tiny_llava.vlm, encode(tiny_llava.vlm, batch), build_pruner("uniform"), arm)
        asked = run.host.labels[0, 1:] != -100
        logits, tokens = run.host.logits[0, :-1][asked], run.host.labels[0, 1:][asked]
        log_p = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        torch.testing.assert_close(shard["probability"][3, number], log_p.sum().exp(), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(shard["log_likelihood"][3, number], log_p.mean(), rtol=1e-3, atol=1e-4)
        assert shard["right"][3, number] == (logits.argmax(-1) == tokens).all()
    assert shard["probability"][:, 0].ne(shard["probability"][:, -1]).any()


def test_entropy_of_the_policy():
    assert entropy(torch.tensor([[0.0, 0.0], [100.0, 0.0]])).tolist() == pytest.approx([0.6931, 0.0], abs=1e-4)


def test_a_policy_that_gives_all_the_same_is_told_even_where_an_arm_has_no_chance_left(tiny_llava_folder, recwarn):
    """At a high price the chance of the dearest arm is 0 in float32."""
    module = BudgetModule(str(tiny_llava_folder), make_policy(), "uniform", prices=(10.0, 10.0))
    values = torch.zeros(8, 3)
    logits = module.pruner.logits(values, module.draw_prices(values))
    assert (logits.softmax(-1)[:, 2] == 0).all()
    for _ in range(50):
        module.watch(values, logits, values)
    assert any("gives every question the same" in str(warning.message) for warning in recwarn)


def test_an_evaluation_and_the_card_show_who_gets_how_much(fit, tmp_path, tiny_llava_folder):
    """And how the policy learned, at what cost."""
    folder = tmp_path / "policy"
    fit(folder, "--trainer.log_every_n_steps=1")
    assert policy_record([str(folder), "--updates=1"]) == 0
    words = f"--vlm {tiny_llava_folder} --pruner {folder} uniform --keep auto:9 9 --suite scenes --limit 14".split()
    assert evaluate([*words, "--json", str(tmp_path / "record.json"), "--card", str(folder)]) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    rows = [row for row in record["histogram"] if row["group"] == "reading"]
    assert {row["pruner"] for row in rows} <= {str(folder)}
    fixed = [row["tokens"] for row in record["rows"] if row["pruner"] == "uniform"]
    assert set(fixed) == {9.0}  # at auto:9 too
    learned = json.loads((folder / "policy.json").read_text())
    assert len(learned["figures"]["reward"]) == 5 and learned["cost"]["multiple"] > 0
    card = (folder / "README.md").read_text()
    assert 'keep="auto:9")' in card and "times a distillation step" in card
    assert ("Who is given how many tokens" in card) == bool(record["histogram"])
