"""Methods of different runs compare as if they had been measured in one."""

import json

import numpy as np
import pytest

from prunezoo import PruneZooError, list_pruners
from trainers.cli.names import CHECKPOINTS, has_weights, pruners_shipped
from trainers.evaluation import league
from trainers.evaluation.answers import join_answers
from trainers.evaluation.record import build_record
from trainers.evaluation.scores import ItemScores, Measurement
from trainers.evaluation.summary import read_zoo, summary_section
from trainers.upkeep.league import UNMEASURED, path_of

ITEMS, KEEP = 60, "1/9"
RIGHT = {"checkpoints/good": 0.9, "divprune": 0.95, "fastv": 0.2, "random": 0.7}


def measurement(names, seed=0):
    """Made up: the full model is nearly always right, zero tokens hardly ever, methods as often as RIGHT says."""
    scores = {}
    for name, keep, share in [("full", "1.0", 0.95), ("none", "0", 0.1), *((n, KEEP, RIGHT[n]) for n in names)]:
        rng = np.random.default_rng([seed, *name.encode()])
        own = ItemScores.empty(ITEMS, 5)
        own.correct[:] = rng.random(ITEMS) < share
        if name == "random":  # a mean of seeds
            own.correct[:] = rng.integers(0, 6, ITEMS) / 5
        own.layers[:] = 16
        scores[name, keep] = own
    return Measurement(("one", "two"), np.arange(ITEMS) % 2, {}, scores)


def record(*names, seed=0):
    header = {"vlm": "v", "suite": "s", "split": "test", "command": " ".join(names)}
    return json.loads(json.dumps(build_record(measurement(names, seed), [names[0]], header)))


def test_answers_are_kept_whole():
    made = measurement(list(RIGHT))
    answers = join_answers([record(*RIGHT)])
    assert answers.group_of.tolist() == made.group_of.tolist()
    for key, scores in made.scores.items():
        np.testing.assert_allclose(answers.right[key], scores.correct, atol=1e-12)


def test_pairs_of_two_runs_are_those_of_one():
    together = {row["rival"]: row for row in record(*RIGHT)["paired"]}
    places = {
        place.name: place for place in league.standings([record("checkpoints/good", "fastv"), record("divprune")], KEEP)
    }
    for rival in ("divprune", "fastv"):
        assert places[rival].behind == pytest.approx(together[rival]["difference"], abs=1e-6)
        assert places[rival].ci == pytest.approx(together[rival]["ci"], abs=1e-6)


def test_a_card_by_the_league_is_that_of_one_run(monkeypatch):
    monkeypatch.setattr(league, "methods_shipped", lambda: {"good": "fastv"})
    monkeypatch.setattr(league, "read_league", lambda *_: [record(name) for name in RIGHT])
    together, made = record(*RIGHT), league.beside_rivals("good")
    assert {row["rival"] for row in made["paired"]} == {"divprune", "fastv", "random"}
    assert {row["pruner"] for row in made["rows"]} == {"full", "none", *RIGHT}
    for row in made["paired"]:
        (same,) = (other for other in together["paired"] if other["rival"] == row["rival"])
        assert row["difference"] == pytest.approx(same["difference"], abs=1e-6)
        assert row["ci"] == pytest.approx(same["ci"], abs=1e-6)
    assert made["command"].endswith("python -m trainers.cards good --league")
    with pytest.raises(PruneZooError, match="the league has no record of 'bad'"):
        league.beside_rivals("bad")


def test_the_best_stands_first_learned_or_not_and_floors_are_told():
    places = league.standings([record(name) for name in RIGHT], KEEP)
    retention = [place.row["retention"] for place in places]
    assert retention == sorted(retention, reverse=True) and next(place.name for place in places) == "divprune"
    by_name = {place.name: place for place in places}
    assert by_name["checkpoints/good"].behind == 0 and by_name["divprune"].behind < 0
    assert by_name["fastv"].below == ("random",) and not by_name["divprune"].below and not by_name["random"].below


def test_runs_over_other_questions_do_not_join():
    other = record("divprune")
    other["answers"]["groups"] = other["answers"]["groups"][::-1]
    with pytest.raises(PruneZooError, match="other questions"):
        join_answers([record("fastv"), other])
    with pytest.raises(PruneZooError, match="answered otherwise"):
        join_answers([record("fastv"), record("divprune", seed=1)])
    old = record("fastv")
    del old["answers"]
    with pytest.raises(PruneZooError, match="no answers"):
        join_answers([old])


@pytest.mark.parametrize("of", league.LEAGUES.values(), ids=league.LEAGUES)
def test_every_method_has_a_record(of):
    """Whatever was added since must be measured: `python -m trainers.upkeep.league --suite SUITE`."""
    there = {path.stem.partition("-")[0] for path in of.folder.glob("*.json")}
    lacking = {name for name in list_pruners() if not has_weights(name)} - there - {"full", "none", *UNMEASURED}
    assert not lacking
    for folder, method in pruners_shipped(of.vlm).items():
        assert method == "budget" or path_of(str(CHECKPOINTS / folder), of).exists(), folder


def test_every_learned_method_ships_or_says_why_not():
    shipped = set(pruners_shipped().values())
    assert not {name for name in list_pruners() if has_weights(name)} - shipped - {*UNMEASURED}


def test_no_learned_method_stands_above_a_rival_that_beats_it():
    """In the README's table, at 1/9 of the tokens."""
    lines = [line.split("|") for line in summary_section(read_zoo()).splitlines() if line.startswith("| ")][1:]
    cells = [line[5].strip() for line in lines]
    retention = [float(cell.split()[0]) for cell in cells if cell != "–"]
    assert retention == sorted(retention, reverse=True)
