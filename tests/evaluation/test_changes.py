"""Changed pictures: what changes, what stays, and that no record mixes with one of pictures as they were."""

import json

import numpy as np
import pytest
from tiny_tokenizer import FAMILY, member

from prunezoo import PruneZooError, build_pruner
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


@pytest.mark.parametrize("name", [name for name in FAMILY if name != "textok"])
def test_a_tokenizer_paints_the_pictures_again(name, tmp_path):
    tokenizer = member(name)
    folder = tokenizer.save_pretrained(tmp_path / name)
    suite = load_suite("scenes", "validation", 2)
    whole, first = Changed(suite, f"tokenizer:{folder}"), Changed(suite, f"tokenizer:{folder}@1")
    for changed, length in ((whole, tokenizer.config.tokens), (first, 1)):
        for before, after in zip(suite, changed, strict=True):
            wanted = tokenizer.repaint(before.image, length)
            assert after.image.size == before.image.size and after.image.tobytes() == wanted.tobytes()
            assert (after.turns, after.group, after.id) == (before.turns, before.group, before.id)
    # of a picture that is alike all over an untrained tokenizer may say the same in each token
    assert any(a.image.tobytes() != b.image.tobytes() for a, b in zip(whole, first, strict=True))
    other = member(name, seed=1).save_pretrained(tmp_path / "other" / name)
    versions = [one.version for one in (suite, whole, first, Changed(suite, f"tokenizer:{other}@1"))]
    assert len(set(versions)) == 4, "no record of one mixes with another's"
    assert versions[1].startswith(f"{suite.version}, tokenizer:{name}@{tokenizer.config.tokens} ")
    assert str(tmp_path) not in versions[1] and first.stamp(0) != whole.stamp(0)


def test_a_model_is_asked_about_pictures_that_are_painted_again(tiny_llava_folder, tmp_path):
    folder = member("one_d_piece").save_pretrained(tmp_path / "tokenizer")
    words = (
        f"--vlm {tiny_llava_folder} --pruner uniform --keep 1/2 --suite scenes --limit 7 --json {tmp_path / 'r.json'}"
    )
    assert evaluate.main([*words.split(), "--suite-option", f"change=tokenizer:{folder}@3"]) == 0
    assert ", tokenizer:tokenizer@3 " in json.loads((tmp_path / "r.json").read_text())["suite_version"]


def test_what_paints_nothing_is_refused(tmp_path):
    folder = member("one_d_piece").save_pretrained(tmp_path / "tokenizer")
    textok = member("textok").save_pretrained(tmp_path / "textok")
    without = member("textok", text="none").save_pretrained(tmp_path / "without")
    pruner = build_pruner("random").save_pretrained(tmp_path / "pruner")
    suite = load_suite("scenes", "validation", 1)
    for change, message in (
        (f"tokenizer:{folder}@25", "@25: length=25 is out of range: this tokenizer decodes 1 to 24"),
        (f"tokenizer:{folder}@0", "length=0 is out of range"),
        (f"tokenizer:{folder}@many", "behind the last @ stands how many tokens"),
        (f"tokenizer:{folder}@{'9' * 30}", "behind the last @ stands how many tokens"),
        (f"tokenizer:{folder}@", "behind the last @ stands how many tokens"),
        ("tokenizer:", "name a tokenizer's folder or Hub id"),
        ("tokenizer:@3", "name a tokenizer's folder or Hub id"),
        (f"tokenizer:{textok}", "'textok' reads a text beside each picture, which a suite has not"),
        (f"tokenizer:{pruner}", "unknown tokenizer 'random'"),
        (f"tokenizer:{tmp_path / 'nowhere'}", "nowhere"),
        ("tokenizer:one-d-peace-tiny", "did you mean 'one-d-piece-tiny'"),
    ):
        with pytest.raises(PruneZooError) as caught:
            Changed(suite, change)
        assert message in str(caught.value)
    assert Changed(suite, f"tokenizer:{without}")[0].image.size == suite[0].image.size
