"""What has changed between two starts of a run, checkpoints and recipes of before: taken, or one line; nothing lost."""

import errno
import json
import re
import shutil
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from trainings import checkpoints, one_line_error, short

from trainers import fit
from trainers.cli.moved import moved
from trainers.training.callbacks import WholeCheckpoints

ROOT = Path(__file__).parent.parent.parent
VLM = str(ROOT / "checkpoints" / "tiny-llava")


@pytest.fixture(autouse=True)
def no_words(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fit"])


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


def test_a_checkpoint_of_weights_that_are_no_numbers_takes_no_good_ones_place(
    copy, world, tiny_llava_folder, capsys, monkeypatch
):
    path = checkpoints(copy) / "last.ckpt"
    before = path.read_bytes()
    spoil = "--trainer.callbacks+=spies.SpoilWeights", "--trainer.callbacks.step=3"
    one_line_error(capsys, monkeypatch, short(world, tiny_llava_folder, copy, "--ckpt_path=last", *spoil))
    assert path.read_bytes() == before
