"""Suite scenes: deterministic, split cleanly, right and balanced by construction."""

from collections import Counter

import numpy as np
import pytest

from prunezoo.core.errors import PruneZooError
from trainers.data.scenes import COUNTS, GROUPS, WORDS, Asker, Scenes
from trainers.data.scenes_dense import WORD_SLOTS, DenseScenes, patch_labels
from trainers.data.scenes_render import CELLS, load_assets, make_things, relevance, render
from trainers.data.suite import SPLITS, list_suites, load_suite

_WORD_IDS = {word: i for i, word in enumerate(("<pad>", "<s>", "</s>", "<user>", "<assistant>", *WORDS))}


def test_an_item_is_the_same_every_time_and_in_every_process():
    one, other = load_suite("scenes", "test"), Scenes("test", limit=50)
    for index in (0, 13, 48):
        a, b = one[index], other[index]
        assert (a.id, a.turns, a.group) == (b.id, b.turns, b.group)
        assert np.array_equal(a.image, b.image)
        assert np.array_equal(a.relevant, b.relevant)
    assert len(other) == 50
    assert not np.array_equal(one[0].image, one[1].image)


def test_the_splits_share_neither_picture_nor_digit():
    inked = {split: {ink.tobytes() for inks in load_assets(split).digits.values() for ink in inks} for split in SPLITS}
    photos = {split: {row.tobytes() for photo in load_assets(split).photos for row in photo} for split in SPLITS}
    for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert inked[a] and not inked[a] & inked[b]
        assert photos[a] and not photos[a] & photos[b]
        assert not {Scenes(a)[i].image.tobytes() for i in range(20)} & {Scenes(b)[i].image.tobytes() for i in range(20)}


def _things(count, split="test"):
    return [make_things(np.random.default_rng((9, seed)), split) for seed in range(count)]


def _find(things, text):
    """Things that a phrase such as 'red star', 'star' or 'stars' names, found from its words alone."""
    words = text.split()
    return [
        t for t in things
        if (t.color in words or len(words) == 1) and (t.shape in words or "objects" in words or f"{t.shape}s" in words
                                                       or f"{t.shape}es" in words)
    ]  # fmt: skip


@pytest.mark.parametrize("group", ["existence", "counting", "relation", "grounding", "reading"])
def test_answers_follow_from_the_picture(group):
    checked = 0
    for seed, things in enumerate(_things(60)):
        question = Asker(things, np.random.default_rng(seed)).ask(group)
        if question is None:
            continue
        (text, answer), checked = question.turns[-1], checked + 1
        if group == "existence":
            found = _find(things, text.removeprefix("is there a ").removesuffix(" ?"))
            assert answer == ("yes" if found else "no")
            assert question.wanted
        elif group == "counting":
            what = text.removeprefix("how many ").removesuffix(" are there ?")
            color = what.split()[0] if what.endswith("objects") else None
            found = [t for t in things if t.color == color] if color else _find(things, what)
            assert answer == str(len(found)) and answer in COUNTS
            assert found == question.wanted
        elif group == "relation":
            relation = next(r for r in ("left of", "right of", "above", "below") if r in text)
            first, second = text.removeprefix("is the ").removesuffix(" ?").split(f" {relation} the ")
            (a,), (b,) = _find(things, first), _find(things, second)
            true = {"left of": a.x < b.x, "right of": a.x > b.x, "above": a.y < b.y, "below": a.y > b.y}[relation]
            assert answer == ("yes" if true else "no")
        elif group == "grounding":
            (thing,) = _find(things, text.removeprefix("where is the ").removesuffix(" ?"))
            row, column = CELLS.index(answer) // 4, CELLS.index(answer) % 4
            assert row * 24 <= thing.y < (row + 1) * 24 and column * 24 <= thing.x < (column + 1) * 24
        else:
            (thing,) = _find(things, text.removeprefix("what number is on the ").removesuffix(" ?"))
            assert answer.replace(" ", "") == thing.number
    assert checked >= 15


