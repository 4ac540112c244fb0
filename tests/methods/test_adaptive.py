"""Training between decoder layers: the recipes from start to export, killed or not."""

import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from tiny_llava import make_image

from prunezoo import PruneZooError, attach, build_pruner, load_pruner
from trainers.fit import main
from trainers.training.adaptive import adopt

CONFIGS = Path(__file__).parent.parent.parent / "configs"
PPM = {"width": 32, "hidden": 16, "heads": 2, "blocks": 1, "text_blocks": 1}
ATP = {"layers": [2], "hidden": 16, "width": 32}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What a user brings: a JSON and a folder of pictures."""
    folder = tmp_path_factory.mktemp("world")
    entries = []
    for number in range(20):
        make_image(number).save(folder / f"{number}.png")
        talk = [{"from": "human", "value": "<image>\nwhat color is the ball ?"}, {"from": "gpt", "value": "red"}]
        entries.append({"id": str(number), "image": f"{number}.png", "conversations": talk})
    (folder / "data.json").write_text(json.dumps(entries))
    return folder


@pytest.fixture
def fit(world, deep_llava, monkeypatch):
    """Run a recipe on them; gives back the last checkpoint."""
    monkeypatch.setattr(sys, "argv", ["fit"])

    def run(recipe, out, *extra):
        main(
            [
                f"--config={CONFIGS / recipe}.yaml",
                f"--model.vlm={deep_llava.folder}",
                "--model.vlm_dtype=float32",
                "--model.measure=[0.5]",
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
def batch(deep_llava):
    return deep_llava.batch(["<s> USER: <image> what color is the ball ? ASSISTANT:"], [[make_image(3)]])


def test_a_killed_run_goes_on_as_if_it_had_not_been(fit, tmp_path, deep_llava, batch):
    """ATP in front of layers 0 and 2; stopped in the first of its two stages, which are of three steps each."""
    recipe = ["--model.guide_share=0.5", *(f"--model.pruner.config.{key}={value}" for key, value in ATP.items())]
    recipe += ["--model.pruner.config.layers=[0,2]", "--model.pruner.config.heads=2"]
    straight = fit("atp_llava", tmp_path / "straight", *recipe)
    stop = ("--trainer.callbacks+=spies.StopAt", "--trainer.callbacks.step=2")
    with pytest.raises(SystemExit) as stopped:
        fit("atp_llava", tmp_path / "killed", *recipe, *stop)
    assert stopped.value.code == 128 + signal.SIGTERM
    resumed = fit("atp_llava", tmp_path / "killed", *recipe, "--ckpt_path=last")
    assert straight["global_step"] == resumed["global_step"] == 6
    weights = straight["state_dict"]
    assert all(torch.equal(weights[name], resumed["state_dict"][name]) for name in weights)
    log = (tmp_path / "straight" / "training" / "logs" / "version_0" / "metrics.csv").read_text().splitlines()[0]
    assert {"train/guide", "train/kl", "train/mean"} <= set(log.split(","))
    trained = load_pruner(tmp_path / "killed")
    assert not torch.equal(trained.thresholds[0].displacement.weight, torch.zeros(1, 64))
    with attach(deep_llava.vlm, trained, keep=9) as run:
        deep_llava.vlm.generate(**batch, max_new_tokens=2)
    assert [stage.layer for stage in run.stats.stages] == [0, 2] and run.stats.tokens[0] < 18


def test_a_combination_starts_from_a_trained_part_and_leaves_it_alone(fit, tmp_path, deep_llava, batch):
    torch.manual_seed(3)
    ppm = build_pruner("ppm", **PPM)
    ppm.save_pretrained(tmp_path / "ppm")
    config = json.dumps({"methods": ["ppm", "atp"], "configs": [PPM, ATP], "shares": [1.5, 1.0]})
    recipe = [f"--model.pruner.config={config}", f"--model.start={json.dumps({'ppm': str(tmp_path / 'ppm')})}"]
    fit("ppm_atp_llava", tmp_path / "both", *recipe)
    both = load_pruner(tmp_path / "both")
    for name, weight in ppm.state_dict().items():
        assert torch.equal(both.members["ppm"].state_dict()[name], weight)
    torch.manual_seed(1)
    moved = both.members["atp"].corrections[0].head.weight
    assert moved.abs().max() > 0, "zero before training"
    with attach(deep_llava.vlm, both, keep=12) as run:
        deep_llava.vlm.generate(**batch, max_new_tokens=2)
    assert [(stage.pruner, stage.layer) for stage in run.stats.stages] == [("ppm", None), ("atp", 2)]


def test_mistakes_in_a_start_are_named():
    with pytest.raises(PruneZooError, match="somewhere is no 'ppm'"):
        adopt(build_pruner("ppm", **PPM), build_pruner("ppm", **{**PPM, "blocks": 2}), "somewhere")
