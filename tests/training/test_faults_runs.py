"""Runs in each other's way, and what ends or has changed between two of them: one line, and nothing lost."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import sys
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from launch import Holder, Run
from trainings import one_line_error, words

from prunezoo import PruneZooError
from trainers import benchmark, codec, evaluate, fit, pretrain
from trainers.cli.errors import command
from trainers.cli.lock import held, hold
from trainers.cli.moved import moved
from trainers.evaluation.journal import Journal
from trainers.evaluation.scores import ItemScores
from trainers.training.callbacks import WholeCheckpoints

ROOT = Path(__file__).parent.parent.parent
VLM = str(ROOT / "checkpoints" / "tiny-llava")
TOKENIZER = str(ROOT / "checkpoints" / "one-d-piece-tiny")


@pytest.fixture(autouse=True)
def no_words(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fit"])


def short(world, vlm, out, *extra):
    """A training of four steps, in this process, that validates nothing."""
    quick = "--trainer.max_steps=4", "--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false"
    return words(world, vlm, out, *quick, *extra)


def checkpoints(out):
    return out / "training" / "checkpoints"


# -- two runs in one place ---------------------------------------------------------------------------------------------


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
    phase = pretrain.Phase(steps=1, batch_size=2)
    sizes = pretrain.Sizes(tower_width=32, tower_layers=1, width=32, layers=1)
    machine = pretrain.Machine(accelerator="cpu", precision="32-true", workers=0)
    command(pretrain.train)(phase, phase, out=str(place / "vlm"), work=str(place), sizes=sizes, machine=machine)


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


# -- going on ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def begun(world, tiny_llava_folder, tmp_path_factory):
    """A run of two steps, with its checkpoint."""
    out = tmp_path_factory.mktemp("begun") / "out"
    patch = pytest.MonkeyPatch()
    patch.setattr(sys, "argv", ["fit"])
    fit.main(short(world, tiny_llava_folder, out, "--trainer.max_steps=2"))
    patch.undo()
    return out


@pytest.fixture
def copy(begun, tmp_path):
    """Its folder, to be changed."""
    shutil.copytree(begun, tmp_path / "out")
    return tmp_path / "out"


def steps(out):
    """Of the run that was recorded last, from the first one that it did itself."""
    return json.loads((out / "run.json").read_text())["steps"]


@pytest.mark.parametrize("left", ["last.ckpt", "epoch=0-step=2.ckpt"])
def test_last_is_the_newest_checkpoint_that_is_there(left, copy, world, tiny_llava_folder, monkeypatch, caplog):
    """A crash between the two files of a checkpoint leaves the first."""
    for path in checkpoints(copy).iterdir():
        if path.name != left:
            path.unlink()
    taken = []
    load = WholeCheckpoints.load_checkpoint
    monkeypatch.setattr(
        WholeCheckpoints, "load_checkpoint", lambda self, path, *a, **k: taken.append(path) or load(self, path, *a, **k)
    )
    with caplog.at_level("INFO"):
        fit.main(short(world, tiny_llava_folder, copy, "--ckpt_path=last"))
    assert {Path(path).name for path in taken} == {left} and steps(copy) == 4
    assert ("has no last.ckpt; goes on from epoch=0-step=2.ckpt" in caplog.text) == (left != "last.ckpt")
    assert "the training data are not" not in caplog.text


def test_last_where_there_is_none_says_that_it_begins_anew(world, tiny_llava_folder, tmp_path, caplog):
    with caplog.at_level("INFO"):
        fit.main(short(world, tiny_llava_folder, tmp_path, "--ckpt_path=last", "--trainer.max_steps=1"))
    assert "no checkpoint in" in caplog.text and "this run begins anew" in caplog.text


def fewer(entries, images):
    del entries[5]


def reworded(entries, images):
    entries[5]["conversations"][1]["value"] = "blue"


def renamed(entries, images):
    entries[5]["image"] = "6.jpg"


@pytest.mark.parametrize("edit", [fewer, reworded, renamed])
def test_data_that_changed_meanwhile_are_said(edit, copy, world, tiny_llava_folder, tmp_path, caplog):
    entries = json.loads((world / "data.json").read_text())
    edit(entries, world / "images")
    (tmp_path / "data.json").write_text(json.dumps(entries))
    with caplog.at_level("INFO"):
        fit.main(short(world, tiny_llava_folder, copy, "--ckpt_path=last", f"--data.json={tmp_path / 'data.json'}"))
    (said,) = [line for line in caplog.messages if "training data" in line]
    assert said.startswith("the training data are not those that this run was begun with (") and "\n" not in said
    assert steps(copy) == 4


OLD = {
    "hyper_parameters": {
        "_class_path": "trainers.distill.DistillModule",
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
        "pruner": {"class_path": "modules.learned.ppm.PPM"},
    },
    "datamodule_hyper_parameters": {"_class_path": "trainers.data.LlavaJsonDataModule"},
}
"""What a checkpoint could hold of the names that classes had; those that `fit` writes hold none."""


def test_a_checkpoint_of_before_the_move_goes_on_as_one_of_today_does(copy, world, tiny_llava_folder, tmp_path):
    """Bit for bit. Nothing in a checkpoint names a class by its path; where it does, nothing is built from it."""
    plain = shutil.copytree(copy, tmp_path / "plain")
    path = checkpoints(copy) / "last.ckpt"
    with zipfile.ZipFile(path) as made:
        (pickled,) = [name for name in made.namelist() if name.endswith("data.pkl")]
        assert not re.search(rb"(modules|trainers|prunezoo)\.", made.read(pickled))
    old = torch.load(path, weights_only=False)
    del old["callbacks"]["SameData"]
    torch.save({**old, **OLD}, path)
    for out in (copy, plain):
        fit.main(short(world, tiny_llava_folder, out, "--ckpt_path=last"))
    ours, theirs = (torch.load(checkpoints(out) / "last.ckpt", weights_only=False) for out in (copy, plain))
    assert ours["global_step"] == 4
    assert all(torch.equal(ours["state_dict"][name], value) for name, value in theirs["state_dict"].items())


def test_a_class_of_before_that_was_pickled_into_a_checkpoint_is_one_line(
    copy, world, tiny_llava_folder, capsys, monkeypatch
):
    """As a callback of a user's own may do."""
    path = checkpoints(copy) / "last.ckpt"
    gone = types.ModuleType("trainers.distill")
    gone.DistillModule = type("DistillModule", (), {"__module__": "trainers.distill"})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "trainers.distill", gone)
        torch.save({**torch.load(path, weights_only=False), "user": gone.DistillModule()}, path)
    message = one_line_error(capsys, monkeypatch, short(world, tiny_llava_folder, copy, "--ckpt_path=last"))
    assert str(path) in message and "name another" in message


