"""Runs in each other's way, and what ends one: one line, and nothing lost."""

import errno
import fcntl
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from launch import Holder, Run
from PIL import Image
from trainings import checkpoints, one_line_error, short, words

from prunezoo import PruneZooError
from trainers import benchmark, codec, evaluate, fit
from trainers.cli.errors import command
from trainers.cli.lock import held, hold
from trainers.data.loading import begin_worker
from trainers.data.modules import SuiteDataModule
from trainers.data.photographs import PhotographDataModule
from trainers.pretraining.build import Sizes
from trainers.pretraining.train import Machine, Phase, train

ROOT = Path(__file__).parent.parent.parent
VLM = str(ROOT / "checkpoints" / "tiny-llava")
TOKENIZER = str(ROOT / "checkpoints" / "one-d-piece-tiny")


@pytest.fixture(autouse=True)
def no_words(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fit"])


def lines_of(command_name, place, world, vlm):
    """A command line of each command that writes to a place over time."""
    return {
        "fit": lambda: fit.main(short(world, vlm, place)),
        "evaluate": lambda: evaluate.main(
            ["--vlm", VLM, "--pruner", "uniform", "--suite", "scenes", "--limit", "7", "--json", str(place)]
        ),
        "benchmark": lambda: benchmark.main(["--vlm", VLM, "--pruner", "uniform", "--json", str(place)]),
        "codec measure": lambda: codec.main(
            ["measure", "--tokenizer", TOKENIZER, "--images", str(world / "images"), "--json", str(place)]
        ),
        "codec speed": lambda: codec.main(["speed", "--tokenizer", TOKENIZER, "--json", str(place)]),
        "pretrain": lambda: pretrain_in(place),
    }[command_name]


def pretrain_in(place):
    phase = Phase(steps=1, batch_size=2)
    sizes = Sizes(tower_width=32, tower_layers=1, width=32, layers=1)
    machine = Machine(accelerator="cpu", precision="32-true", workers=0)
    command(train)(phase, phase, out=str(place / "vlm"), work=str(place), sizes=sizes, machine=machine)


@pytest.mark.parametrize("name", ["fit", "evaluate", "benchmark", "codec measure", "codec speed", "pretrain"])
def test_a_second_run_in_one_place_is_refused_and_spoils_nothing(name, world, tiny_llava_folder, tmp_path, capsys):
    folder = name in ("fit", "pretrain")
    place = tmp_path / "place"
    locked = place / "tower" if name == "pretrain" else place
    with Holder(locked, folder) as holder:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as refused:
            lines_of(name, place, world, tiny_llava_folder)()
        assert sorted(tmp_path.rglob("*")) == before
    message = capsys.readouterr().err.strip().splitlines()[-1]
    option = {"fit": "--out", "pretrain": "work"}.get(name, "--json")
    assert refused.value.code == 2
    assert message.startswith(f"error: {option} {locked}: a run is writing there, process {holder.pid} on "), message


def test_what_a_crash_leaves_of_a_lock_locks_nothing(tmp_path):
    with Holder(tmp_path) as holder:
        with pytest.raises(PruneZooError, match="a run is writing there"), held("--out", tmp_path, folder=True):
            pass
        holder.kill()
        assert (tmp_path / ".lock").exists()
        with held("--out", tmp_path, folder=True):
            assert (tmp_path / ".lock").read_text().startswith(f"{os.getpid()} on ")
    assert not list(tmp_path.iterdir())


def test_children_do_not_keep_the_lock_of_a_run_that_was_killed(tmp_path):
    """As loader workers, forked while it is held, that outlive it."""
    read, write = os.pipe()
    parent = os.fork()
    if not parent:
        with held("--out", tmp_path, folder=True):
            child = os.fork()
            if not child:
                time.sleep(60)
                os._exit(0)
            os.write(write, f"{child}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)
    child = int(os.read(read, 100))
    os.waitpid(parent, 0)
    try:
        with held("--out", tmp_path, folder=True):
            os.kill(child, 0)  # it is still there
    finally:
        os.kill(child, signal.SIGKILL)


def test_one_place_by_two_names_is_one_place(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    with Holder(tmp_path / "real"):
        for name in ("link", "real/../real", "./real"):
            with pytest.raises(PruneZooError), held("--out", Path(name), folder=True):
                pass
    with Holder(tmp_path / "real" / "e.json", folder=False):
        with pytest.raises(PruneZooError), held("--json", Path("link/e.json")):
            pass
        with held("--json", Path("link/other.json")):
            pass
        Path("alias.json").symlink_to("real/e.json")  # its lock would be another file, but for `resolve`
        with pytest.raises(PruneZooError), held("--json", Path("alias.json")):
            pass


@pytest.mark.parametrize(
    "ranks",
    [{"RANK": "3", "LOCAL_RANK": "3"}, {"LOCAL_RANK": "1"}, {"SLURM_PROCID": "8"}, {"NODE_RANK": "1"}],
)
def test_only_the_first_process_of_a_run_takes_the_lock(ranks, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with Holder(tmp_path):
        with pytest.raises(SystemExit):
            command(hold)("--out", tmp_path, folder=True)
        for name, value in ranks.items():
            monkeypatch.setenv(name, value)
        command(hold)("--out", tmp_path, folder=True)


def test_processes_of_one_run_do_not_lock_each_other_out(world, tiny_llava_folder, tmp_path):
    arguments = short(world, tiny_llava_folder, tmp_path / "out", "--trainer.strategy=ddp", "--data.batch_size=2")
    Run(arguments, tmp_path / "log", processes=2).finish()
    assert (tmp_path / "out" / "model.safetensors").exists() and not (tmp_path / "out" / ".lock").exists()


def test_a_command_that_ends_gives_its_place_back(world, tiny_llava_folder, tmp_path, capsys):
    place = tmp_path / "e.json"
    assert lines_of("evaluate", place, world, tiny_llava_folder)() == 0
    with pytest.raises(SystemExit):
        fit.main(short(world, tiny_llava_folder, tmp_path / "out", "--ckpt_path=nowhere.ckpt"))
    for where, folder in ((place, False), (tmp_path / "out", True)):
        with Holder(where, folder):
            pass
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["e.json"]


def test_a_file_system_without_locks_is_said_and_used(tmp_path, capsys, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    with held("--out", tmp_path, folder=True):
        pass
    assert "knows no locks; start no second run there" in capsys.readouterr().err


@pytest.mark.parametrize("rate", ["1e38", "1e30"])
def test_a_learning_rate_without_bounds_is_one_line(rate, world, tiny_llava_folder, tmp_path, capsys, monkeypatch):
    arguments = short(world, tiny_llava_folder, tmp_path, f"--model.lr={rate}", "--model.warm_up=0")
    message = one_line_error(capsys, monkeypatch, arguments)
    assert "lower model.lr" in message or "NaN" in message, message


def loader_workers(run):
    """Processes that a training has started."""
    (process,) = run.processes
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def started(world, vlm, out, log, *extra):
    """A long training in a process of its own, with its first checkpoint written."""
    endless = "--trainer.max_steps=100000", "--data.workers=1", "--checkpoint.every_n_train_steps=2"
    run = Run(short(world, vlm, out, *endless, *extra), log)
    while not (checkpoints(out) / "last.ckpt").exists():
        assert run.alive(), log.read_text()
        time.sleep(0.01)
    return run


def test_a_loader_worker_that_is_killed_is_one_line_and_the_checkpoint_stays(world, tiny_llava_folder, tmp_path):
    """As the system does where memory ends."""
    log, out = tmp_path / "log", tmp_path / "out"
    run = started(world, tiny_llava_folder, out, log)
    for pid in loader_workers(run):
        os.kill(pid, signal.SIGKILL)
    run.processes[0].join(60)
    said = log.read_text().strip().splitlines()
    assert run.processes[0].exitcode == 2 and "Traceback" not in log.read_text(), said[-5:]
    assert said[-1].startswith("error: a process that loads data was killed"), said[-1]
    assert torch.load(checkpoints(out) / "last.ckpt", weights_only=False)["global_step"] % 2 == 0


def test_a_second_ctrl_c_ends_at_once_with_130_and_one_line(world, tiny_llava_folder, tmp_path):
    """In the middle of a step that takes long; the checkpoint before stays."""
    log, out = tmp_path / "log", tmp_path / "out"
    run = started(world, tiny_llava_folder, out, log, "--trainer.callbacks+=spies.Dawdle")
    (process,) = run.processes
    while not (out / "dawdling").exists() and run.alive():
        time.sleep(0.01)
    for _ in range(2):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.3)
    process.join(20)
    assert process.exitcode == 130 and log.read_text().strip().splitlines()[-1] == "stopped", log.read_text()
    assert "Traceback" not in log.read_text()
    assert torch.load(checkpoints(out) / "last.ckpt", weights_only=False)["global_step"] > 0
    assert not (out / ".lock").exists()


def test_the_log_and_its_hyper_parameters_lie_below_out(world, tiny_llava_folder, tmp_path):
    for kind, name in (("csv", "metrics.csv"), ("tensorboard", "events.out.tfevents.*")):
        out = tmp_path / kind
        fit.main(short(world, tiny_llava_folder, out, f"--logger={kind}", "--trainer.log_every_n_steps=1"))
        (log,) = (out / "training" / "logs" / "version_0").glob(name)
        assert log.stat().st_size
        saved = yaml.safe_load((log.parent / "hparams.yaml").read_text())
        assert saved["model"]["init_args"]["lr"] > 0 and saved["trainer"]["max_steps"] == 4, saved
        assert (log.parent / "config.yaml").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"csv", "tensorboard"}


def test_a_log_that_needs_a_package_says_which(world, tiny_llava_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", False)
    message = one_line_error(capsys, monkeypatch, short(world, tiny_llava_folder, tmp_path, "--logger=wandb"))
    assert message == "error: --logger=wandb needs another package: pip install wandb"


def test_a_second_run_is_told_before_a_model_is_loaded(world, tiny_llava_folder, tmp_path, capsys, monkeypatch):
    def load(*_):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("trainers.training.frozen.load_frozen", load)
    (tmp_path / "out").mkdir()
    with Holder(tmp_path / "out", True):
        said = one_line_error(capsys, monkeypatch, words(world, tiny_llava_folder, tmp_path / "out"))
    assert "a run is writing there" in said


@pytest.mark.parametrize("name", ["photographs", "items"])
def test_workers_of_validation_leave_signals_to_the_training(name, tmp_path, tiny_llava_folder):
    for number in range(40):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / f"{number}.png")
    data = {
        "photographs": lambda: PhotographDataModule(str(tmp_path), size=32, batch_size=2),
        "items": lambda: SuiteDataModule(str(tiny_llava_folder)),
    }[name]()
    data.setup()
    assert data.val_dataloader().worker_init_fn is begin_worker
