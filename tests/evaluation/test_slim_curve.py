"""The curve of slimmed pruners: what is made already is not made again, and all of it is in the record."""

import json
import sys

import pytest

from prunezoo.core.errors import PruneZooError
from prunezoo.core.registry import load_pruner
from trainers import slim
from trainers.cli import ours
from trainers.cli.names import CHECKPOINTS
from trainers.upkeep import slim_curve


@pytest.fixture
def halves(tmp_path, monkeypatch):
    """Two small pruners, where the curve looks for them."""
    monkeypatch.setattr(sys, "argv", ["slim"])
    for sparsity in ("0.3", "0.9"):
        words = f"--config=ppm_tiny --pruner=ppm --method=magnitude --trainer.accelerator=cpu --sparsity={sparsity}"
        slim.main([*words.split(), f"--out={tmp_path / 'runs' / f'magnitude-{sparsity}-1'}"])
    return tmp_path


def curve(folder, *extra):
    words = f"--method magnitude --tune 0 --limit 14 --repeats 2 --folder {folder}/runs --json {folder}/slim.json"
    return slim_curve.main([*words.split(), "--figure", f"{folder}/slim.png", *extra])


def test_what_is_made_is_measured_and_drawn(halves, monkeypatch, capsys):
    monkeypatch.setattr(ours.subprocess, "run", None)  # it would fail
    assert curve(halves, "--sparsity", "0.3", "0.9") == 0
    record = json.loads((halves / "slim.json").read_text())
    start, light, heavy = record["rows"]
    assert [row["method"] for row in record["rows"]] == ["start", "magnitude", "magnitude"]
    assert (light["sparsity"], heavy["sparsity"], heavy["seed"]) == (0.3, 0.9, 1)  # without training one seed is all
    assert start["parameters"] == heavy["parameters"] > light["not_zero"] > heavy["not_zero"]
    assert heavy["kl"] > light["kl"] and record["n"] == 14 and record["split"] == "test"
    assert all(row["seconds"] > 0 and row["spread"][0] <= row["time"] <= row["spread"][1] for row in record["rows"])
    assert (halves / "slim.png").stat().st_size > 5000 and not list(halves.glob("*.npz"))
    assert "not zero" in capsys.readouterr().out


def test_a_run_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(ours.subprocess, "run", lambda words, **_: type("Done", (), {"returncode": 2}))
    args = slim_curve.parser().parse_args(["--method", "precrop", "--folder", str(tmp_path)])
    with pytest.raises(PruneZooError, match=r"trainers.slim .*precrop-0.3-1.* ended with code 2"):
        slim_curve.small_ones(args, {"precrop": [0.3]}, slim_curve.Terminal())


def test_what_cannot_be_taken_out_is_left_out(capsys):
    start = load_pruner(str(CHECKPOINTS / "ppm-tiny"))
    args = slim_curve.parser().parse_args("--method iss_p lrp precrop --sparsity 0.5 0.8 0.9".split())
    found = slim_curve.sparsities(args, start, slim_curve.Terminal())
    assert found == {"iss_p": [0.5, 0.8, 0.9], "lrp": [0.5, 0.8], "precrop": [0.5, 0.8]}
    assert "lrp: at most 0.827 can go, so without 0.9" in capsys.readouterr().out
    args = slim_curve.parser().parse_args("--method lrp --sparsity 0.9".split())
    with pytest.raises(PruneZooError, match=r"--sparsity 0.9: lrp can take out at most 0.827 here"):
        slim_curve.sparsities(args, start, slim_curve.Terminal())
