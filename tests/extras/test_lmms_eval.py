"""The real lmms-eval runs prunezoo through its entry point, and finds what `trainers.evaluate` finds.

In an environment of its own: `make test-extras`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval", reason="`make test-extras` installs lmms-eval in an environment of its own")

from datasets import Dataset, DatasetDict, Image

from trainers import evaluate
from trainers.data.suite import load_suite

ROOT = Path(__file__).parent.parent.parent
ITEMS, PRUNER, VLM = 56, "checkpoints/ppm-tiny", "checkpoints/tiny-llava"


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A folder with the task and, as a dataset on disk, the first items of the suite's test split."""
    folder = tmp_path_factory.mktemp("task")
    items = [load_suite("scenes", "test", ITEMS)[i] for i in range(ITEMS)]
    columns = {
        "image": [item.image for item in items],
        "turns": [json.dumps(item.turns) for item in items],
        "answer": [item.answer for item in items],
    }
    DatasetDict({"test": Dataset.from_dict(columns).cast_column("image", Image())}).save_to_disk(folder / "data")
    source = Path(__file__).parent / "scenes"
    text = (source / "prunezoo_scenes.yaml").read_text().replace("DATASET", str(folder / "data"))
    (folder / "scenes").mkdir()
    (folder / "scenes" / "prunezoo_scenes.yaml").write_text(text)
    (folder / "scenes" / "utils.py").write_text((source / "utils.py").read_text())
    return folder


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """What `trainers.evaluate` says of the same questions."""
    out = tmp_path_factory.mktemp("expected") / "record.json"
    os.chdir(ROOT)
    words = ["--vlm", VLM, "--pruner", PRUNER, "divprune", "--keep", "16", "1/18", "--suite", "scenes"]
    assert evaluate.main([*words, "--limit", str(ITEMS), "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    right: dict[tuple[str, str], float] = {}
    for row in rows:
        if row["group"] != "mean":  # groups differ in size: over all questions
            key = row["pruner"], row["keep"]
            right[key] = right.get(key, 0.0) + row["accuracy"] * row["n"] / ITEMS
    return right


def run(task, out, batch, **model_args):
    """The command line of lmms-eval, offline; the accuracy that it reports."""
    words = [sys.executable, "-m", "lmms_eval", "--model", "prunezoo", "--tasks", "prunezoo_scenes"]
    words += ["--include_path", str(task / "scenes"), "--batch_size", str(batch), "--output_path", str(out)]
    words += ["--model_args", ",".join(f"{key}={value}" for key, value in model_args.items()), "--device", "cpu"]
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HOME": str(out / "hf"),
    }
    ran = subprocess.run(words, cwd=ROOT, env={**os.environ, **offline}, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = next(out.rglob("*_results.json"), None)
    assert found, ran.stderr[-3000:]  # it ends with 0 after an error, too
    return json.loads(found.read_text())["results"]["prunezoo_scenes"]["accuracy,none"]


@pytest.mark.parametrize(
    ("pruner", "keep", "batch"), [(PRUNER, "16", 8), (PRUNER, "1/18", 5), ("divprune", "1/18", 1), ("full", "1.0", 8)]
)
def test_lmms_eval_finds_what_evaluate_finds(task, expected, tmp_path, pruner, keep, batch):
    assert run(task, tmp_path, batch, pretrained=VLM, pruner=pruner, keep=keep) == pytest.approx(
        expected[pruner, keep], abs=1e-6
    )


def test_the_budgets_differ(expected):
    """Or the equalities above would say little."""
    assert len({round(value, 6) for value in expected.values()}) >= 3
    assert expected["divprune", "1/18"] < expected[PRUNER, "1/18"]
