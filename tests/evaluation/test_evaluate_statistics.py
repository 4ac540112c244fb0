"""Budgets, bootstrap and record: the parts of `evaluate` that need no model."""

import json

import numpy as np
import pytest
from measurements import measurement

from prunezoo.core.errors import PruneZooError
from trainers.evaluation.budgets import parse_budget, parse_budgets
from trainers.evaluation.record import build_record, oracle_scale_of, read_record, select, write_record
from trainers.evaluation.scores import ItemScores, Measurement
from trainers.evaluation.statistics import interval, resample


@pytest.mark.parametrize(
    ("text", "keep"),
    [("64", 64), ("1", 1), ("1/9", 1 / 9), ("0.111", 0.111), ("1.0", 1.0), ("2/2", 1.0), (" 1 / 9 ", 1 / 9)],
)
def test_a_budget_is_tokens_or_a_share(text, keep):
    budget = parse_budget(text)
    assert budget.keep == keep
    assert type(budget.keep) is type(keep)
    assert budget.label == text.strip()


@pytest.mark.parametrize(
    "text", ["0", "-3", "0.0", "0/9", "9/4", "1.5", "64.0", "nan", "inf", "1/0", "many", "", "1/2/3", "-0.1"]
)
def test_a_bad_budget_is_refused_in_one_line(text):
    with pytest.raises(PruneZooError) as caught:
        parse_budget(text)
    assert "--keep" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_same_budget_twice_counts_once():
    assert [b.label for b in parse_budgets(["64", "1/9", "64"])] == ["64", "1/9"]


def one_group(*rows: list[float]) -> np.ndarray:
    return np.array(rows, dtype=np.float64)


def test_bootstrap_reaches_the_normal_interval():
    """n items, accuracy p against an always right full model: the interval is 100 (p -+ 1.96 sqrt(p (1 - p) / n))."""
    n, wrong = 1000, 200
    correct = one_group([1.0] * (n - wrong) + [0.0] * wrong)
    drawn = resample(correct, np.ones(n), np.zeros(n, dtype=np.int64), 1, resamples=4000)
    low, high = interval(drawn.retention_draws()[0, 0])
    width = 196 * np.sqrt(0.8 * 0.2 / n)
    assert drawn.retention()[0, 0] == pytest.approx(80)
    assert low == pytest.approx(80 - width, abs=0.25)
    assert high == pytest.approx(80 + width, abs=0.25)


def test_bootstrap_is_paired():
    """Two methods that are right on the same items differ by exactly nothing in every resample."""
    rng = np.random.default_rng(1)
    right = (rng.random(300) < 0.7).astype(float)
    drawn = resample(one_group(right, right), np.ones(300), np.arange(300) % 3, 3)
    draws = drawn.retention_draws()
    assert draws[0].std() > 0
    np.testing.assert_array_equal(draws[0], draws[1])


def test_bootstrap_is_stratified_and_groups_weigh_the_same():
    """A group of 4 that is always right and a group of 400 that is always wrong: the mean is 50 without any spread."""
    group_of = np.array([0] * 4 + [1] * 400)
    drawn = resample(one_group((group_of == 0).astype(float)), np.ones(404), group_of, 2)
    assert drawn.retention()[0].tolist() == [100, 0, 50]
    assert set(drawn.retention_draws()[0, -1]) == {50.0}


def test_a_group_that_the_full_model_cannot_answer_has_no_retention():
    group_of = np.array([0, 0, 1, 1])
    drawn = resample(one_group([1, 0, 1, 0]), np.array([1.0, 1.0, 0.0, 0.0]), group_of, 2)
    group, hopeless, mean = drawn.retention()[0]
    assert (group, mean) == (50, 50)
    assert np.isnan(hopeless)
    assert np.isnan(interval(drawn.retention_draws()[0, 1])).all()


def test_the_record_has_the_documented_shape(tmp_path):
    header = {"vlm": "v", "suite": "s", "split": "test", "command": "c"}
    record = build_record(measurement(), ["good"], header)
    assert len(record["rows"]) == 4 * 3
    row = select(record, pruner="bad", keep="1/9", group="mean")[0]
    assert list(row) == [
        "pruner",
        "keep",
        "tokens",
        "tokens_spread",
        "flops",
        "group",
        "n",
        "accuracy",
        "retention",
        "agreement",
        "kl",
        "ci",
    ]
    assert (row["tokens"], row["n"], row["accuracy"], row["retention"]) == (16, 100, 0.75, 75)
    assert row["ci"][0] < 75 < row["ci"][1]
    (pair,) = record["paired"]
    assert {k: pair[k] for k in ("pruner", "rival", "keep", "difference")} == {
        "pruner": "good",
        "rival": "bad",
        "keep": "1/9",
        "difference": 25,
    }
    assert 0 < pair["ci"][0] < 25 < pair["ci"][1]
    assert record["oracle_scale"][-1] == {"pruner": "good", "group": "mean", "tokens": 16, "accuracy": 1}
    write_record(record, tmp_path / "new" / "eval.json")
    assert read_record(tmp_path / "new" / "eval.json") == json.loads(json.dumps(record))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["eval.json"]


def test_the_oracle_scale_is_the_fewest_tokens_that_answer():
    """Four questions: the first needs 1 token, the second 16, the third all, the fourth is answered by none."""

    def scores(correct: list[float], tokens: float) -> ItemScores:
        return ItemScores(np.full((4, 2), tokens), np.array(correct), np.array(correct), np.zeros(4), np.ones(4))

    kinds = {"many": scores([1, 1, 0, 0], 16), "one": scores([1, 0, 0, 0], 1)}
    full = {("full", "1.0"): scores([0, 1, 1, 0], 144), ("none", "0"): scores([0, 0, 0, 1], 0)}
    scales = {("m3", keep): kind for keep, kind in kinds.items()}
    both = Measurement(("a", "b"), np.array([0, 0, 1, 1]), {}, {**full, **scales})
    assert oracle_scale_of(both, ["m3"]) == [
        {"pruner": "m3", "group": "a", "tokens": 8.5, "accuracy": 1.0},
        {"pruner": "m3", "group": "b", "tokens": 72.5, "accuracy": 0.5},
        {"pruner": "m3", "group": "mean", "tokens": 40.5, "accuracy": 0.75},
    ]


@pytest.mark.parametrize(
    "text", [None, "{", "[]", "{}", '{"vlm": "v", "suite": "s", "split": "t", "n": 1, "rows": []}']
)
def test_a_file_that_is_no_evaluation_is_refused(tmp_path, text):
    path = tmp_path / "eval.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PruneZooError, match=r"eval\.json"):
        read_record(path)
