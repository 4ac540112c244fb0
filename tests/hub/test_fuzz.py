"""A folder may come from anybody: two thousand spoiled ones, and one that asks for the moon."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prunezoo import PruneZooError, build_pruner, load_pruner

ROOT = Path(__file__).parent.parent.parent
OURS = {**os.environ, "PYTHONPATH": str(ROOT / "modules")}


def test_spoiled_folders_are_refused_or_load():
    """See `fuzz.py`; a crash, a hang, memory, or anything run or opened elsewhere ends that process with an error."""
    ran = subprocess.run(
        [sys.executable, "tests/helpers/fuzz.py", "2000", "1"],
        cwd=ROOT, env=OURS, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    outcomes = json.loads(ran.stdout.splitlines()[-1])
    assert sum(outcomes.values()) == 2000
    assert outcomes["refused"] > 1000 and outcomes["loaded"] > 20  # it has spoiled them, and not all of them


def test_loading_takes_no_more_than_twice_the_file():
    """A file of more than 96 MiB, under a limit of twice that and a quarter: it loads, and no config asks for more."""
    words = [sys.executable, "tests/helpers/fuzz.py", "large"]
    ran = subprocess.run(
        words,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "modules")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert json.loads(ran.stdout.splitlines()[-1]) == ["loaded", "refused", "refused", "refused"]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"hidden": 2**40}, "they do not belong|has shape|must be|no 'ppm' can be built"),
        ({"blocks": 10**9}, "asks for far more parameters than the"),
        ({"width": 2**62}, "no 'ppm' can be built of this config"),
        ({"width": "32"}, "config key 'width' of PPMConfig must be int, got '32'"),
        ({"query_aware": 1}, "config key 'query_aware' of PPMConfig must be bool, got 1"),
    ],
)
def test_a_config_that_asks_for_more_than_the_file_holds(tmp_path, config, words):
    folder = build_pruner("ppm", width=32, hidden=16, heads=2, blocks=1, text_blocks=1).save_pretrained(tmp_path)
    stored = json.loads((folder / "config.json").read_text())
    stored["config"].update(config)
    (folder / "config.json").write_text(json.dumps(stored))
    with pytest.raises(PruneZooError, match=words):
        load_pruner(folder)
