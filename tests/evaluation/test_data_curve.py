"""The curve of data: what is trained already is not trained again, ways are told from random, and what is asked is the
recipe but for its items.
"""

import json
from types import SimpleNamespace

import pytest

from prunezoo.core.errors import PruneZooError
from trainers.cli import ours
from trainers.cli.names import CHECKPOINTS
from trainers.upkeep import data_curve


def curve(folder, *extra):
    words = f"--folder {folder} --json {folder}/curve.json --figure {folder}/curve.png --limit 70 --keep 1/18"
    return data_curve.main([*words.split(), *extra])


def test_what_is_trained_is_measured_and_told_from_random(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ours.subprocess, "run", None)  # it would fail
    trained = {"random-0.5-1": "ppm-tiny", "random-1-1": "ppm-tiny", "dbp-0.5-1": "explain-cnn-tiny"}
    (tmp_path / "ppm_tiny").mkdir()
    for name, shipped in trained.items():
        (tmp_path / "ppm_tiny" / name).symlink_to(CHECKPOINTS / shipped)
    words = "--config ppm_tiny --share 0.5 1 --method random dbp --seed 1"
    assert curve(tmp_path, *words.split()) == 0
    record = json.loads((tmp_path / "curve.json").read_text())
    rows = {(row["method"], row["share"]): row for row in record["rows"]}
    assert list(rows) == [("random", 1.0), ("random", 0.5), ("dbp", 0.5)]
    half, chosen = rows["random", 0.5], rows["dbp", 0.5]
    assert half["retention"] == rows["random", 1.0]["retention"] and half["difference"] is None
    assert chosen["difference"] == pytest.approx(chosen["retention"] - half["retention"], abs=2e-3)
    assert chosen["ci"][0] <= chosen["difference"] <= chosen["ci"][1] and chosen["difference"] < 0
    assert (record["n"], record["split"], record["keep"]) == (70, "test", "1/18")
    assert str(tmp_path) not in json.dumps(record["rows"])
    assert (tmp_path / "curve.png").stat().st_size > 5000 and not list(tmp_path.glob("*.npz"))
    assert "dbp" in capsys.readouterr().out


def test_a_training_is_the_recipe_on_the_list_that_was_made_for_it(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        ours.subprocess, "run", lambda words, **_: asked.append(words[2:]) or SimpleNamespace(returncode=0)
    )
    args = data_curve.parser().parse_args(
        f"--folder {tmp_path} --json x --items 64 --clusters 4 --set trainer.max_steps=2".split()
    )
    data_curve.train("atp_tiny", "prototype-hard", 0.5, 3, args)
    data_curve.train("atp_tiny", "random", 1.0, 3, args)
    same = ["--config=atp_tiny", "--data.train_items=64", "--trainer.max_steps=2"]
    only, out = tmp_path / "atp_tiny" / "prototype-hard-0.5-3.json", tmp_path / "atp_tiny"
    how = ["--method=prototype", "--share=0.5", "--seed=3", "--hold=hard", "--clusters=4"]
    assert asked == [
        ["trainers.select", *same, *how, f"--cache={tmp_path / 'embeddings'}", f"--file={only}"],
        ["trainers.fit", *same, f"--data.only={only}", "--seed_everything=3", f"--out={out / 'prototype-hard-0.5-3'}"],
        ["trainers.fit", *same, "--seed_everything=3", f"--out={out / 'random-1-3'}"],
    ]


def test_with_all_items_no_way_chooses(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(data_curve, "train", lambda *key: asked.append(key[:4]) or tmp_path)
    words = f"--folder {tmp_path} --json x --share 0.2 1 --config ppm_tiny --seed 1 2 --method random dbp"
    found = data_curve.train_all(data_curve.parser().parse_args(words.split()), data_curve.Terminal())
    ways = [("random", 1.0, 1), ("random", 1.0, 2), *((way, 0.2, seed) for way in ("random", "dbp") for seed in (1, 2))]
    assert [key[1:] for key in asked] == ways and list(found) == asked


@pytest.mark.parametrize(("words", "said"), [("--share 0", "--share 0: above 0"), ("--limit 0", "limit")])
def test_what_cannot_be_is_refused(tmp_path, capsys, words, said):
    with pytest.raises(SystemExit):
        curve(tmp_path, *words.split())
    assert said in capsys.readouterr().err


def test_a_run_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(ours.subprocess, "run", lambda words, **_: SimpleNamespace(returncode=2))
    args = data_curve.parser().parse_args(["--folder", str(tmp_path), "--json", "x"])
    with pytest.raises(PruneZooError, match=r"trainers.fit .*random-1-1.* ended with code 2"):
        data_curve.train("ppm_tiny", "random", 1.0, 1, args)