def test_a_recipe_of_before_says_the_new_names(tmp_path, capsys, monkeypatch):
    text = (ROOT / "configs" / "ppm_tiny.yaml").read_text()
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(text.replace("prunezoo.learned", "modules.learned"))
    said = "modules.learned.ppm.PPM is now prunezoo.learned.ppm.PPM; write so in the recipe"
    assert said in one_line_error(capsys, monkeypatch, [f"--config={recipe}", f"--out={tmp_path}"])
    recipe.write_text(text.replace("trainers.training.", "trainers."))
    said = "error: configuration: trainers.distill.DistillModule is now trainers.training.distill.DistillModule; write"
    assert one_line_error(capsys, monkeypatch, [f"--config={recipe}", f"--out={tmp_path}"]).startswith(said)


@pytest.mark.parametrize(
    ("word", "new"),
    [
        ("--data=trainers.cached.TaughtSuite", "trainers.caches.cached.TaughtSuite"),
        ("--trainer.strategy=trainers.strategies.FSDP2", "trainers.training.strategies.fsdp2.FSDP2"),
        ("--trainer.strategy=trainers.training.strategies.Zero", "trainers.training.strategies.zero.Zero"),
        ("--model.pruner=modules.learned.atp.ATP", "prunezoo.learned.atp.ATP"),
    ],
)
def test_a_name_of_before_on_the_command_line_is_said(word, new, tmp_path, capsys, monkeypatch):
    recipe = f"--config={ROOT / 'configs' / 'ppm_tiny.yaml'}"
    arguments = [recipe, f"--model.vlm={VLM}", "--trainer.accelerator=cpu", f"--out={tmp_path}", word]
    assert f" is now {new}; write so in the recipe" in one_line_error(capsys, monkeypatch, arguments)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("modules.learned.ppm.PPM", "prunezoo.learned.ppm.PPM"),
        ("trainers.distill.DistillModule", "trainers.training.distill.DistillModule"),
        ("trainers.cached.TaughtSuite", "trainers.caches.cached.TaughtSuite"),
        ("trainers.strategies.FSDP2", "trainers.training.strategies.fsdp2.FSDP2"),
        ("trainers.training.strategies.Zero", "trainers.training.strategies.zero.Zero"),
        ("trainers.budget_policy.BudgetModule", "trainers.training.budget_policy.BudgetModule"),
    ],
)
def test_a_name_of_before_is_known_by_its_class(old, new):
    assert moved(f"Problem with '{old}': no such") == f"{old} is now {new}"
    assert not moved(f"Problem with '{new}'") and not moved("modules.learned.nothing.Nothing")


