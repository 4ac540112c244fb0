"""Small trainings: their data, the words of their command line, and how they are run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_llava import make_image

from trainers.cli import recipes
from trainers.fit import main

recipes.PACKAGES.append("spies")  # callbacks of the tests, for trainings in this process
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def world(tiny_llava, tmp_path_factory):
    """A folder with what a user brings, and the words that point the LLaVA recipe at it."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "images").mkdir()
    entries = []
    for number in range(24):
        make_image(number).save(folder / "images" / f"{number}.jpg")
        talk = [("<image>\nwhat color is the ball ?", "red"), ("is the box left ?", "yes")]
        turns = [
            {"from": who, "value": text} for pair in talk for who, text in zip(("human", "gpt"), pair, strict=True)
        ]
        entries.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(entries))
    return folder


def words(world: Path, vlm: Path, out: Path, *extra: str) -> list[str]:
    pruner = {"width": 32, "hidden": 16, "heads": 2, "blocks": 1, "text_blocks": 1}
    return [
        f"--config={ROOT / 'configs' / 'ppm_llava.yaml'}",
        f"--model.vlm={vlm}",
        "--model.vlm_dtype=float32",
        *(f"--model.pruner.config.{key}={value}" for key, value in pruner.items()),
        f"--data.json={world / 'data.json'}",
        f"--data.images={world / 'images'}",
        "--data.batch_size=4",
        "--data.workers=0",
        "--data.validation_share=0.3",
        "--trainer.precision=32",
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=8",
        "--trainer.val_check_interval=4",
        "--trainer.num_sanity_val_steps=0",
        "--trainer.enable_model_summary=false",
        "--checkpoint.every_n_train_steps=2",
        f"--out={out}",
        *extra,
    ]


def short(world, vlm, out, *extra):
    """A training of four steps, in this process, that validates nothing."""
    quick = "--trainer.max_steps=4", "--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false"
    return words(world, vlm, out, *quick, *extra)


def checkpoints(out):
    return out / "training" / "checkpoints"


def run(arguments: list[str], **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "trainers.fit", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, **options)


def one_line_error(capsys, monkeypatch, arguments: list[str], command=main) -> str:
    monkeypatch.setattr(sys, "argv", ["fit"])  # LightningCLI warns about pytest's own words otherwise
    with pytest.raises(SystemExit) as stopped:
        command(arguments)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and message.startswith("error: "), message
    return message
