"""The table of what rankings in front of the tower cost."""

import json

import numpy as np

from trainers.evaluation import before_tower
from trainers.evaluation.record import build_record
from trainers.evaluation.scores import ItemScores, Measurement

ITEMS = 40


def record(right):
    scores = {}
    for seed, ((name, keep), share) in enumerate([(("full", "1.0"), 1.0), (("none", "0"), 0.1), *right.items()]):
        own = ItemScores.empty(ITEMS, 2)
        own.correct[:] = np.random.default_rng(seed).random(ITEMS) < share
        own.layers[:] = 72
        scores[name, keep] = own
    made = Measurement(("one", "two"), np.arange(ITEMS) % 2, {}, scores)
    header = {"vlm": "v", "suite": "s", "split": "test", "command": "python -m trainers.evaluate"}
    return json.loads(json.dumps(build_record(made, [next(iter(right))[0]], header)))


def test_the_table_has_every_method_the_best_first_and_pairs(monkeypatch):
    one = record({("pixelprune", keep): share for keep, share in (("3/4", 0.9), ("1/2", 0.7), ("1/4", 0.4))})
    two = record({("checkpoints/mine-tiny", keep): 1.0 for keep in ("3/4", "1/2", "1/4")} | {("resize", "1/2"): 0.2})
    monkeypatch.setattr(before_tower, "records", lambda: [one, two])
    lines = before_tower.table().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:5]] == ["`mine-tiny`", "`pixelprune`", "`resize`"]
    assert "behind the tower | – |" in lines[4] and "72: 100.0 (100.0–100.0); +" in lines[2]
    assert ";" not in lines[3] and f"The first {ITEMS} questions" in lines[-1]