# -- what ends a run ---------------------------------------------------------------------------------------------------


def test_run_json_on_a_full_disk_is_whole_or_old(copy, world, tiny_llava_folder, capsys, monkeypatch):
    before = (copy / "run.json").read_bytes()
    write = Path.write_text

    def full(self, text, *args, **kwargs):
        if "run.json" not in self.name:
            return write(self, text, *args, **kwargs)
        write(self, text[: len(text) // 2], *args, **kwargs)
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    message = one_line_error(capsys, monkeypatch, short(world, tiny_llava_folder, copy, "--ckpt_path=last"))
    assert f"{copy / 'run.json'}: no space is left on the disk" in message
    assert (copy / "run.json").read_bytes() == before
    assert not [path for path in copy.iterdir() if "partial" in path.name]


@pytest.mark.parametrize("rate", ["1e38", "1e30"])
def test_a_learning_rate_without_bounds_is_one_line(rate, world, tiny_llava_folder, tmp_path, capsys, monkeypatch):
    arguments = short(world, tiny_llava_folder, tmp_path, f"--model.lr={rate}", "--model.warm_up=0")
    message = one_line_error(capsys, monkeypatch, arguments)
    assert "lower model.lr" in message or "NaN" in message, message


def test_a_checkpoint_of_weights_that_are_no_numbers_takes_no_good_ones_place(
    copy, world, tiny_llava_folder, capsys, monkeypatch
):
    path = checkpoints(copy) / "last.ckpt"
    before = path.read_bytes()
    spoil = "--trainer.callbacks+=spies.SpoilWeights", "--trainer.callbacks.step=3"
    one_line_error(capsys, monkeypatch, short(world, tiny_llava_folder, copy, "--ckpt_path=last", *spoil))
    assert path.read_bytes() == before


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


# -- journals ----------------------------------------------------------------------------------------------------------


def scores_of(items=6):
    scores = {("uniform", "1/9"): ItemScores.empty(items, 2), ("full", "1.0"): ItemScores.empty(items, 2)}
    for of in scores.values():
        for values in vars(of).values():
            values[:] = np.random.default_rng(0).random(values.shape)
    return scores


def rewritten(**changes):
    """A journal in which some arrays are others, or are missing."""

    def spoil(path):
        with path.open("rb") as file:
            arrays = dict(np.load(file))
        arrays = {name: value for name, value in {**arrays, **changes}.items() if value is not None}
        with path.open("wb") as file:
            np.savez(file, **arrays)

    return spoil


def no_zip(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def flipped(path):
    data = bytearray(path.read_bytes())
    for place in range(60, len(data) // 2, 7):
        data[place] ^= 0xFF
    path.write_bytes(data)


SPOILT = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "text": lambda path: path.write_text("no journal"),
    "flipped": flipped,
    "no_zip": no_zip,
    "no_fingerprint": rewritten(fingerprint=None),
    "no_done": rewritten(done=None),
    "no_scores": rewritten(**{"uniform 1/9 kl": None}),
    "short": rewritten(**{"uniform 1/9 kl": np.zeros(1)}),
    "words": rewritten(**{"uniform 1/9 kl": np.array(["x"] * 6)}),
    "groups": rewritten(groups=np.array(["a"])),
    "done_beyond": rewritten(done=np.array(7)),
    "done_below": rewritten(done=np.array(-1)),
    "done_text": rewritten(done=np.array("3")),
    "pickled": rewritten(done=np.array([object()], dtype=object)),
    "other": rewritten(fingerprint=np.array("other settings")),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_journal_that_cannot_be_taken_is_said_in_one_line_and_fills_nothing_in(how, tmp_path, capsys):
    journal = Journal(tmp_path / "e.json.partial.npz", "these settings")
    journal.write(scores_of(), ["a", "b", "c", "", "", ""], 3)
    whole, groups = scores_of(), [""] * 6
    assert journal.read(whole, groups) == 3 and groups[:3] == ["a", "b", "c"] and not capsys.readouterr().err
    SPOILT[how](journal.path)
    scores, groups = {key: ItemScores.empty(6, 2) for key in whole}, [""] * 6
    assert journal.read(scores, groups) == 0
    said = capsys.readouterr().err
    assert said.startswith(f"{journal.path}: ") and said.endswith("; everything is measured anew\n")
    assert said.count("\n") == 1 and len(said) < 500
    assert groups == [""] * 6 and not any(values.any() for of in scores.values() for values in vars(of).values())


# -- logs --------------------------------------------------------------------------------------------------------------


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
