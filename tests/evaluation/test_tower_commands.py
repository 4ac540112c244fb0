"""The commands that hold methods inside the tower against its operations and its time, with a few questions."""

import json

import pytest

from prunezoo.core.schedule import Schedule
from trainers.upkeep import flops, tower_time


def test_methods_at_equal_operations(tmp_path, capsys):
    schedule = Schedule("vision", 144, (144, 85, 82, 80), "hand").save(tmp_path / "hand.json")
    path, words = tmp_path / "flops.json", ["--schedule", str(schedule), "--pruner", "tome", "--limit", "7"]
    flops.main([*words, "--share", "3/4", "--json", str(path)])
    found = json.loads(path.read_text(encoding="utf-8"))
    own, other = found["tower"]
    assert (own["pruner"], other["pruner"]) == ("tome", "tome?schedule=hand") and own["left"] != other["left"]
    assert all(abs(row["reached"] - 0.75) < flops.NEAR for row in (own, other))
    read = {row["pruner"]: row["tokens"] for row in found["rows"] if row["group"] == "mean"}
    assert read["tome"] == own["left"] and read["tome?schedule=hand"] == other["left"]
    assert "tome?schedule=hand" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        flops.main([*words, "--share", "64", "--json", str(path)])
    assert "write a share of the tower's operations below 1" in capsys.readouterr().err


def test_time_beside_operations(tmp_path, capsys):
    path = tmp_path / "time.json"
    words = ["--vlm", "checkpoints/tiny-llava", "--pruner", "tome", "flowcut", "--side", "96", "--repeats", "2"]
    tower_time.main([*words, "--json", str(path)])
    found = json.loads(path.read_text(encoding="utf-8"))
    assert [row["pruner"] for row in found["rows"]] == ["tome", "flowcut"]
    for row in found["rows"]:
        assert row["blocks"][0][0] == 144 and row["blocks"][-1][1] == 72 and row["ideal"] > 1 and row["repeats"] == 2
        assert row["quartiles"][0] <= row["measured"] <= row["quartiles"][1]
        assert row["of_ideal"] == row["measured"] / row["ideal"]
    assert "measured of ideal" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        tower_time.main([*words, "--repeats", "0"])
    assert "--repeats 0: at least 1" in capsys.readouterr().err
