"""What says how good a suite is: the oracle, attention, relevance, the bars of the instrument; and examples."""

from dataclasses import replace

import pytest
import torch
from fake_suite import greedy, make_items, suite_of

from prunezoo.core.errors import PruneZooError
from prunezoo.core.registry import build_pruner
from prunezoo.host import encode
from prunezoo.host.run import run_pruned
from prunezoo.host.signals.relevance import relevance_map
from trainers.cli.names import find_pruner
from trainers.data.conversation import ConversationCollator
from trainers.data.suite import Item
from trainers.evaluation.budgets import parse_budgets
from trainers.evaluation.examples import show_examples
from trainers.evaluation.instrument import judge
from trainers.evaluation.measure import measure
from trainers.evaluation.methods import View, build_method, view_of
from trainers.evaluation.tables import display_name


def look(vlm, processor, items, *names) -> View:
    batch = ConversationCollator(processor)(items)
    return view_of(vlm, batch, encode(vlm, batch), items, [build_method(name) for name in names])


def test_the_oracle_keeps_what_the_question_is_about(ending_llava):
    view = look(*ending_llava, make_items(3), "oracle")
    oracle = build_method("oracle")
    assert oracle.pruner(view)(view.inputs, 2).index.tolist() == [[8, 9]] * 3
    kept = oracle.pruner(view)(view.inputs, 0.5)
    assert kept.count.tolist() == [18] * 3
    assert {8, 9} <= set(kept.index[0].tolist())
    blind = [Item(item.id, item.image, item.turns, item.group) for item in view.items]
    with pytest.raises(PruneZooError, match="fake-0: the suite does not say which pixels matter"):
        oracle.pruner(View(view.inputs, blind))


def test_attention_diagnostics_read_the_full_model(ending_llava):
    vlm, processor = ending_llava
    items = make_items(4)
    before = vlm.config.text_config._attn_implementation
    view = look(vlm, processor, items, "attention@1")
    assert vlm.config.text_config._attn_implementation == before
    assert view.attention.shape == (2, 2, 4, 36)
    assert view.attention.min() > 0
    assert view.attention.sum(-1).max() < 1
    for b, item in enumerate(items):  # padding changes nothing
        alone = look(vlm, processor, [item], "attention@1")
        torch.testing.assert_close(view.attention[:, :, b], alone.attention[:, :, 0])
    # the last prompt token is where the first word of the answer is predicted
    prompt = ConversationCollator(processor, answers=False)(items[1:2])
    vlm.set_attn_implementation({"text_config": "eager"})
    weights = vlm(**prompt, output_attentions=True).attentions[1][0, :, -1].mean(0)
    vlm.set_attn_implementation({"text_config": before})
    image = prompt["input_ids"][0] == vlm.config.image_token_id
    torch.testing.assert_close(view.attention[1, 0, 1], weights[image])
    best = weights[image].topk(5).indices.sort().values
    assert build_method("attention@1").pruner(view)(view.inputs, 5).index[1].tolist() == best.tolist()
    with pytest.raises(PruneZooError, match="layers 0 to 1"):
        build_method("attention@2").pruner(view)


def test_the_relevance_diagnostic_knows_the_answer(ending_llava):
    vlm, processor = ending_llava
    method, chosen = build_method("relevance"), []
    for answer in ("red", "1 2"):
        items = make_items(3, answer)
        view = look(vlm, processor, items, "relevance")
        expected = relevance_map(vlm, encode(vlm, ConversationCollator(processor)(items)))
        assert torch.equal(view.relevance, expected) and view.attention is None
        chosen.append(method.pruner(view)(view.inputs, 4).index)
        assert chosen[-1].tolist() == expected.topk(4).indices.sort().values.tolist()
        measured = measure(vlm, processor, suite_of(items), [method], parse_budgets(["4"]))
        assert measured.scores["relevance", "4"].tokens.tolist() == [4, 4, 4]
    assert not torch.equal(*chosen)


