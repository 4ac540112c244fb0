"""Changed pictures: what changes, what stays, and that no record mixes with one of pictures as they were."""

import json

import numpy as np
import pytest

from prunezoo import PruneZooError
from trainers import evaluate
from trainers.data.changes import CHANGES, Changed
from trainers.data.suite import load_suite
from trainers.evaluation.same_suite import suite_of


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["scenes", "pages"])
def test_the_picture_changes_and_the_question_stays(name, change):
    suite = load_suite(name, "validation", 8)
    changed = Changed(suite, change)
    assert len(changed) == 8 and (changed.groups, changed.chance) == (suite.groups, suite.chance)
    for index in range(8):
        before, after = suite[index], changed[index]
        assert (after.turns, after.group, after.id) == (before.turns, before.group, before.id)
        assert after.image.size == before.image.size and after.image.mode == "RGB"
        pixels = np.asarray(after.image).astype(int), np.asarray(before.image).astype(int)
        assert (pixels[0] != pixels[1]).mean() > (0.02 if change == "order" else 0.1)
        assert np.asarray(changed[index].image).tobytes() == np.asarray(after.image).tobytes()
    assert changed.stamp(0) != suite.stamp(0)


def test_what_a_question_is_about_turns_with_the_picture():
    suite = load_suite("pages", "validation", 16)
    for before, after in zip(suite, Changed(suite, "turned"), strict=True):
        assert after.relevant.shape == before.relevant.shape
        ys, xs = np.nonzero(before.relevant > 1.9)
        middle = (np.array([ys[0], xs[0]]) - 63.5) @ np.array(
            [[np.cos(a := np.pi / 36), np.sin(a)], [-np.sin(a), np.cos(a)]]
        )
        y, x = np.clip(np.rint(middle + 63.5).astype(int), 1, 126)
        assert after.relevant[y - 1 : y + 2, x - 1 : x + 2].max() > 1.5


def test_every_suite_takes_it_and_the_record_says_so(tiny_llava_folder, tmp_path):
    words = f"--vlm {tiny_llava_folder} --pruner uniform --keep 1/2 --suite scenes --limit 7 --json"
    records = []
    for number, more in enumerate(([], ["--suite-option", "change=jpeg"])):
        path = tmp_path / f"{number}.json"
        assert evaluate.main([*words.split(), str(path), *more]) == 0
        records.append(json.loads(path.read_text()))
    assert suite_of(records[0]) != suite_of(records[1]) and records[1]["suite"] == "scenes"
    with pytest.raises(PruneZooError, match="change=upside: one of turned, brighter, jpeg, order"):
        Changed(load_suite("scenes"), "upside")
