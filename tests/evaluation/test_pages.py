"""Suite pages: deterministic, split cleanly, right and balanced by construction."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from trainers.data.pages import GROUPS, KINDS_OF, WORDS, Asker, Pages
from trainers.data.pages_dense import SLOTS, DensePages, patch_labels, patch_of
from trainers.data.pages_render import CELLS, FACES, KINDS, LINES, NAMES, make_page, relevance, render
from trainers.data.suite import SPLITS, load_suite

_WORD_IDS = {word: i for i, word in enumerate(("<pad>", "<s>", "</s>", "<user>", "<assistant>", *WORDS))}


def _pages(count, split="test"):
    return [make_page(np.random.default_rng((9, seed)), split, KINDS[seed % len(KINDS)]) for seed in range(count)]


def test_an_item_is_the_same_every_time_and_in_every_process():
    one, other = load_suite("pages", "test"), Pages("test", limit=50)
    for index in (0, 13, 47):
        a, b = one[index], other[index]
        assert (a.id, a.turns, a.group) == (b.id, b.turns, b.group)
        assert np.array_equal(a.image, b.image) and a.image.size == (128, 128)
        assert np.array_equal(a.relevant, b.relevant)
    assert len(other) == 50
    assert not np.array_equal(one[0].image, one[1].image)


def test_the_splits_share_no_face_number_place_or_name_on_a_line():
    seen = {split: {"face": set(), "number": set(), "place": set(), "name": set()} for split in SPLITS}
    for split, found in seen.items():
        for page in _pages(150, split):
            found["face"] |= {text.face.partition("@")[0] for text in page.texts}
            found["number"] |= {text.text for text in page.values.values() if len(text.text) > 1}
            found["name"] |= {(page.kind, place, name) for place, name in enumerate(page.lines)}
            first = next(iter(page.names.values()))
            found["place"].add((page.kind, page.rules[0][:2] if page.bars else (page.names[page.lines[0]].x, first.y)))
    for a, b in (("train", "validation"), ("train", "test"), ("validation", "test")):
        for what in seen[a]:
            assert seen[a][what] and not seen[a][what] & seen[b][what], what
    assert all(seen[split]["face"] == set(FACES[split]) for split in SPLITS)


@pytest.mark.parametrize("group", GROUPS)
def test_answers_follow_from_what_is_printed(group):
    """From pixels' places alone: a value belongs to the name on its height, and in a table to the head above it."""
    checked = 0
    for seed, page in enumerate(_pages(45)):
        if page.kind not in KINDS_OF[group]:
            continue
        turns = Asker(page, np.random.default_rng(seed)).ask(group).turns
        words, answer = turns[-1][0].removesuffix(" ?").split(), turns[-1][1]
        names = [text for text in page.texts if not text.is_number]
        tops = {bar.name: bar.top for bar in page.bars}
        checked += 1
        if group in ("field", "cell") or (group == "dialogue" and words[0] != "where"):
            row = words[-1] if words[-1] != "it" else turns[0][0].split()[2]
            row = words[-2] if group == "cell" else row
            (line,) = (text.y for text in names if text.text == row)
            found = [text for text in page.texts if text.is_number and text.y == line]
            if group == "cell":
                (head,) = (text.spots()[0][0] for text in names if text.text == words[-1])
                middle = [np.mean([x for x, _ in text.spots()]) for text in found]
                found = [found[int(np.argmin(np.abs(np.array(middle) - head)))]]
            assert [answer.replace(" ", "")] == [text.text for text in found]
        elif group == "exist":
            assert answer == ("yes" if any(text.text == words[-1] for text in names) else "no")
        elif group in ("where", "dialogue"):
            (text,) = (text for text in names if text.text == (turns[0][0].split()[2] if len(turns) > 1 else words[-1]))
            x, y = text.spots()[0]
            assert answer == CELLS[int(y // 32) * 4 + int(x // 32)]
        elif group == "chart":
            assert answer == {"largest": min, "smallest": max}[words[-1]](tops, key=lambda name: tops[name])
        elif group == "compare":
            assert answer == ("yes" if tops[words[1]] < tops[words[3]] else "no")
        else:
            rows = {text.y for text in page.texts if text.is_number}
            assert answer == str(len(page.bars) if page.kind == "chart" else len(rows))
            assert words[-1] == {"form": "lines", "table": "rows", "chart": "bars"}[page.kind]
    assert checked >= 15


def test_groups_take_turns_and_answers_are_balanced():
    items = [load_suite("pages", "validation")[i] for i in range(1600)]
    assert Counter(i.group for i in items) == dict.fromkeys(GROUPS, 200)
    for group, most in (("exist", 0.62), ("compare", 0.62), ("count", 0.45), ("where", 0.20), ("field", 0.10)):
        answers = Counter(i.answer for i in items if i.group == group)
        assert max(answers.values()) / 200 <= most, (group, answers)
    assert all(set(f"{q} {a}".split()) <= set(WORDS) for item in items for q, a in item.turns)
    assert all(len(i.turns) == (2 if i.group == "dialogue" else 1) for i in items)
    assert {len(page.lines) for page in _pages(60)} == {count for counts in LINES.values() for count in counts}


def test_what_is_printed_is_on_the_page_and_apart():
    for page in _pages(45):
        spots = [spot for text in page.texts if text.is_number for spot in text.spots()]
        assert len({patch_of(*spot) for spot in spots}) == len(spots), "two digits in one patch"
        for text in page.texts:
            assert text.x >= 0 and text.x + text.width <= 128 and text.size // 2 <= text.y <= 128 - text.size // 2
        for height in {text.y for text in page.texts}:
            line = sorted((text for text in page.texts if text.y == height), key=lambda text: text.x)
            assert all(left.x + left.width <= right.x + 1 for left, right in pairwise(line))


def test_names_and_digits_are_drawn_where_they_are_said_to_be():
    for seed, page in enumerate(_pages(30)):
        picture = render(page, np.random.default_rng(seed)).astype(int)
        bare = make_page(np.random.default_rng((9, seed)), "test", page.kind)
        bare.names, bare.values = {}, {}
        changed = (picture != render(bare, np.random.default_rng(seed))).any(-1)
        near = np.zeros((128, 128), bool)
        for text in page.texts:
            for x, y in text.spots():
                half = text.width / 2 if not text.is_number else 4
                area = np.s_[max(int(y - 7), 0) : int(y + 7), max(int(x - half), 0) : int(x + half) + 1]
                assert changed[area].any()
                near[max(int(y - 9), 0) : int(y + 10), max(int(x - half - 4), 0) : int(x + half + 5)] = True
        assert not changed[~near].any()


def test_relevance_peaks_in_the_patches_asked_about():
    for page in _pages(15):
        text = [*page.values.values(), *page.bars][0]
        value = relevance([text])
        peaks = value.reshape(16, 8, 16, 8).max((1, 3)).reshape(-1)
        spots = {patch_of(*spot) for spot in text.spots()}
        assert set(np.argsort(-peaks)[: len(spots)].tolist()) == spots
        assert (relevance([]) == 0).all()


def test_patch_labels_name_what_a_patch_shows_and_not_whose_it_is():
    for page in _pages(30):
        labels = patch_labels(page)
        assert set(labels) == set(SLOTS)
        for name, text in page.names.items():
            patch = patch_of(*text.spots()[0])
            assert NAMES[labels["name"][patch]] == name and CELLS[labels["cell"][patch]] == text.cell
        for text in page.values.values():
            patches = [patch_of(*spot) for spot in text.spots()]
            assert "".join(str(labels["digit"][patch]) for patch in patches) == text.text
            assert [labels["order"][patch] for patch in patches] == list(range(len(patches)))
            assert [labels["last"][patch] for patch in patches] == [-1] * (len(patches) - 1) + [0]
            assert all(labels["name"][patch] == labels["bar"][patch] == -1 for patch in patches), "names its owner"
        for bar in page.bars:
            assert NAMES[labels["bar"][patch_of(*bar.spots()[0])]] == bar.name
        assert sum((labels["bar"] >= 0).tolist()) == len(page.bars)


def test_packed_questions_keep_to_themselves():
    sample = DensePages(_WORD_IDS, {"field": 1, "exist": 1, "dialogue": 1})[0]
    words = {index: word for word, index in _WORD_IDS.items()}
    segments = sorted(set(sample["segment"].tolist()) - {-1})
    assert len(segments) >= 8
    asked = []
    for segment in segments:
        own = sample["segment"] == segment
        assert sample["place"][own].tolist() == list(range(own.sum()))
        answer = [words[i] for i in sample["targets"][own] if i >= 0]
        assert answer[-1] == "</s>" and len(answer) >= 2
        asked.append(" ".join(words[i] for i in sample["ids"][own]))
        assert sample["about"][segment].any()
    assert len(set(asked)) == len(asked)
    assert (sample["targets"][sample["segment"] == -1] == -100).all()
    assert {GROUPS[group] for group in set(sample["group"].tolist()) - {-1}} <= {"field", "exist", "dialogue"}


def test_pages_are_of_the_kinds_that_the_groups_need_and_drawn_only_if_asked():
    data = DensePages(_WORD_IDS, {"cell": 1, "exist": 1}, draw=False)
    assert "image" not in data[0] and "image" in DensePages()[0] and "ids" not in DensePages()[0]
    assert data.kinds == ["table"] and DensePages(_WORD_IDS, {"exist": 1}).kinds == list(KINDS)
