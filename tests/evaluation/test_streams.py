"""Streams are followed by pruners that remember, and by nobody else; whatever window a step falls into."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_suite import FakeSuite, make_items

from prunezoo.core.errors import PruneZooError
from prunezoo.core.memory import Memory
from prunezoo.core.registry import build_pruner
from prunezoo.host import encode
from prunezoo.host.run import run_pruned
from trainers.data.conversation import ConversationCollator
from trainers.data.suite import Item, load_suite
from trainers.evaluation.budgets import parse_budgets
from trainers.evaluation.journal import Journal
from trainers.evaluation.measure import ALONE, measure
from trainers.evaluation.methods import build_method
from trainers.evaluation.processes import Processes
from trainers.evaluation.streams import steps_of
from trainers.training.frozen import judge
from trainers.training.losses import answer_slots

LENGTHS = (3, 1, 4, 2)  # of the streams of ten items


class Streams(FakeSuite):
    """Ten items, in streams of these lengths."""

    streams = True

    def __init__(self, stop: int = 10) -> None:
        super().__init__()
        names = [f"s{number}" for number, length in enumerate(LENGTHS) for _ in range(length)]
        self.items = [replace(item, stream=name) for item, name in zip(make_items(10), names, strict=True)]
        self.stop = stop

    def item(self, index: int) -> Item:
        if index >= self.stop:
            raise KeyboardInterrupt
        return self.items[index]


def equal(one, two, *pruners):
    """Whether two measurements have the same bits for these."""
    keys = [key for key in one.scores if key[0] in pruners]
    assert len(keys) == len(pruners)
    return all(
        np.array_equal(values, vars(two.scores[key])[name])
        for key in keys
        for name, values in vars(one.scores[key]).items()
    )


def measured(ending_llava, *names, suite=None, **options):
    methods = [build_method(name) for name in names]
    return measure(*ending_llava, suite or Streams(), methods, parse_budgets(["5"]), batch_size=2, **options)


def by_hand(vlm, processor, name, items):
    """KL of each item, one at a time, with one memory for all of its stream."""
    pruner, memory, found = build_pruner(name).eval(), Memory(), []
    for item in items:
        memory.streams = [item.stream]
        batch = ConversationCollator(processor)([item])
        with torch.no_grad():
            encoded = encode(vlm, batch, pruner.needs)
            runs = [run_pruned(vlm, encoded, pruner, keep, memory=own) for keep, own in ((5, memory), (1.0, None))]
        (said, tokens, sample), (full, *_) = (answer_slots(run.host.logits, run.host.labels) for run in runs)
        found.append(float(judge(said, full, tokens, sample, 1)[0, 2]))
    return found


def test_steps_find_what_a_caller_would_hold(ending_llava):
    scores = measured(ending_llava, "changed", "steps:changed").scores
    followed, alone = (scores[name, "5"].kl for name in ("changed", "steps:changed"))
    np.testing.assert_allclose(followed, by_hand(*ending_llava, "changed", Streams().items), rtol=1e-3, atol=1e-6)
    first = np.isin(np.arange(10), np.cumsum((0, *LENGTHS[:-1])))
    np.testing.assert_allclose(followed[first], alone[first], rtol=1e-3, atol=1e-6)
    assert (np.abs(followed - alone)[~first] > 1e-5).any()


def test_what_is_measured_beside_changes_no_bit(ending_llava):
    alone, beside = measured(ending_llava, "uniform"), measured(ending_llava, "changed", "uniform")
    assert equal(alone, beside, "full", "none", "uniform")
    assert equal(measured(ending_llava, "changed"), beside, "changed")


@pytest.mark.parametrize("batches", [1, 2])
def test_it_goes_on_in_the_middle_of_a_stream(ending_llava, tmp_path, monkeypatch, batches):
    monkeypatch.setattr("trainers.evaluation.measure.WINDOW", batches)  # of 2 or 4 items: some begin inside a stream
    names, steps = ("changed", "uniform"), []
    whole = measured(ending_llava, *names, advance=steps.append)
    assert sum(steps) == 10 * 4
    journal = Journal(tmp_path / "e.json.partial.npz", "these settings")
    with pytest.raises(KeyboardInterrupt):
        measured(ending_llava, *names, suite=Streams(stop=7), journal=journal)
    resumed = measured(ending_llava, *names, journal=journal)
    assert equal(whole, resumed, "full", "none", *names)


def test_each_process_has_whole_streams_in_order():
    class Two(Processes):
        world = 2

        def __init__(self, rank: int) -> None:
            self.rank = rank

    suite, window = Streams(), range(2, 10)
    seen = [list(steps_of(suite, window, 2, Two(rank))) for rank in range(2)]
    streams = [{name for step in own for name in step.streams} for own in seen]
    assert not streams[0] & streams[1]
    places = [place for own in seen for step in own for place in step.places]
    assert sorted(places) == list(range(10))  # with the two that came before the window
    for step in (step for own in seen for step in own):
        assert len(set(step.streams)) == len(step.streams)
    alone = list(steps_of(suite, range(4, 8), 8, ALONE))
    assert [step.places for step in alone] == [[4], [5], [6], [7]] and [s.begins for s in alone] == [True, *[False] * 3]


def test_items_of_no_stream_are_each_their_own():
    suite = Streams()
    suite.items = [replace(item, stream="") for item in suite.items]
    assert [step.places for step in steps_of(suite, range(4, 8), 3, ALONE)] == [[4, 5, 6], [7]]


def test_where_answers_are_written_streams_are_not_followed(ending_llava):
    class Written(Streams):
        scorer, new_tokens = "exact", 3

    with pytest.raises(PruneZooError, match=r"--pruner changed: .* say steps:changed"):
        measured(ending_llava, "changed", suite=Written())
    assert measured(ending_llava, "steps:changed", suite=Written()).items == 10


def test_only_scenes_steps_is_of_streams():
    items = load_suite("scenes-steps")[:12]
    assert load_suite("scenes-steps").streams and all(item.stream for item in items)
    assert not load_suite("several").streams and not load_suite("scenes").streams
