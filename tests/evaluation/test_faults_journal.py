"""Journals of interrupted measurements that are damaged, or another's: one line, and nothing of them is taken."""

import numpy as np
import pytest

from trainers.evaluation.journal import Journal
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
