"""Runs that are killed, stopped or spoilt: what is left of them, and that they can go on as if nothing had been."""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from launch import Run

from trainers.fit import main

ROOT = Path(__file__).parent.parent.parent
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
        run = start("killed")
        goal = max(steps, default=0) + chance.choice((0, 0, 2, 4, 6))  # with 0 it dies while it starts
        while run.alive() and goal > max(map(step_of, checkpoints.glob("*.ckpt")), default=0):
            time.sleep(0.001)
        time.sleep(chance.uniform(0.0, 0.1))
        run.kill()
        for path in checkpoints.glob("*.ckpt"):  # whatever is there is whole
            assert torch.load(path, weights_only=False)["global_step"] > 0
        steps.append(last(out)["global_step"] if (checkpoints / "last.ckpt").exists() else 0)
    assert len({step for step in steps if 0 < step < STEPS}) > 2, f"not killed in the middle: {steps}"
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
    run = Run(words(out, "--trainer.max_steps=2000", "--data.workers=2"), tmp_path / "log")
    (process,) = run.processes
    path = out / "training" / "checkpoints" / "last.ckpt"
    while not path.exists() and run.alive():
        time.sleep(0.01)
    os.killpg(process.pid, number)
    process.join(120)
    said = run.log.read_text()
    assert process.exitcode == 128 + number, said
    assert "DataLoader worker" not in said and "Traceback" not in said, said
    assert last(out)["global_step"] == max(step_of(path) for path in path.parent.glob("epoch*.ckpt"))


@pytest.mark.parametrize(
    ("weight", "said"),
    [("false", "error: the loss of step 5 is not finite"), ("true", "error: pruner 'ppm' scored NaN")],
)
def test_what_is_no_number_stops_the_run_and_names_the_samples(weight, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fit"])
    out = tmp_path / "run"
    spoil = (
        "--trainer.callbacks+=spies.SpoilAt",
        "--trainer.callbacks.step=5",
        f"--trainer.callbacks.weight={weight}",
    )
    with pytest.raises(SystemExit) as stopped:
        main(words(out, *spoil, "--data.workers=0"))
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and message.startswith(said), message
    noted = json.loads((out / "training" / "failed_batch_0.json").read_text())
    assert noted["step"] == 5 and noted["error"] in message
    assert len(noted["ids"]) == 2 and all(name.startswith("train-") for name in noted["ids"])
    assert all(value.isfinite().all() for value in weights(out).values()) and last(out)["global_step"] == 5
    main(words(out, "--ckpt_path=last", "--trainer.max_steps=8", "--data.workers=0"))
    assert last(out)["global_step"] == 8
