"""Suites of several pictures: deterministic, split cleanly, right by construction, and their oracle on the point."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from prunezoo.core.errors import PruneZooError
from prunezoo.core.files import read_object
from trainers import evaluate
from trainers.data import several_icl, several_steps, several_video
from trainers.data.conversation import ConversationCollator
from trainers.data.digest import digest_of
from trainers.data.scenes_render import COLORS
from trainers.data.several_render import SHAPES, WAYS, new_piece, scatter
from trainers.data.suite import SPLITS, load_suite
from trainers.evaluation.loading import load_vlm
from trainers.evaluation.measure import see
from trainers.evaluation.methods import build_method

SUITES = {"scenes-icl": several_icl, "scenes-video": several_video, "scenes-steps": several_steps}


def rng_of(seed):
    return np.random.default_rng((7, seed))


@pytest.mark.parametrize("name", SUITES)
def test_an_item_is_the_same_every_time_and_of_its_split_alone(name):
    one, other = load_suite(name, "test"), load_suite(name, "test", limit=30)
    for index in (0, 7, 29):
        assert digest_of(one[index]) == digest_of(other[index])
        assert np.array_equal(one[index].relevant, other[index].relevant)
    seen = {split: {picture.tobytes() for i in range(24) for _, picture in load_suite(name, split)[i].pictures}
            for split in SPLITS}  # fmt: skip
    assert not seen["train"] & seen["validation"] and not seen["train"] & seen["test"]
    assert not seen["validation"] & seen["test"]


@pytest.mark.parametrize("name", SUITES)
def test_items_say_what_matters_of_every_picture_in_known_words(name):
    suite, words = load_suite(name, "validation"), {*SUITES[name].WORDS, *COLORS, *SHAPES}
    for item in suite[:24]:
        assert item.relevant.shape == (len(item.pictures), 48, 48)
        assert {size for _, picture in item.pictures for size in picture.size} == {48}
        assert 0 < (item.relevant > 0).mean() < 0.2
        assert {word for turn in item.turns for text in turn for word in text.split()} <= words
        assert item.group in suite.groups and 0 < suite.chance[item.group] <= 0.5


def test_a_digest_knows_every_picture_and_where_it_stands():
    item = load_suite("scenes-icl")[0]
    last = item.more[-1]
    others = [replace(item, more=item.more[:-1]), replace(item, more=(*item.more[:-1], (0, last[1])))]
    others.append(replace(item, more=(*item.more[:-1], (last[0], item.image))))
    assert len({digest_of(one) for one in (item, *others)}) == 4


@pytest.mark.parametrize("group", several_icl.GROUPS)
def test_the_word_follows_from_the_examples(group):
    named, count = group.split("-")
    said = Counter()
    for seed in range(40):
        rule = several_icl.Rule(group, rng_of(seed))
        examples, query = rule.examples(), rule.query()
        assert len(examples) == int(count)
        meaning = {}
        for example in (*examples, query):
            things = [(piece.color, piece.shape) for piece in example.pieces]
            asked = [thing for thing in things if (thing[1] if named == "color" else thing[0]) in example.question]
            assert len(asked) == 1, (things, example.question)  # the question picks out one thing
            value = asked[0][named == "shape"]
            if example is query:
                assert meaning[value] == query.answer
                said[list(meaning.values()).index(query.answer)] += 1
            else:
                assert value not in meaning and example.answer not in meaning.values()
                meaning[value] = example.answer
    assert len(said) == int(count) and max(said.values()) < 40 * 1.7 / int(count)  # no place is the answer's own


def shown(clip):
    """(colour, x, y) of the things in each frame, by drawing no picture."""
    return [[(p.color, p.x, p.y) for track in clip.tracks for p in track.at(frame)] for frame in range(clip.frames)]


@pytest.mark.parametrize("frames", [8, 16])
@pytest.mark.parametrize("group", [*several_video.GROUPS, several_video.COUNTING])
def test_answers_follow_from_the_frames(group, frames):
    answers = Counter()
    for seed in range(40):
        clip, question = several_video.ask(group, rng_of(seed), frames)
        by_frame, answer = shown(clip), question.answer
        assert len(by_frame) == frames
        answers[answer] += 1
        if group == "first":
            first = next(things for things in by_frame if things)
            assert [color for color, *_ in first] == [answer]
        elif group == "end":
            assert [color for color, *_ in by_frame[-1]] == [answer]
        elif group == "move":
            places = [(x, y) for things in by_frame for color, x, y in things if color in question.text]
            moved = np.subtract(places[-1], places[0])
            assert 12 <= abs(moved).max() <= 18 and (np.sign(moved) == WAYS[answer]).all()
        else:
            color = question.text.split()[2]
            life = frames // 8
            assert sum(one[0] == color for things in by_frame for one in things) == life * int(answer)
    assert max(answers.values()) <= 22


def test_things_of_a_clip_never_touch():
    for seed in range(20):
        for clip in (several_video.moving(rng_of(seed)), several_video.coming(rng_of(seed), (4, 4))):
            for frame in range(clip.frames):
                pieces = [piece for track in clip.tracks for piece in track.at(frame)]
                assert all(a.clear_of(b) for number, a in enumerate(pieces) for b in pieces[:number])
                assert all(piece.inside for piece in pieces)


def test_steps_of_an_episode_follow_from_one_another():
    suite = load_suite("scenes-steps")
    for number in range(4):
        items = suite[number * 6 : number * 6 + 6]
        assert len({item.stream for item in items}) == 1 and items[0].stream != suite[number * 6 + 6].stream
        for before, after in pairwise(items):  # three of the four pictures are seen again
            assert [p.tobytes() for _, p in before.pictures[1:]] == [p.tobytes() for _, p in after.pictures[:-1]]
    for seed in range(30):
        episode = several_steps.make_episode(rng_of(seed))
        was = None
        for picture, (hand, goal) in enumerate(zip(episode.hands, episode.goals, strict=True)):
            x, y = goal.x - hand.x, goal.y - hand.y
            action = episode.action(picture)
            assert np.dot(WAYS[action], (x, y)) == max(abs(x), abs(y)) >= min(abs(x), abs(y)) + 4
            assert all(goal.clear_of(other) for other in (hand, *episode.others))
            if was is not None:  # the hand has done as it was told, and the goal has drifted
                told = np.multiply(2, WAYS[episode.action(picture - 1)])
                assert (np.subtract((hand.x, hand.y), was[0]) == told).all()
                assert (np.subtract((goal.x, goal.y), was[1]) == np.multiply(3, WAYS[episode.way])).all()
            was = (hand.x, hand.y), (goal.x, goal.y)


@pytest.mark.parametrize("name", SUITES)
def test_relevant_pixels_are_those_of_the_things_asked_about(name):
    checked = 0
    for item in load_suite(name, "test")[:24]:
        words = {word for question, answer in item.turns for word in f"{question} {answer}".split()}
        colors = [color for color in COLORS if color in words]
        for (_, picture), relevant in zip(item.pictures, item.relevant, strict=True):
            if len(colors) != 1 or not relevant.any() or item.group == "reach":  # it is about the hand as well
                continue
            inside = np.asarray(picture, float)[relevant > 0]
            near = np.abs(inside - COLORS[colors[0]]).max(1) < 60
            assert near.mean() > 0.15, item.id
            checked += 1
    assert checked > 5 or name == "scenes-icl"


def test_things_are_scattered_apart():
    for seed in range(20):
        rng = rng_of(seed)
        placed = scatter(rng, [new_piece(rng, "red", "ring") for _ in range(4)])
        assert all(a.clear_of(b) for number, a in enumerate(placed) for b in placed[:number])


def test_a_clip_of_another_length_is_refused():
    assert len(load_suite("scenes-video", frames="16")[0].pictures) == 16
    with pytest.raises(PruneZooError, match="frames=9 must be 8 or 16"):
        load_suite("scenes-video", frames=9)


def test_frames_of_a_clip_are_measured_one_by_one_too(tmp_path, request, capsys):
    """A budget is of the clip, or with `frames:` of each frame; who is named is compared with all others."""
    vlm, json = request.config.rootpath / "checkpoints" / "tiny-llava", tmp_path / "record.json"
    words = f"--vlm {vlm} --suite scenes-video --limit 4 --keep 8 --pruner evs uniform frames:uniform --json {json}"
    evaluate.main([*words.split(), "--compare", "frames:uniform"])
    record = read_object(json, what="a record", remedy="")
    tokens = {row["pruner"]: row["tokens"] for row in record["rows"] if row["group"] == "mean"}
    assert tokens == {"full": 8 * 144, "none": 0, "evs": 8, "uniform": 8, "frames:uniform": 64}
    pairs = {(row["pruner"], row["rival"]) for row in record["paired"]}
    assert {("frames:uniform", "evs"), ("frames:uniform", "uniform"), ("evs", "uniform")} <= pairs
    assert ("uniform", "frames:uniform") not in pairs
    with pytest.raises(SystemExit):
        evaluate.main([*words.split(), "--compare", "random"])
    assert "--compare random: not among what is measured" in capsys.readouterr().err


def test_an_oracle_keeps_what_matters_in_each_picture(request):
    vlm, processor = load_vlm(str(request.config.rootpath / "checkpoints" / "tiny-llava"), "cpu", "float32")
    oracle = build_method("oracle")
    for name, clips in (("scenes-icl", False), ("scenes-video", True), ("scenes-video", False)):
        items = load_suite(name)[1:3]  # of two and four examples
        _, view = see(vlm, ConversationCollator(processor)(items), items, [oracle], (), clips)
        kept = oracle.pruner(view)(view.inputs, 6)
        for row, (item, number) in enumerate(view.pictures):
            for cell in view.inputs.cells[row, kept.index[row, :3]].tolist():
                relevant = items[item].relevant[number + cell[0]]
                high, wide = (slice(4 * place, 4 * place + 4) for place in cell[1:])  # 144 tokens of 48×48 pixels
                assert relevant[high, wide].any() or not relevant.any()


def test_the_suite_of_all_asks_the_questions_of_each():
    suite = load_suite("several")
    items = suite[:20]
    assert [item.group for item in items[:18]] == list(suite.groups) * 2
    assert digest_of(items[1]) == digest_of(load_suite("scenes-icl")[1])
    assert digest_of(items[13]) == digest_of(load_suite("scenes-video")[3])
    assert digest_of(items[16]) == digest_of(load_suite("scenes-steps")[2 * 6 + 1])
    ids = [suite[index].id + suite[index].group for index in range(7, len(suite), 900)]
    assert len(set(ids)) == len(ids)
