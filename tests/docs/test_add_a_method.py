"""docs/add_a_method.md, followed to the letter in a copy of the clone, and in a package of one's own."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "add_a_method.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+) ?(\w*)\n(.*?)^```$", PAGE, re.S | re.M)
(METHOD,) = (text for _, needs, text in BLOCKS if needs == "file")
(PACKAGE,) = (text for _, needs, text in BLOCKS if needs == "package")
(ENTRY_POINT,) = (text for language, _, text in BLOCKS if language == "toml")
CODE = [text for language, needs, text in BLOCKS if (language, needs) == ("python", "")]
COMMANDS = [line for language, _, text in BLOCKS if language == "bash" for line in text.splitlines()]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """Its files, in which a method can be added."""
    folder = tmp_path_factory.mktemp("above") / "prunezoo"
    for name in ("modules", "trainers", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("checkpoints", "configs", "docs", "hub_cards", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def run(words, clone, *paths):
    """A process at the root of the clone, which imports the clone's package."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*paths, clone / "modules"])), "COLUMNS": "200"}
    done = subprocess.run([sys.executable, *words], cwd=clone, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def follow(clone, *paths, commands=COMMANDS):
    """All that the page says to run: what each command printed, by its name."""
    for code in CODE:
        run(["-c", code], clone, *paths)
    return {words[2]: run(words[1:], clone, *paths) for words in map(shlex.split, commands)}


def passed_of(said):
    """How many pytest says that have passed, where none has failed."""
    (passed,) = re.findall(r"(\d+) passed, \d+ deselected", said)
    return int(passed)


def test_a_file_where_the_page_says_is_a_method(clone):
    (path,) = re.findall(r"Write `([\w/]+\.py)`", PAGE)
    (clone / path).write_text(METHOD)
    try:
        said = follow(clone)
    finally:
        (clone / path).unlink()
    assert "(brightest, training-free, prompt stage)" in said["trainers.list"]
    assert "keep the tokens with the largest norm" in said["trainers.list"]
    assert passed_of(said["pytest"]) >= 15
    assert re.search(r"brightest +16\b", said["trainers.evaluate"])


def test_a_package_of_ones_own_brings_it(clone, tmp_path):
    (name,) = re.findall(r"here `(\w+\.py)`", PAGE)
    (tmp_path / name).write_text(PACKAGE)
    ((group, points),) = tomllib.loads(ENTRY_POINT)["project"]["entry-points"].items()
    info = tmp_path / "brightest_zoo-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brightest-zoo\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items()))
    said = follow(clone, tmp_path, commands=[command for command in COMMANDS if "evaluate" not in command])
    assert "(brightest, training-free, prompt stage)" in said["trainers.list"]
    assert passed_of(said["pytest"]) >= 15
