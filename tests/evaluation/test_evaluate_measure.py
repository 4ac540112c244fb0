"""What `trainers.evaluate` measures is what `generate` does, in batches of any size, also after an interruption."""

from dataclasses import replace

import numpy as np
import pytest
from fake_suite import FakeSuite, greedy, make_items, suite_of, tiny_pruner
from tiny_llava import EOS, SPECIAL

from prunezoo.core.contract import PruneOutput, Pruner
from prunezoo.core.plan import mask_to_index
from trainers.data.suite import Item
from trainers.evaluation.budgets import parse_budgets
from trainers.evaluation.journal import Journal
from trainers.evaluation.measure import measure
from trainers.evaluation.methods import PrunerMethod, build_method
from trainers.evaluation.record import build_record, select
from trainers.evaluation.tables import tokens_of


@pytest.mark.parametrize("names", [("uniform", "fastervlm"), ("tome", "visionzip"), ("fastv", "fastervlm")])
def test_teacher_forcing_is_exactly_greedy_decoding(ending_llava, names):
    """The oracle: an item counts as right if and only if `generate` through `attach` writes its reference answer."""
    vlm, processor = ending_llava
    items = make_items(60)
    settings = [(name, budget) for name in names for budget in parse_budgets(["4", "1/4"])]
    written = {
        (name, budget.label): greedy(vlm, processor, items, tiny_pruner(name), budget.keep) for name, budget in settings
    }
    # reference answers: what one of the settings writes, so that each setting is right on some and wrong on others
    keys = list(written)
    referenced = []
    for i, item in enumerate(items):
        ids = written[keys[i % len(keys)]][i]
        usable = ids[-1] == EOS and len(ids) > 1 and all(token >= len(SPECIAL) for token in ids[:-1])
        answer = processor.tokenizer.decode(ids[:-1]) if usable else "red"
        turns = (*item.turns[:-1], (item.question, answer))
        referenced.append(Item(item.id, item.image, turns, item.group))
    answers = [[*processor.tokenizer(item.answer)["input_ids"], EOS] for item in referenced]

    measured = measure(
        vlm,
        processor,
        suite_of(referenced),
        [PrunerMethod(name, [tiny_pruner(name)]) for name in names],
        parse_budgets(["4", "1/4"]),
        batch_size=7,
    )
    for key in keys:
        expected = [float(ids == answer) for ids, answer in zip(written[key], answers, strict=True)]
        assert 0.1 < np.mean(expected) < 0.9, "the comparison would prove little"
        assert len({len(answer) for answer, right in zip(answers, expected, strict=True) if right}) > 1
        assert measured.scores[key].correct.tolist() == expected


def test_all_tokens_equal_the_full_model_and_zero_tokens_are_none(ending_llava):
    vlm, processor = ending_llava
    measured = measure(
        vlm, processor, suite_of(make_items(10)), [build_method("uniform")], parse_budgets(["1.0", "1/6"])
    )
    full, everything, few = (measured.scores[k] for k in (("full", "1.0"), ("uniform", "1.0"), ("uniform", "1/6")))
    np.testing.assert_array_equal(full.correct, everything.correct)
    assert set(full.tokens) == set(everything.tokens) == {36}
    assert set(full.agreement) == set(everything.agreement) == {1}
    assert full.kl.max() == everything.kl.max() == 0
    assert set(measured.scores["none", "0"].tokens) == {0}
    assert set(few.tokens) == {6}
    assert few.kl.min() > 1e-4
    assert few.agreement.mean() < 1


def test_batches_change_nothing_and_random_is_the_mean_of_five_seeds(ending_llava):
    vlm, processor = ending_llava
    items, methods = make_items(11), [build_method("random")]
    one = measure(vlm, processor, suite_of(items), methods, parse_budgets(["1/6"]), batch_size=1)
    many = measure(vlm, processor, suite_of(items), methods, parse_budgets(["1/6"]), batch_size=8)
    assert methods[0].replicas == 5
    for key, scores in one.scores.items():
        for name, values in vars(scores).items():
            np.testing.assert_allclose(values, vars(many.scores[key])[name], atol=1e-5, err_msg=f"{key} {name}")
    agreement = one.scores["random", "1/6"].agreement
    assert set(np.round(agreement * 5, 6)) <= {0, 1, 2, 3, 4, 5}
    assert ((agreement > 0) & (agreement < 1)).any()


class Adaptive(Pruner):
    """Decides alone, by what it sees."""

    name = "adaptive"
    exact = False

    def reduce(self, inputs, keep):
        norm = inputs.features.norm(dim=-1).masked_fill(~inputs.valid, -1)
        index, valid = mask_to_index(norm >= norm.mean(1, keepdim=True))
        return PruneOutput(index, valid)


def test_a_method_that_decides_alone_shows_how_its_tokens_spread(ending_llava):
    vlm, processor = ending_llava
    methods = [PrunerMethod("adaptive", [Adaptive().eval()]), build_method("uniform")]
    measured = measure(vlm, processor, suite_of(make_items(12)), methods, parse_budgets(["1/6"]))
    record = build_record(measured, ["adaptive"], {})
    tokens = measured.scores["adaptive", "1/6"].tokens
    assert len(set(tokens)) > 3
    (row,) = select(record, pruner="adaptive", group="mean")
    assert row["tokens_spread"] == pytest.approx(np.std(tokens), abs=1e-6)
    assert tokens_of(row) == f"{row['tokens']:.1f} ± {np.std(tokens):.1f}"
    (row,) = select(record, pruner="uniform", group="mean")
    assert (tokens_of(row), row["tokens_spread"]) == ("6.0", 0)


def test_an_interrupted_measurement_goes_on_where_it_stopped(ending_llava, tmp_path, monkeypatch):
    vlm, processor = ending_llava
    items, budgets, methods = make_items(10), parse_budgets(["1/6"]), [build_method("uniform")]
    monkeypatch.setattr("trainers.evaluation.measure.WINDOW", 2)
    whole = measure(vlm, processor, suite_of(items), methods, budgets, batch_size=2)

    class Interrupted(FakeSuite):
        def item(self, index: int) -> Item:
            if index == 7:
                raise KeyboardInterrupt
            return items[index]

    journal = Journal(tmp_path / "e.json.partial.npz", "these settings")
    with pytest.raises(KeyboardInterrupt):
        measure(vlm, processor, Interrupted(limit=10), methods, budgets, batch_size=2, journal=journal)
    steps = []
    rest = suite_of([replace(item, group="") for item in items[:4]] + items[4:])  # the first four are not asked again
    resumed = measure(vlm, processor, rest, methods, budgets, batch_size=2, advance=steps.append, journal=journal)
    assert steps == [4 * 3, *[2] * 9]
    np.testing.assert_array_equal(resumed.group_of, whole.group_of)
    for key, scores in whole.scores.items():
        for name, values in vars(scores).items():
            np.testing.assert_array_equal(values, vars(resumed.scores[key])[name])

    other = Journal(journal.path, "other settings")
    measure(vlm, processor, suite_of(items), methods, budgets, batch_size=2, advance=steps.append, journal=other)
    assert 0 in steps
    journal.path.write_bytes(journal.path.read_bytes()[:100])
    assert other.read(dict(whole.scores), [""] * 10) == 0
    journal.remove()
    assert not list(tmp_path.iterdir())
