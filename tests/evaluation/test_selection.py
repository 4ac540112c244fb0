"""The command that times greedy choice: its loops choose what the pruners do, and its record says all of it."""

import json

import pytest
import torch

from prunezoo import PruneZooError, load_pruner
from trainers.upkeep import selection
from trainers.upkeep.plain import LOOPS


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize(("tokens", "width", "keep"), [(60, 16, 9), (48, 64, 20), (20, 8, 1)])
def test_pruners_choose_what_plain_loops_do(name, tokens, width, keep):
    keep = min(keep, width)  # a kernel has no greater rank
    for seed in range(3):
        inputs = selection.made_up(2, tokens, width, torch.device("cpu"), seed)
        chosen = LOOPS[name](selection.first_of(inputs), keep)
        assert len(set(chosen)) == keep
        assert load_pruner(name)(inputs, keep).index[0].tolist() == sorted(chosen)


def test_all_are_timed_and_written(tmp_path, capsys):
    record = tmp_path / "selection.json"
    words = f"--vlm tiny-llava --tokens 48 30 --batch 1 3 --repeats 2 --json {record}"
    selection.main(words.split())
    found = json.loads(record.read_text("utf-8"))
    rows = found["rows"]
    assert [(row["tokens"], row["batch"], row["pruner"]) for row in rows] == [
        (tokens, batch, name) for tokens in (48, 30) for batch in (1, 3) for name in LOOPS
    ]
    assert {row["kept"] for row in rows} == {5, 3} and found["command"].endswith(words)
    for row in rows:
        assert row["seconds"] > 0 and row["plain_s"] > 0 and row["spread"][0] <= row["ratio"] <= row["spread"][1]
        assert row["share_of_prefill"] == pytest.approx(row["seconds"] / row["prefill_s"], rel=1e-3)
    assert "choosing 1/9 of the tokens" in capsys.readouterr().out


def test_times_of_different_work_are_not_compared(monkeypatch):
    monkeypatch.setitem(LOOPS, "divprune", lambda inputs, keep: list(range(keep)))
    inputs = selection.made_up(1, 40, 16, torch.device("cpu"))
    with pytest.raises(PruneZooError, match="'divprune' and its plain loop choose differently"):
        selection.measure("divprune", inputs, 5, 1, lambda: 0.0)


def test_mistakes_are_one_line(capsys):
    with pytest.raises(SystemExit) as caught:
        selection.main("--vlm tiny-llava --tokens 0".split())
    assert caught.value.code == 2 and "--tokens 0: at least 1" in capsys.readouterr().err
