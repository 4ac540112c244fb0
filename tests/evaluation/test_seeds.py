"""Means over seeds: their figures, their interval against a plain bootstrap, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
from measurements import HEADER, measurement

from trainers.evaluation.record import build_record, write_record
from trainers.evaluation.scores import Measurement
from trainers.upkeep import seeds


@pytest.fixture
def right():
    """100 questions in two groups by pruner: two seeds of `a`, two of `b`, at one budget."""
    rng = np.random.default_rng(1)
    chances = {"a1": 0.9, "a2": 0.8, "b1": 0.6, "b2": 0.5}
    return {name: (rng.random(100) < chance).astype(float) for name, chance in chances.items()}


@pytest.fixture
def path(right, tmp_path):
    m = measurement()
    keep = {key: m.scores[key] for key in (("full", "1.0"), ("none", "0"))}
    own = {(name, "1/9"): replace(m.scores["good", "1/9"], correct=values) for name, values in right.items()}
    record = build_record(Measurement(m.groups, m.group_of, m.chance, keep | own), [], HEADER)
    write_record(record, tmp_path / "record.json")
    return tmp_path / "record.json"


def test_the_mean_of_the_seeds_is_told_from_that_of_the_others(path, right, tmp_path, capsys):
    assert seeds.main([str(path), "--of", "a=a1,a2", "--of", "b=b1,b2", "--json", str(tmp_path / "s.json")]) == 0
    first, second = json.loads((tmp_path / "s.json").read_text())["rows"]
    retention = {name: 100 * values.mean() for name, values in right.items()}  # the full model is always right
    assert first["of_seeds"] == pytest.approx([retention["a1"], retention["a2"]])
    assert first["retention"] == pytest.approx((retention["a1"] + retention["a2"]) / 2)
    assert (first["difference"], first["ci"], first["seeds"]) == (None, None, 2)
    gain = (right["a1"] + right["a2"] - right["b1"] - right["b2"]) / 2
    assert second["difference"] == pytest.approx(100 * gain.mean())
    rng = np.random.default_rng(5)
    drawn = [100 * np.mean([part[rng.integers(50, size=50)].mean() for part in np.split(gain, 2)]) for _ in range(4000)]
    assert second["ci"] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.6)
    assert "a above it" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("of", "said"),
    [
        (["a=a1,a2"], "two trainings or more"),
        (["a=a1,", "b=b1"], "--of a=a1,: write NAME=PRUNER,PRUNER"),
        (["a1", "b=b1"], "--of a1: write NAME=PRUNER,PRUNER"),
        (["=a1", "b=b1"], "write NAME=PRUNER,PRUNER"),
        (["a=a1", "a=b1"], "'a' is there already"),
        (["a=a1", "b=b3"], "--of b3: {path} has no such pruner; it has: full, none, a1, a2, b1, b2"),
        (["a=a1", "b=full"], "--of full: {path} has it at other budgets than a1"),
    ],
)
def test_what_cannot_be_told_is_refused(path, of, said, capsys):
    with pytest.raises(SystemExit) as caught:
        seeds.main([str(path), *(word for each in of for word in ("--of", each))])
    assert caught.value.code == 2
    assert said.format(path=path) in capsys.readouterr().err


def test_a_model_that_sees_nothing_has_no_retention(path, capsys):
    record = json.loads(path.read_text())
    record["answers"]["right"]["full"]["1.0"] = record["answers"]["right"]["none"]["0"]
    path.write_text(json.dumps(record))
    with pytest.raises(SystemExit):
        seeds.main([str(path), "--of", "a=a1", "--of", "b=b1"])
    assert "too few questions" in capsys.readouterr().err
