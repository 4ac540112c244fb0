"""Methods from outside the repository: distributions with entry points of `prunezoo.pruners`, installed for real."""

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).parent.parent.parent
GOOD = '''
"""Keeps what is largest."""

from prunezoo import PruneInputs, Pruner, register_pruner


@register_pruner("{name}")
class Plugged(Pruner):
    """Keeps the tokens with the largest norm."""

    stage = "prompt"

    def score(self, inputs: PruneInputs):
        """(B, N)."""
        return inputs.features.norm(dim=-1)
'''


def install(site: Path, distribution: str, code: str) -> None:
    """What an installer writes: a package, and the folder that tells of it."""
    package = distribution.replace("-", "_")
    (site / f"{package}.py").write_text(code)
    info = site / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[prunezoo.pruners]\n{package} = {package}\n")
    (info / "RECORD").write_text("")


def run(site: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, which finds what is installed there."""
    paths = [str(site), str(ROOT / "modules")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture
def site(tmp_path):
    folder = tmp_path / "site-packages"
    folder.mkdir()
    return folder


def test_a_plug_in_is_a_method_like_any_other(site, tmp_path):
    install(site, "zoo-brightest", GOOD.format(name="plugged"))
    program = f"""
        import torch
        from prunezoo import AutoPruner, PruneInputs, build_pruner, list_pruners
        assert "plugged" in list_pruners() and "ppm" in list_pruners()
        build_pruner("plugged").save_pretrained({str(tmp_path / "saved")!r})
        pruner = AutoPruner.from_pretrained({str(tmp_path / "saved")!r})
        features = torch.tensor([[[1.0], [3.0], [2.0]]])
        inputs = PruneInputs(features, torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3, 3, dtype=torch.long))
        print(type(pruner).__module__, pruner(inputs, 2).index.tolist())
    """
    done = run(site, "-c", dedent(program))
    assert (done.stdout.strip(), done.stderr) == ("zoo_brightest [[1, 2]]", ""), done.stderr
    listed = run(site, "-m", "trainers.list", "plugged")
    assert "plugged, training-free, prompt stage" in listed.stdout and "Keeps what is largest." in listed.stdout
    assert not listed.stderr


BROKEN = {
    "b-raises": ("raise RuntimeError('no\\nluck')", "brings no pruner: no luck"),
    "c-imports": ("import nothing_of_that_name", "No module named 'nothing_of_that_name'"),
    "d-takes": (GOOD.format(name="divprune"), "'divprune' is taken by prunezoo.training_free.divprune.DivPrune"),
    # what it registered before it failed is not there either
    "e-half": (f"{GOOD.format(name='half')}\nraise ValueError('behind it')", "brings no pruner: behind it"),
    "f-second": (GOOD.format(name="plugged"), "'plugged' is taken by a_plug.Plugged"),
}


def test_broken_plug_ins_are_named_in_one_line_each_and_take_nothing_else_down(site):
    for distribution, (code, _) in BROKEN.items():
        install(site, distribution, code)
    install(site, "a-plug", GOOD.format(name="plugged"))
    install(site, "z-last", GOOD.format(name="last"))
    done = run(site, "-c", "from prunezoo import *; print(list_pruners(), type(build_pruner('divprune')).__module__)")
    assert done.returncode == 0, done.stderr
    for (distribution, (_, said)), line in zip(BROKEN.items(), done.stderr.splitlines(), strict=True):
        name = distribution.replace("-", "_")
        assert line.startswith(f"plug-in '{name}' ({name} of {distribution}) ") and said in line, line
        assert line.endswith("mend or uninstall it")
    for name in ("'plugged'", "'last'", "'ppm'", "prunezoo.training_free.divprune"):
        assert name in done.stdout
    assert "'half'" not in done.stdout