def test_random_order_stands_where_another_method_inside_the_tower_does(ending_llava):
    vlm, processor = ending_llava
    items = make_items(3)
    batch = ConversationCollator(processor)(items)
    encoded = encode(vlm, batch)
    method = build_method("random@tome", seed=3)
    view = view_of(vlm, batch, encoded, items, [method])
    own, others = (run_pruned(vlm, encoded, method.pruner(view, number), 9).output for number in (0, 1))
    theirs = run_pruned(vlm, encoded, build_pruner("tome"), 9).output
    assert own.blocks.tolist() == theirs.blocks.tolist() and (own.blocks[:, 0] > own.blocks[:, -1]).any()
    assert own.index.tolist() != others.index.tolist() and method.replicas == 2
    assert method.pruner(view).restore is False and build_method("random@tome_unmerge").pruner(view).restore is True
    assert display_name(find_pruner("random@tome")) == "random@tome"
    assert display_name("random@checkpoints/mine") == "random@mine"
    with pytest.raises(PruneZooError, match="random@divprune: this is for methods of the vision stage"):
        build_method("random@divprune")


def test_examples_show_what_generate_writes(ending_llava):
    vlm, processor = ending_llava
    budgets = parse_budgets(["4", "1/4"])
    written = {
        budget: [
            processor.tokenizer.decode(ids, skip_special_tokens=True)
            for ids in greedy(vlm, processor, make_items(4), build_pruner("uniform"), budget.keep)
        ]
        for budget in budgets
    }
    items = [  # whose answers are what is written at the first budget, where anything is
        replace(item, turns=(*item.turns[:-1], (item.question, text or "red")))
        for item, text in zip(make_items(4), written[budgets[0]], strict=True)
    ]
    examples = show_examples(vlm, processor, items, [build_method(n) for n in ("uniform", "pool", "oracle")], budgets)
    assert [e.item for e in examples] == items
    assert all(e.grid == (6, 6) for e in examples)
    for number, budget in enumerate(budgets):
        for example, text in zip(examples, written[budget], strict=True):
            shown = example.shown[3 * number]
            assert (shown.pruner, shown.keep, shown.anchors) == ("uniform", budget.label, False)
            assert (shown.answer, shown.right) == (text, text == example.item.answer)
            assert example.shown[3 * number + 1].anchors
    assert [example.shown[0].right for example in examples] == [bool(text) for text in written[budgets[0]]]
    assert {shown.right for example in examples for shown in example.shown} == {True, False}


def record_where(**accuracy: float) -> dict:
    """A record of one group; accuracies by name, `oracle9` is the oracle at 1/9."""
    keeps = {"full": ("full", "1.0"), "none": ("none", "0"), "random9": ("random", "1/9"), "oracle9": ("oracle", "1/9")}
    keeps |= {"oracle18": ("oracle", "1/18"), "a18": ("attention@0", "1/18"), "b18": ("attention-mean@1", "1/18")}
    rows = [
        {"pruner": keeps[name][0], "keep": keeps[name][1], "group": group, "accuracy": value}
        for name, value in accuracy.items()
        for group in ("counting", "mean")
    ]
    return {"groups": ["counting"], "chance": {"counting": 0.25}, "rows": rows}


GOOD = {"full": 0.86, "none": 0.34, "random9": 0.7, "oracle9": 0.85, "oracle18": 0.8, "a18": 0.5, "b18": 0.76}


@pytest.mark.parametrize(
    ("change", "failing"),
    [
        ({}, None),
        ({"full": 0.84, "oracle9": 0.83, "random9": 0.6}, "full, counting"),
        ({"none": 0.36}, "zero tokens, counting"),
        ({"random9": 0.72}, "random at 1/9"),
        ({"oracle9": 0.83}, "oracle at 1/9"),
        ({"b18": 0.78}, "best attention score"),
    ],
)
def test_each_bar_of_the_instrument_fails_alone(change, failing):
    verdicts = judge(record_where(**{**GOOD, **change}))
    assert len(verdicts) == 5
    assert [v.bar.split(":")[0].removesuffix(" at 1/18") for v in verdicts if not v.passed] == (
        [failing] if failing else []
    )