def test_groups_take_turns_and_answers_are_balanced():
    items = [load_suite("scenes", "validation")[i] for i in range(1400)]
    assert Counter(i.group for i in items) == dict.fromkeys(GROUPS, 200)
    for group, most in (("existence", 0.62), ("relation", 0.62), ("counting", 0.40), ("grounding", 0.16)):
        answers = Counter(i.answer for i in items if i.group == group)
        assert max(answers.values()) / 200 <= most, (group, answers)
    assert all(set(f"{q} {a}".split()) <= set(WORDS) for item in items for q, a in item.turns)
    assert all(len(i.turns) == (2 if i.group == "dialogue" else 1) for i in items)


def test_relevance_lies_on_the_things_asked_about():
    for things in _things(20):
        value = relevance(things[:1])
        thing = things[0]
        rows, columns = np.mgrid[:96, :96] + 0.5
        inside = (abs(columns - thing.x) <= thing.width / 2) & (abs(rows - thing.y) <= thing.height / 2)
        assert (value[inside] > 0).all() and (value[~inside] == 0).all()
        peak = np.unravel_index(value.argmax(), value.shape)
        spots = thing.digit_centers() or [(thing.x, thing.y)]
        assert min(abs(peak[1] + 0.5 - x) + abs(peak[0] + 0.5 - y) for x, y in spots) <= 2


def test_things_do_not_overlap_and_are_drawn():
    for seed, things in enumerate(_things(20)):
        owner = np.zeros((96, 96), int)
        for t in things:
            top, left = int(t.y - t.height / 2), int(t.x - t.width / 2)
            area = np.s_[top : top + t.height, left : left + t.width]
            assert (owner[area] == 0).all()
            owner[area] = 1
        rng = np.random.default_rng(seed)
        picture, empty = render(things, rng, "test"), render([], np.random.default_rng(seed), "test")
        assert (picture != empty).any(-1)[owner == 1].mean() > 0.4
        assert (picture == empty).all(-1)[owner == 0].all()


def test_patch_labels_name_what_a_patch_shows():
    for things in _things(20):
        labels = patch_labels(things)
        assert labels["anchor"].sum() == len({(t.x // 8, t.y // 8) for t in things})
        for number, thing in enumerate(things):
            patch = int(thing.y // 8) * 12 + int(thing.x // 8)
            if labels["thing"][patch] == number:
                assert WORD_SLOTS["color"][labels["color"][patch]] == thing.color
                assert WORD_SLOTS["shape"][labels["shape"][patch]] == thing.shape
                assert WORD_SLOTS["cell"][labels["cell"][patch]] == thing.cell


def test_packed_questions_keep_to_themselves():
    sample = DenseScenes(_WORD_IDS, pictures=3)[0]
    words = {index: word for word, index in _WORD_IDS.items()}
    segments = sorted(set(sample["segment"].tolist()) - {-1})
    assert len(segments) >= 8
    for segment in segments:
        own = sample["segment"] == segment
        assert sample["place"][own].tolist() == list(range(own.sum()))
        answer = [words[i] for i in sample["targets"][own] if i >= 0]
        assert answer[-1] == "</s>" and len(answer) >= 2
        assert words[sample["ids"][own][0]] in ("what", "is", "how", "where")
    assert (sample["targets"][sample["segment"] == -1] == -100).all()


def test_mistakes_are_named():
    assert "scenes" in list_suites()
    with pytest.raises(PruneZooError, match=r"'scones' is unknown; did you mean 'scenes'"):
        load_suite("scones")
    with pytest.raises(PruneZooError, match="split 'dev' is not one of train, validation, test"):
        load_suite("scenes", "dev")
    with pytest.raises(PruneZooError, match="limit must be at least 1"):
        load_suite("scenes", limit=0)
    with pytest.raises(PruneZooError, match="option 'root' is unknown; there are: none"):
        load_suite("scenes", root="x")
    with pytest.raises(IndexError):
        load_suite("scenes", limit=3)[3]
