"""The command that measures what compact positions cost; without vLLM."""

import json

import numpy as np
import pytest

from prunezoo.core.errors import PruneZooError
from trainers.data.suite import load_suite
from trainers.evaluation.loading import load_vlm
from trainers.upkeep import serving_positions


@pytest.fixture(scope="module")
def vlm():
    return load_vlm("checkpoints/tiny-llava")


def test_both_positions_are_one_where_all_is_kept_and_two_where_not(vlm):
    whole = serving_positions.right_answers(*vlm, load_suite("scenes", "test", 24), "uniform", 1.0)
    few = serving_positions.right_answers(*vlm, load_suite("scenes", "test", 96), "divprune", 16)
    assert whole.shape == (2, 24) and few.shape == (2, 96) and whole.mean() > 0.5
    assert np.array_equal(whole[0], whole[1])
    assert not np.array_equal(few[0], few[1])


def test_what_is_lost_is_in_points_with_its_interval():
    right = np.array([[1.0, 1, 1, 0] * 25, [1.0, 0, 1, 0] * 25])
    row = serving_positions.row_of("uniform", 16, right)
    assert (row["n"], row["original"], row["compact"], row["lost"]) == (100, 75, 50, 25)
    assert 15 < row["ci"][0] < 25 < row["ci"][1] < 35


def test_the_record_says_what_was_asked(tmp_path, capsys):
    serving_positions.main(["--pruner", "uniform", "--keep", "9", "--limit", "4", "--json", str(tmp_path / "r.json")])
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["suite"] == "scenes" and record["split"] == "test"
    assert [(row["pruner"], row["keep"], row["n"]) for row in record["rows"]] == [("uniform", "9", 4)]
    assert "lost by compact" in capsys.readouterr().out


def test_what_cannot_be_served_is_refused(vlm):
    with pytest.raises(PruneZooError, match="'fastv' cannot be served"):
        serving_positions.right_answers(*vlm, load_suite("scenes", "test", 2), "fastv", 16)
