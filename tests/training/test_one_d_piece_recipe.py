"""The large recipes of One-D-Piece train as its authors' configs say: AdamW, schedule, averaged weights."""

import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_tokenizer import TINY, save_photographs, tiny

from prunezoo import PruneZooError
from trainers.cli import recipes
from trainers.fit import main as fit
from trainers.training.tokenizer import TokenizerModule

CONFIGS = Path(__file__).parent.parent.parent / "configs"
SIZES = ("s", "b", "l")


def recipe(size: str) -> dict:
    return yaml.safe_load((CONFIGS / f"one_d_piece_{size}.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("size", SIZES)
def test_the_rate_rises_over_ten_thousand_steps_and_falls_to_a_tenth(size):
    of = recipe(size)
    options = {key: of["model"]["init_args"][key] for key in ("lr", "warm_up", "floor", "betas", "weight_decay")}
    module = TokenizerModule(tiny(), measure=(1,), **options)
    steps = module.total_steps = of["trainer"]["max_steps"]
    setup = module.configure_optimizers()
    optimizer, schedule = setup["optimizer"], setup["lr_scheduler"]["scheduler"]
    assert optimizer.defaults["betas"] == (0.9, 0.99) and optimizer.param_groups[0]["weight_decay"] == 1e-4
    rate = schedule.lr_lambdas[0]
    assert max(range(0, 30_000, 10), key=rate) == pytest.approx(10_000, rel=0.01) and rate(10_050) == pytest.approx(1)
    assert 1e-4 * rate(steps) == pytest.approx(1e-5) and rate(steps // 2) == pytest.approx(0.55, abs=0.01)


@pytest.fixture
def words(tmp_path, monkeypatch):
    """A run of twelve steps of a tiny tokenizer under the recipe's own callback of averages."""
    callbacks = recipe("s")["trainer"]["callbacks"]
    callbacks[0]["init_args"]["decay"] = 0.9  # for a run of few steps
    averaging = {"trainer": {"callbacks": callbacks}, "export": recipe("s")["export"]}
    (tmp_path / "averaging.yaml").write_text(yaml.safe_dump(averaging))
    monkeypatch.setattr(sys, "argv", ["fit"])
    return [
        f"--config={CONFIGS / 'one_d_piece_tiny.yaml'}",
        f"--config={tmp_path / 'averaging.yaml'}",
        *(f"--model.tokenizer.config.{key}={value}" for key, value in TINY.items()),
        "--model.measure=[1,24]",
        f"--data.images={save_photographs(tmp_path / 'photographs')}",
        "--data.size=32",
        "--data.workers=0",
        "--trainer.precision=32",
        "--trainer.accelerator=cpu",
        "--trainer.val_check_interval=5",
        "--trainer.max_steps=12",
        "--checkpoint.every_n_train_steps=6",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
    ]


def test_what_is_written_is_the_average_of_the_weights(words, tmp_path):
    """A checkpoint holds both, the average and what is trained on."""
    fit([*words, f"--out={tmp_path / 'out'}"])
    saved = torch.load(tmp_path / "out/training/checkpoints/last.ckpt", weights_only=False)
    written = load_file(tmp_path / "out/model.safetensors")
    averaged, current = saved["state_dict"], saved["current_model_state"]
    for name, value in written.items():
        torch.testing.assert_close(value, averaged[f"tokenizer.{name}"], rtol=0, atol=0)
    moved = [name for name, value in written.items() if not torch.equal(value, current[f"tokenizer.{name}"])]
    assert "decoder.mask_token" in moved and "quantize.codebook" not in moved  # it is an average already


def test_the_average_of_a_resumed_run_is_that_of_an_unbroken_one(words, tmp_path, monkeypatch):
    """Stopped behind step 8, where the last checkpoint is of step 6."""
    fit([*words, f"--out={tmp_path / 'unbroken'}"])
    monkeypatch.setattr(recipes, "PACKAGES", [*recipes.PACKAGES, "spies"])
    stop = ("--trainer.callbacks+=spies.StopAt", "--trainer.callbacks.step=8")
    with pytest.raises(SystemExit) as stopped:
        fit([*words, f"--out={tmp_path / 'resumed'}", *stop])
    assert stopped.value.code == 128 + signal.SIGTERM and not (tmp_path / "resumed/model.safetensors").exists()
    fit([*words, f"--out={tmp_path / 'resumed'}", "--ckpt_path=last"])
    unbroken, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("unbroken", "resumed"))
    assert unbroken.keys() == resumed.keys()
    for name, value in unbroken.items():
        assert torch.equal(value, resumed[name]), name


def test_a_floor_beyond_the_peak_is_refused():
    module = TokenizerModule(tiny(), measure=(1,), floor=1.5)
    module.total_steps = 10
    with pytest.raises(PruneZooError, match=r"model.floor=1.5"):
        module.configure_optimizers()
