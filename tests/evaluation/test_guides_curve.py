"""The comparison of guides: what is there is not made again, and the record says who chose."""

import json
from types import SimpleNamespace

import pytest

from prunezoo.core.errors import PruneZooError
from trainers.cli import ours
from trainers.cli.names import CHECKPOINTS
from trainers.upkeep import guides


def test_what_is_trained_already_is_measured_beside_the_guides_themselves(tmp_path, capsys):
    (tmp_path / "guide-provenance").symlink_to(CHECKPOINTS / "ppm-tiny")
    words = ["--out", str(tmp_path), "--guide", "provenance", "--limit", "14", "--json", str(tmp_path / "g.json")]
    assert guides.main(words) == 0
    record = json.loads((tmp_path / "g.json").read_text())
    assert (record["split"], record["n"], record["suite"]) == ("validation", 14, "scenes")
    kinds = [(row["kind"], row["keep"]) for row in record["rows"]]
    assert kinds == [(kind, keep) for kind in ("by the guide", "by a PPM trained by it") for keep in ("1/9", "1/36")]
    assert all(row["seconds"] > 0 and row["tokens"] in (16.0, 4.0) for row in record["rows"])
    assert len({row["retention"] for row in record["rows"]}) > 1
    assert "provenance" in capsys.readouterr().out


def test_a_training_is_the_recipe_but_for_the_guide(tmp_path, monkeypatch):
    asked = []
    done = SimpleNamespace(returncode=0)
    monkeypatch.setattr(ours.subprocess, "run", lambda words, **_: asked.append(words[2:]) or done)
    for guide in ("lrp", "attention"):
        guides.train(guide, tmp_path / guide, 300)
    steps = ["--trainer.max_steps=300", "--trainer.val_check_interval=300"]
    recipe = ["trainers.fit", "--config", "configs/ppm_tiny.yaml"]
    assert asked[0] == [*recipe, f"--out={tmp_path / 'lrp'}", "--model.guide=lrp", *steps]
    assert asked[1][4:6] == ["--model.guide=attention", "--model.guide_layer=null"]
    monkeypatch.setattr(ours.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=2))
    with pytest.raises(PruneZooError, match=r"trainers.fit .*=lrp.* ended with code 2"):
        guides.train("lrp", tmp_path / "lrp", None)
