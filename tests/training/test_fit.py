"""The training command end to end, on a tiny LLaVA on disk with a LLaVA-style JSON and real image files."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_llava import make_image
from trainings import one_line_error, run, words

from prunezoo import AutoPruner, attach
from trainers.fit import build

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def straight(world, tiny_llava_folder, tmp_path_factory):
    """The unbroken run, by the command line as a user types it."""
    out = tmp_path_factory.mktemp("straight") / "ppm"
    done = run(words(world, tiny_llava_folder, out))
    assert done.returncode == 0, done.stderr
    return out


def test_what_was_trained_loads_and_prunes(straight, tiny_llava):
    pruner = AutoPruner.from_pretrained(straight)
    assert pruner.name == "ppm" and not pruner.training
    batch = tiny_llava.batch(["<s> USER: <image> what color is the ball ? ASSISTANT:"], [[make_image(3)]])
    with attach(tiny_llava.vlm, pruner, keep=5):
        logits = tiny_llava.vlm(**batch).logits
        ids = tiny_llava.vlm.generate(**batch, max_new_tokens=2, do_sample=False)
    assert logits.shape[1] == batch["input_ids"].shape[1] - 31
    assert torch.equal(ids[:, : batch["input_ids"].shape[1]], batch["input_ids"])


def test_a_run_leaves_logs_and_checkpoints_with_only_the_pruner(straight):
    checkpoint = torch.load(straight / "training" / "checkpoints" / "last.ckpt", weights_only=False)
    assert checkpoint["global_step"] == 8
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"pruner"}
    log = (straight / "training" / "logs" / "version_0" / "metrics.csv").read_text()
    for share in ("0.333", "0.222", "0.111", "0.056"):
        assert f"val/accuracy_{share}" in log and f"val/all_{share}" in log


def test_a_stopped_run_goes_on_as_if_it_had_not_been(straight, world, tiny_llava_folder, tmp_path):
    """SIGTERM in the middle of an epoch (it has 8 steps), then `--ckpt_path=last`: the same pruner, bit for bit."""
    out = tmp_path / "ppm"
    arguments = words(world, tiny_llava_folder, out)
    command = [sys.executable, "-m", "trainers.fit", *arguments, "--trainer.limit_val_batches=0"]
    process = subprocess.Popen(
        [*command, "--trainer.max_time=00:00:05:00"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    last = out / "training" / "checkpoints" / "last.ckpt"
    while not last.exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    stopped = torch.load(last, weights_only=False)["global_step"]
    assert stopped < 8, "the run was over before it could be stopped"
    assert process.returncode == 128 + signal.SIGTERM
    done = run([*arguments, "--ckpt_path=last"])
    assert done.returncode == 0, done.stderr
    ours = torch.load(last, weights_only=False)["state_dict"]
    theirs = torch.load(straight / "training" / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_full_disk_leaves_the_checkpoint_before(world, tiny_llava_folder, tmp_path):
    out = tmp_path / "ppm"
    assert run(words(world, tiny_llava_folder, out, "--trainer.max_steps=2")).returncode == 0
    last = out / "training" / "checkpoints" / "last.ckpt"
    before, weights = last.read_bytes(), (out / "model.safetensors").read_bytes()

    def limit() -> None:  # no file may grow beyond this: what a full disk, or a quota, does to a checkpoint
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(weights) // 2, len(weights) // 2))

    done = run([*words(world, tiny_llava_folder, out, "--trainer.max_steps=4"), "--ckpt_path=last"], preexec_fn=limit)
    message = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and message.startswith(f"error: cannot write checkpoint {last.parent}"), done.stderr
    assert "Traceback" not in done.stderr
    assert last.read_bytes() == before and (out / "model.safetensors").read_bytes() == weights
    assert not [path.name for path in last.parent.iterdir() if path.name.startswith(".")], "no debris"
    assert load_file(out / "model.safetensors")


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ("--trainer.max_stepz=3", "max_stepz"),
        ("--model.lrr=1", "lrr"),
        ("--model.pruner.config.hiden=3", "hiden"),
        ("--model.pruner.config.hidden=30", "hidden=30"),
        ("--model.pruner.class_path=prunezoo.learned.ppm.PPMM", "PPMM"),
        ("--model.keep=[0.5,2]", "keep"),
        ("--model.vlm=/nowhere/at/all", "/nowhere/at/all"),
        ("--data.images=/nowhere/at/all", "/nowhere/at/all"),
        ("--data.batch_size=0", "batch_size"),
        ("--config=nowhere.yaml", "nowhere.yaml"),
        ("--model.pruner.config.foo=1", "PPMConfig': Option 'foo' is not accepted; there are: attention_heads, blocks"),
        ("--trainer.precision=foo", "trainer.precision"),
        ("--trainer.max_steps=-5", "max_steps"),
        ("--trainer.devices=0", "devices"),
        ("--trainer.val_check_interval=0", "trainer.val_check_interval=0"),
        ("--model.lr=-1", "model.lr=-1.0: a learning rate is at least 0"),
        ("--out=", "--out is empty"),
        ("--out=README.md", "--out README.md: a file is there"),
        ("--ckpt_path=nowhere.ckpt", "--ckpt_path=nowhere.ckpt: no such file"),
        ("--ckpt_path=docs", "--ckpt_path=docs: no such file"),
        ("--ckpt_path=README.md", "README.md: not a checkpoint that can be read"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(wrong, named, world, tiny_llava_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    message = one_line_error(capsys, monkeypatch, [*words(world, tiny_llava_folder, tmp_path), wrong])
    assert named in message and "Subtypes" not in message and len(message) < 500


def test_a_checkpoint_of_another_recipe_is_one_line_and_stays(
    straight, world, tiny_llava_folder, tmp_path, capsys, monkeypatch
):
    shutil.copytree(straight, tmp_path / "run")
    checkpoint = tmp_path / "run" / "training" / "checkpoints" / "last.ckpt"
    arguments = words(world, tiny_llava_folder, tmp_path / "run", "--ckpt_path=last", "--trainer.max_steps=12")
    message = one_line_error(capsys, monkeypatch, [*arguments, "--model.pruner.config.hidden=32"])
    assert f"--ckpt_path: {checkpoint} is a checkpoint of another recipe, or of other sizes" in message
    assert checkpoint.read_bytes() == (straight / "training" / "checkpoints" / "last.ckpt").read_bytes()


def test_a_misspelt_key_in_a_file_is_named(world, tiny_llava_folder, tmp_path, capsys, monkeypatch):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("model:\n  init_args:\n    guide_shar: 0.5\n")
    arguments = [*words(world, tiny_llava_folder, tmp_path), f"--config={recipe}"]
    assert "guide_shar" in one_line_error(capsys, monkeypatch, arguments)


def test_a_broken_picture_met_by_a_worker_is_one_line(world, tiny_llava_folder, tmp_path, capsys, monkeypatch):
    data = json.loads((world / "data.json").read_text())
    for entry in data:
        (tmp_path / entry["image"]).write_text("no picture")
    arguments = words(world, tiny_llava_folder, tmp_path / "out", f"--data.images={tmp_path}", "--data.workers=1")
    assert "broken image of entry" in one_line_error(capsys, monkeypatch, arguments)


@pytest.mark.parametrize(("has_it", "used"), [(True, "bf16-mixed"), (False, "32-true")])
def test_a_cpu_without_bfloat16_trains_in_float32(has_it, used, world, tiny_llava_folder, tmp_path, monkeypatch):
    """It emulates bfloat16 ten times slower."""
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: has_it)
    cli = build([*words(world, tiny_llava_folder, tmp_path), "--trainer.precision=bf16-mixed"])
    assert cli.trainer.precision == used
    assert f"precision: {used}" in cli.run_record().recipe
