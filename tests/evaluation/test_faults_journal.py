"""Journals of interrupted measurements that are damaged, or another's: one line, and nothing of them is taken."""

import numpy as np
import pytest
from PIL import Image

from prunezoo.core.schedule import Schedule
from trainers import evaluate
from trainers.cli.names import folder_named
from trainers.data.scenes import Scenes
from trainers.data.suite import load_suite
from trainers.evaluation.journal import Journal
from trainers.evaluation.methods import build_method
from trainers.evaluation.run import journal_of, schedules_of
from trainers.evaluation.scores import ItemScores


def scores_of(items=6):
    scores = {("uniform", "1/9"): ItemScores.empty(items, 2), ("full", "1.0"): ItemScores.empty(items, 2)}
    for of in scores.values():
        for values in vars(of).values():
            values[:] = np.random.default_rng(0).random(values.shape)
    return scores


def rewritten(**changes):
    """A journal in which some arrays are others, or are missing."""

    def spoil(path):
        with path.open("rb") as file:
            arrays = dict(np.load(file))
        arrays = {name: value for name, value in {**arrays, **changes}.items() if value is not None}
        with path.open("wb") as file:
            np.savez(file, **arrays)

    return spoil


def no_zip(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def flipped(path):
    data = bytearray(path.read_bytes())
    for place in range(60, len(data) // 2, 7):
        data[place] ^= 0xFF
    path.write_bytes(data)


SPOILT = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "text": lambda path: path.write_text("no journal"),
    "flipped": flipped,
    "no_zip": no_zip,
    "no_fingerprint": rewritten(fingerprint=None),
    "no_done": rewritten(done=None),
    "no_scores": rewritten(**{"uniform 1/9 kl": None}),
    "short": rewritten(**{"uniform 1/9 kl": np.zeros(1)}),
    "words": rewritten(**{"uniform 1/9 kl": np.array(["x"] * 6)}),
    "groups": rewritten(groups=np.array(["a"])),
    "done_beyond": rewritten(done=np.array(7)),
    "done_below": rewritten(done=np.array(-1)),
    "done_text": rewritten(done=np.array("3")),
    "pickled": rewritten(done=np.array([object()], dtype=object)),
    "other": rewritten(fingerprint=np.array("other settings")),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_journal_that_cannot_be_taken_is_said_in_one_line_and_fills_nothing_in(how, tmp_path, capsys):
    journal = Journal(tmp_path / "e.json.partial.npz", "these settings")
    journal.write(scores_of(), ["a", "b", "c", "", "", ""], 3)
    whole, groups = scores_of(), [""] * 6
    assert journal.read(whole, groups) == 3 and groups[:3] == ["a", "b", "c"] and not capsys.readouterr().err
    SPOILT[how](journal.path)
    scores, groups = {key: ItemScores.empty(6, 2) for key in whole}, [""] * 6
    assert journal.read(scores, groups) == 0
    said = capsys.readouterr().err
    assert said.startswith(f"{journal.path}: ") and said.endswith("; everything is measured anew\n")
    assert said.count("\n") == 1 and len(said) < 500
    assert groups == [""] * 6 and not any(values.any() for of in scores.values() for values in vars(of).values())


def changed(folder, how):
    if how == "another picture":
        Image.new("RGB", (40, 40), "red").save(folder / "class0" / "0.png")
    elif how == "one more":
        for number in range(100, 160):  # a tenth of them falls into each split
            Image.new("RGB", (40, 40), (number, 0, 0)).save(folder / "class1" / f"{number}.png")
    else:
        (folder / "class0").rename(folder / "class9")


@pytest.mark.parametrize("how", ["another picture", "one more", "another name"])
def test_a_journal_is_of_the_pictures_that_were_measured(how, tmp_path):
    """A folder of the same name with other pictures in it has answers of its own."""
    for number in range(5):
        (tmp_path / f"class{number}").mkdir()
        for place in range(40):
            Image.new("RGB", (40, 40), (number, place, 0)).save(tmp_path / f"class{number}" / f"{place}.png")

    def fingerprint():
        return load_suite("photo-grid", "train", root=str(tmp_path), classes=3).fingerprint()

    before = fingerprint()
    assert fingerprint() == before
    changed(tmp_path, how)
    assert fingerprint() != before


def test_the_journal_asks_for_the_pictures(tmp_path):
    """By the command itself: what differs is the suite's fingerprint alone."""
    suite = load_suite("scenes", "test", 4)
    assert suite.fingerprint() == load_suite("scenes", "test", 4).fingerprint()
    args = evaluate.parser().parse_args(["--vlm", "v", "--pruner", "p", "--suite", "s", "--json", str(tmp_path / "e")])
    one, two = (journal_of(args, suite, [], [], {}) for suite in (suite, Other("test", 4)))
    assert one.fingerprint != two.fingerprint and one.path == two.path


class Other(Scenes):
    """The same, from other pictures."""

    def fingerprint(self):
        return "other"


@pytest.mark.parametrize("name", ["fixed:{}", "random@{}", "steps:frames:{}", "random@{}?seed=3"])
def test_a_folder_is_found_behind_what_stands_in_front_of_it(tmp_path, name):
    """So that answers under other weights in the same folder are not taken for these."""
    assert folder_named(name.format(tmp_path / "p")) == str(tmp_path / "p")


def test_the_journal_knows_the_content_of_a_schedule(tmp_path):
    """Its file may change while its name stays."""
    path = tmp_path / "s.json"
    found = []
    for count in (60, 50):
        Schedule(stage="vision", available=144, counts=(144, 144, 144, count), made_by="hand").save(path)
        found.append(schedules_of([build_method(f"tome?schedule={path}", depth=2), build_method("uniform", depth=2)]))
    assert found[0] != found[1] and found[0][1] is None
