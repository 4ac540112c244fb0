"""Policy gradient beside a frozen model: rewards against the model itself, the recipe from start to export."""

import copy
import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from labelled import labelled
from tiny_llava import make_image

from prunezoo import PruneZooError, attach, build_pruner, encode, load_pruner, pruned_forward
from prunezoo.core.contract import PruneOutput
from prunezoo.core.plan import mask_to_index
from prunezoo.core.subsets import subset_mask
from trainers.fit import main
from trainers.training.distill import DistillModule
from trainers.training.policy_gradient import PolicyModule, distinct_share
from trainers.training.warm_start import start_from

CONFIGS = Path(__file__).parent.parent.parent / "configs"
PPM = {"width": 32, "hidden": 16, "heads": 2, "blocks": 1, "text_blocks": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What a user brings: a JSON, a folder of pictures, and a PPM to start from."""
    folder = tmp_path_factory.mktemp("world")
    entries = []
    for number in range(20):
        make_image(number).save(folder / f"{number}.png")
        talk = [{"from": "human", "value": "<image>\nwhat color is the ball ?"}, {"from": "gpt", "value": "red"}]
        entries.append({"id": str(number), "image": f"{number}.png", "conversations": talk})
    (folder / "data.json").write_text(json.dumps(entries))
    torch.manual_seed(5)
    build_pruner("ppm", **PPM).save_pretrained(folder / "ppm")
    return folder


@pytest.fixture
def fit(world, tiny_llava_folder, monkeypatch):
    """Run the recipe on them; gives back the last checkpoint."""
    monkeypatch.setattr(sys, "argv", ["fit"])

    def run(out, *extra):
        main(
            [
                f"--config={CONFIGS / 'policy_llava.yaml'}",
                f"--model.vlm={tiny_llava_folder}",
                "--model.vlm_dtype=float32",
                *(f"--model.pruner.config.{key}={value}" for key, value in PPM.items()),
                f"--model.warm_start={world / 'ppm'}",
                "--model.draws=6",
                "--model.lr=0.01",
                f"--data.json={world / 'data.json'}",
                f"--data.images={world}",
                "--data.batch_size=4",
                "--data.workers=0",
                "--data.validation_share=0.2",
                "--trainer.precision=32",
                "--trainer.accelerator=cpu",
                "--trainer.max_steps=6",
                "--trainer.val_check_interval=6",
                "--trainer.num_sanity_val_steps=0",
                "--trainer.log_every_n_steps=1",
                "--trainer.enable_model_summary=false",
                "--trainer.enable_progress_bar=false",
                "--checkpoint.every_n_train_steps=2",
                f"--out={out}",
                *extra,
            ]
        )
        return torch.load(out / "training" / "checkpoints" / "last.ckpt", weights_only=False)

    return run


@pytest.fixture
def module(world, tiny_llava_folder):
    policy = build_pruner("policy", **PPM)
    return PolicyModule(str(tiny_llava_folder), policy, str(world / "ppm"), "float32", draws=5)


def test_the_reward_is_what_the_really_pruned_model_says(module, tiny_llava):
    """Mean log-likelihood of the reference answer, and KL to the full model, for each draw of each sample."""
    module.answer_weight, module.agreement_weight = 0.5, 2.0
    with torch.no_grad():
        encoded = encode(module.vlm, labelled(tiny_llava))
        mask = torch.rand(5, 2, 36, generator=torch.Generator().manual_seed(0)) < 0.3
        reward = module.reward(encoded, mask)
        full = module.vlm(**labelled(tiny_llava)).logits
        labels = encoded.labels
        for draw in range(5):
            out = pruned_forward(module.vlm, encoded, PruneOutput(*mask_to_index(mask[draw])))
            for sample in range(2):
                ours = out.logits[sample, :-1][out.labels[sample, 1:] != -100].log_softmax(-1)
                token = labels[sample, 1:][labels[sample, 1:] != -100]
                teacher = full[sample, :-1][labels[sample, 1:] != -100].log_softmax(-1)
                likelihood = ours.gather(1, token[:, None]).mean()
                kl = (teacher.exp() * (teacher - ours)).sum(-1).mean()
                assert kl > 1e-3
                torch.testing.assert_close(reward[draw, sample], 0.5 * likelihood - 2.0 * kl, rtol=1e-4, atol=1e-4)


def test_a_sample_counts_by_how_much_the_choice_decides(module, tiny_llava):
    """The advantage is the reward against its group's, in units of the group's spread and a floor."""
    module.total_steps = 1
    batch = labelled(tiny_llava)
    rollout = module.roll_out(dict(batch))
    with torch.no_grad():
        reward = module.reward(encode(module.vlm, batch), subset_mask(rollout.order, rollout.drawn))
    spread = reward.std(0)
    assert spread.min() > 1e-3
    torch.testing.assert_close(rollout.advantage, (reward - reward.mean(0)) / (spread + 0.2))
    with pytest.raises(PruneZooError, match="spread_floor must be above 0"):
        PolicyModule(str(tiny_llava.folder), module.pruner, "unused", spread_floor=0.0)


def test_distillation_starts_from_a_trained_ppm(world, tiny_llava):
    trained, fresh = load_pruner(world / "ppm"), build_pruner("ppm", **PPM)
    name, weight = next(iter(trained.state_dict().items()))
    assert not torch.equal(weight, fresh.state_dict()[name])
    started = DistillModule(str(tiny_llava.folder), fresh, "float32", warm_start=str(world / "ppm")).pruner
    assert all(torch.equal(weight, started.state_dict()[name]) for name, weight in trained.state_dict().items())


def test_updates_make_better_subsets_likelier(fit, tmp_path, world, tiny_llava):
    """A few updates at a high rate on one answer: what the policy draws is rewarded more in the end than at first."""
    fit(tmp_path / "policy", "--model.curriculum=0", "--model.kl_weight=0", "--trainer.max_steps=30")
    rows = (tmp_path / "policy" / "training" / "logs" / "version_0" / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("train/reward")
    rewards = [float(row.split(",")[column]) for row in rows[1:] if row.split(",")[column]]
    assert sum(rewards[-8:]) / 8 > sum(rewards[:8]) / 8 + 0.05
    trained = load_pruner(tmp_path / "policy")
    assert trained.name == "policy"
    with attach(tiny_llava.vlm, trained, keep=5) as run:
        tiny_llava.vlm.generate(
            **tiny_llava.batch(["<s> USER: <image> what ? ASSISTANT:"], [[make_image(3)]]), max_new_tokens=2
        )
    assert run.stats.after == [5]


@pytest.mark.parametrize("passes", [1, 2])
def test_a_killed_run_goes_on_as_if_it_had_not_been(passes, fit, tmp_path):
    straight = fit(tmp_path / "straight", f"--model.passes={passes}")
    stop = ("--trainer.callbacks+=spies.StopAt", "--trainer.callbacks.step=2")
    with pytest.raises(SystemExit) as stopped:
        fit(tmp_path / "killed", f"--model.passes={passes}", *stop)
    assert stopped.value.code == 128 + signal.SIGTERM
    resumed = fit(tmp_path / "killed", f"--model.passes={passes}", "--ckpt_path=last")
    assert straight["global_step"] == resumed["global_step"] == 6
    weights = straight["state_dict"]
    assert all(torch.equal(weights[name], resumed["state_dict"][name]) for name in weights)
    log = (tmp_path / "straight" / "training" / "logs" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    wanted = {"train/reward", "train/entropy", "train/kl_to_warm_start", "train/distinct_subsets"}
    assert wanted <= set(log.split(",")) and (passes == 1 or "train/clipped" in log)


def test_a_run_of_epochs_learns_to_its_end_with_several_updates_of_a_batch(fit, tmp_path):
    epochs = ("--trainer.max_steps=-1", "--trainer.max_epochs=1", "--trainer.val_check_interval=1.0")
    stop = ("--trainer.callbacks+=spies.StopAt", "--trainer.callbacks.step=6")
    with pytest.raises(SystemExit):
        fit(tmp_path, "--model.passes=2", "--trainer.check_val_every_n_epoch=1", *epochs, *stop)
    last = torch.load(tmp_path / "training" / "checkpoints" / "last.ckpt", weights_only=False)
    assert 4 <= last["global_step"] < 8  # 4 batches, 2 updates of each
    assert 0 < last["lr_schedulers"][0]["_last_lr"][0] < 0.005  # 0.01 at its peak


def test_the_warm_start_is_checked_and_left_alone(module, world):
    before = copy.deepcopy(module.reference.state_dict())
    for parameter in module.pruner.parameters():
        parameter.data.add_(1.0)
    assert all(torch.equal(before[name], weight) for name, weight in module.reference.state_dict().items())
    assert not any(name.startswith("reference") for name in module.state_dict())
    with pytest.raises(PruneZooError, match=r"other sizes than model.pruner: blocks=2 \(there 1\)"):
        start_from(build_pruner("policy", **{**PPM, "blocks": 2}), str(world / "ppm"))
    with pytest.raises(PruneZooError, match="'uniform': a warm start is from"):
        start_from(build_pruner("policy", **PPM), "uniform")
    with pytest.raises(PruneZooError, match="'atp', which has no scores to draw by"):
        PolicyModule(str(module.vlm.name_or_path), build_pruner("atp", width=32), "unused")


def test_a_collapsed_policy_is_told(module, recwarn):
    assert distinct_share(torch.eye(4, dtype=torch.bool)[:, None]).tolist() == [1.0]
    assert distinct_share(torch.ones(4, 2, 6, dtype=torch.bool)).tolist() == [0.0, 0.0]
