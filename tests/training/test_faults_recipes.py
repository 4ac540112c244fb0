"""A stranger's recipe: no code of other packages without a flag, no values without end."""

import os
import subprocess
import sys

import pytest

from prunezoo import PruneZooError
from trainers.cli.names import ROOT
from trainers.cli.recipes import load_yaml
from trainers.fit import FLAG, build

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]\n" for i in range(1, 10)
)
CODE = "from pathlib import Path\nPath('ran').touch()\nimport lightning as L\nclass Mine(L.Callback):\n    pass\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LAUGHS, "asks for more than 10,000 values"),
        ("a: &a [*a]", "asks for more than 10,000 values"),
        ("a: " + "[" * 100_000, "levels deep"),
        ("a: " + "x" * (1 << 21), "longer than any recipe"),
    ],
    ids=["laughs", "itself", "deep", "long"],
)
def test_values_without_end(tmp_path, monkeypatch, text, words):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    monkeypatch.setattr("sys.argv", ["fit"])
    with pytest.raises(PruneZooError, match=words) as caught:
        build(["--config", str(path)])
    assert "\n" not in str(caught.value)


def test_numbers_and_aliases_as_before():
    assert load_yaml("a: &a {lr: 1e-3}\nb: *a\nc: [1, .5, yes, null]") == {
        "a": {"lr": 0.001}, "b": {"lr": 0.001}, "c": [1, 0.5, True, None]
    }  # fmt: skip


@pytest.mark.parametrize(
    "option",
    [
        "--trainer.callbacks=stranger.Mine",
        "--trainer.logger=stranger.Mine",
        "--model=stranger.Mine",
        "--data=stranger.Mine",
    ],
)
def test_code_of_the_working_directory(tmp_path, monkeypatch, option):
    (tmp_path / "stranger.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("sys.argv", ["fit"])
    with pytest.raises(PruneZooError, match=rf"stranger.Mine is of no package that recipes name.*{FLAG}"):
        build(["--config", "ppm_tiny", option])
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("words", [[], [FLAG]])
def test_such_code_runs_where_the_command_line_says_so(words, tmp_path):
    (tmp_path / "stranger.py").write_text(CODE)
    arguments = ["--config", str(ROOT / "configs" / "ppm_tiny.yaml"), "--trainer.callbacks=stranger.Mine", *words]
    ran = subprocess.run(
        [sys.executable, "-m", "trainers.fit", *arguments, "--print_config"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [ROOT, ROOT / "modules", tmp_path]))},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (ran.returncode == 0) is bool(words), ran.stderr[-2000:]
    assert (tmp_path / "ran").exists() is bool(words)
