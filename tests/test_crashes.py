"""Runs that are killed, stopped or spoilt: what is left of them, and that they can go on as if nothing had been."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from launch import Run

from trainers.fit import main

ROOT = Path(__file__).parent.parent
STEPS, KILLS = 40, 10


def words(out: Path, *extra: str) -> list[str]:
    return [
        f"--config={ROOT / 'configs' / 'ppm_tiny.yaml'}",
        f"--model.vlm={ROOT / 'checkpoints' / 'tiny-llava'}",
        "--model.guide_share=0.5",
        "--data.batch_size=2",
        "--data.workers=1",
        "--data.validation_items=4",
        f"--trainer.max_steps={STEPS}",
        "--trainer.limit_val_batches=0",
        "--trainer.precision=32-true",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--checkpoint.every_n_train_steps=2",
        f"--out={out}",
        *extra,
    ]


def last(out: Path) -> dict:
    return torch.load(out / "training" / "checkpoints" / "last.ckpt", weights_only=False)


def step_of(path: Path) -> int:
    """By the name of a checkpoint; 0 for the last."""
    return int(path.stem.rpartition("step=")[2]) if "step=" in path.stem else 0


def weights(out: Path) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in last(out)["state_dict"].items()}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_ten_times_ends_as_one_that_was_not(processes, tmp_path):
    """Bit for bit on one process; on two, gloo may add up in another order."""
    extra = ["--trainer.strategy=ddp", "--data.batch_size=1"] if processes > 1 else []

    def start(name: str) -> Run:
        arguments = words(tmp_path / name, "--ckpt_path=last", *extra)
        return Run(arguments, tmp_path / f"{name}.log", processes)

    start("straight").finish()
    chance, out, steps = random.Random(7), tmp_path / "killed", []
    checkpoints = out / "training" / "checkpoints"
    for _ in range(KILLS):
        run, written = start("killed"), set(steps)
        patience = chance.randint(0, 3)  # checkpoints that it may write; with 0 it dies while it starts
        while patience and run.alive():
            time.sleep(0.001)
            patience -= len(now := {step_of(path) for path in checkpoints.glob("*.ckpt")} - written) > 0
            written |= now
        time.sleep(chance.uniform(0.0, 0.1))
        run.kill()
        for path in checkpoints.glob("*.ckpt"):  # whatever is there is whole
            assert torch.load(path, weights_only=False)["global_step"] > 0
        steps.append(last(out)["global_step"] if (checkpoints / "last.ckpt").exists() else 0)
    assert len({step for step in steps if 0 < step < STEPS}) > 3, f"not killed in the middle: {steps}"
    start("killed").finish()
    ours, theirs = weights(out), weights(tmp_path / "straight")
    tolerance = {"rtol": 0, "atol": 0} if processes == 1 else {"rtol": 1e-4, "atol": 1e-6}
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, **tolerance)
    assert not list((out / "training" / "checkpoints").glob(".*")), "no debris"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_process_group_leaves_a_checkpoint(number, tmp_path):
    """As torchrun, SLURM and Ctrl-C send it: loader workers get it too, and must not die of it."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "trainers.fit", *words(out, "--trainer.max_steps=2000", "--data.workers=2")]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    path = out / "training" / "checkpoints" / "last.ckpt"
    while not path.exists() and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, errors
    assert "DataLoader worker" not in errors and "Traceback" not in errors, errors
    assert last(out)["global_step"] == max(step_of(path) for path in path.parent.glob("epoch*.ckpt"))


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_samples(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fit"])
    out = tmp_path / "run"
    spoil = "--trainer.callbacks+=conftest.SpoilAt", "--trainer.callbacks.step=5"
    with pytest.raises(SystemExit) as stopped:
        main(words(out, *spoil, "--data.workers=0"))
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and message.startswith("error: the loss of step 5 is not finite"), message
    noted = json.loads((out / "training" / "nan_batch.json").read_text())
    assert noted["step"] == 5 and noted["processes"][0]["loss"] == "nan"
    ids = noted["processes"][0]["ids"]
    assert len(ids) == 2 and all(name.startswith("train-") for name in ids)
    assert all(value.isfinite().all() for value in weights(out).values()) and last(out)["global_step"] == 5
    main(words(out, "--ckpt_path=last", "--trainer.max_steps=7", "--data.workers=0"))
    assert last(out)["global_step"] == 7
