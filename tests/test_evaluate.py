"""`trainers.evaluate`: what is measured is what `generate` does, and the command says what is wrong in one line."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import IMAGE_SIZE, SPECIAL, WORDS, make_image, make_llava, make_processor
from families import Sample, tiny_family

from modules.core.contract import PruneOutput, Pruner
from modules.core.errors import PruneZooError
from modules.core.plan import mask_to_index
from modules.core.registry import build_pruner
from modules.host import attach, encode
from modules.host.relevance import relevance_map
from modules.host.run import run_pruned
from modules.host.signals import encode_needs
from trainers import evaluate
from trainers.data import suite as suites
from trainers.data.conversation import ConversationCollator
from trainers.data.suite import Item, Suite
from trainers.evaluation.budgets import keep_for_mean, parse_budgets, planned_mean
from trainers.evaluation.examples import same_answer, show_examples
from trainers.evaluation.instrument import judge
from trainers.evaluation.journal import Journal
from trainers.evaluation.measure import measure
from trainers.evaluation.methods import PrunerMethod, View, build_method, view_of
from trainers.evaluation.record import build_record, read_record, select
from trainers.evaluation.tables import tokens_of

EOS = SPECIAL.index("</s>")
GROUPS = ("one", "two")


def make_items(number: int, answer: str = "red") -> list[Item]:
    """Items of two groups, with questions of different lengths and every fifth a dialogue; nothing like each other."""
    rng = np.random.default_rng(5)
    items = []
    for i in range(number):
        question = " ".join(rng.choice(WORDS, size=int(rng.integers(2, 9)))) + " ?"
        turns = ((question, answer),) if i % 5 else (("what color ?", "blue"), (question, answer))
        relevant = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.float32)
        relevant[4:8, 8:16] = 1.0  # row 1, columns 2 and 3 of the 6 x 6 grid
        items.append(Item(f"fake-{i}", make_image(i), turns, GROUPS[i % 2], relevant))
    return items


class FakeSuite(Suite):
    """Items that are at hand."""

    name = "fake"
    groups = GROUPS
    chance = {"one": 0.2, "two": 0.2}

    def __init__(self, split: str = "test", limit: int | None = None, number: str = "12") -> None:
        super().__init__(split, limit)
        self.items = make_items(int(number))

    def size(self) -> int:
        return len(self.items)

    def item(self, index: int) -> Item:
        return self.items[index]


def suite_of(items: list[Item]) -> FakeSuite:
    suite = FakeSuite()
    suite.items = items
    return suite


@pytest.fixture
def fake_suite(monkeypatch):
    monkeypatch.setitem(suites._SUITES, "fake", FakeSuite)


@pytest.fixture(scope="module")
def ending_llava():
    """A random model that likes to end its answers, so that greedy decoding writes short answers and stops."""
    vlm = make_llava(seed=3)
    with torch.no_grad():
        special = torch.arange(len(SPECIAL))[:, None]  # other special tokens than the end are no words of an answer
        vlm.lm_head.weight[: len(SPECIAL)] *= torch.where(special == EOS, 2.0, 0.0)
    vlm.generation_config.eos_token_id = EOS
    vlm.generation_config.pad_token_id = 0
    return vlm, make_processor()


def greedy(vlm, processor, items, pruner, keep) -> list[list[int]]:
    """Token ids that `generate` writes, the end token included, with a pruner attached in the ordinary way."""
    prompt = ConversationCollator(processor, answers=False)(items)
    with attach(vlm, pruner, keep=keep):
        ids = vlm.generate(**prompt, max_new_tokens=6, do_sample=False)[:, prompt["input_ids"].shape[1] :]
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in ids.tolist()]


def tiny_pruner(name):
    """A pruner for a decoder of two layers."""
    return build_pruner(name, **({"layer": 1} if name == "fastv" else {})).eval()


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


class Late(Pruner):
    """In front of the second and third layer; as a combination, behind a pruner of the prompt stage that keeps half."""

    name = "late"
    stage = "layer"
    combined = False

    def stages(self, depth):
        return (1, 2)

    def score(self, inputs):
        return inputs.features.norm(dim=-1)

    def parts(self, keep):
        return ((build_pruner("uniform").eval(), 0.5), (self, keep)) if self.combined else ((self, keep),)


@pytest.mark.parametrize("kind", ["uniform", "fastv", "late", "combined"])
def test_a_budget_can_be_the_mean_over_the_layers(kind):
    tiny = tiny_family("llava")
    pruner = Late().eval() if kind in ("late", "combined") else tiny_pruner(kind)
    pruner.combined = kind == "combined"
    encoded = encode(tiny.vlm, tiny.batch([Sample(((24, 24),), 5), Sample(((24, 24),), 3)]), encode_needs(pruner))
    available, depth = encoded.inputs.valid.sum(1), 3
    count = int(available[0])
    for keep in (1, 7, 0.5):
        measured = run_pruned(tiny.vlm, encoded, pruner, keep).tokens
        torch.testing.assert_close(measured, planned_mean(pruner, keep, available, depth))
    possible = [float(planned_mean(pruner, keep, available, depth)[0]) for keep in range(1, count + 1)]
    assert possible == sorted(possible)
    for wanted in range(1, count + 1):
        if possible[0] > wanted + 0.5:
            with pytest.raises(
                PruneZooError, match=f"reads {possible[0]:.1f} of {count} tokens in the mean over 3 lay"
            ):
                keep_for_mean(pruner, wanted, available, depth)
        else:
            mean = planned_mean(pruner, keep_for_mean(pruner, wanted, available, depth), available, depth)
            assert set((mean - wanted).abs().tolist()) == {min(abs(one - wanted) for one in possible)}
    least = {"uniform": 1, "fastv": (16 + 1 + 1) / 3, "late": (16 + 4 + 1) / 3, "combined": (8 + 3 + 1) / 3}
    assert count == 16 and possible[0] == pytest.approx(least[kind])


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


def test_examples_show_what_generate_writes(ending_llava):
    vlm, processor = ending_llava
    items = make_items(4)
    budgets = parse_budgets(["4", "1/4"])
    examples = show_examples(vlm, processor, items, [build_method(n) for n in ("uniform", "pool", "oracle")], budgets)
    assert [e.item for e in examples] == items
    assert all(e.grid == (6, 6) for e in examples)
    for number, budget in enumerate(budgets):
        written = greedy(vlm, processor, items, build_pruner("uniform"), budget.keep)
        for example, ids in zip(examples, written, strict=True):
            shown = example.shown[3 * number]
            assert (shown.pruner, shown.keep, shown.anchors) == ("uniform", budget.label, False)
            text = processor.tokenizer.decode(ids, skip_special_tokens=True)
            assert shown.answer.split()[: len(text.split())] == text.split()
            assert shown.right == same_answer(shown.answer, "red")
            assert example.shown[3 * number + 1].anchors


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


def test_the_command_writes_rows_and_a_page(fake_suite, tiny_llava_folder, tmp_path, capsys):
    words = f"--vlm {tiny_llava_folder} --pruner uniform full --rivals --instrument --keep 1/3 5 --suite fake --limit 8"
    words += f" --json {tmp_path / 'e.json'} --report {tmp_path / 'report'} --examples 1"
    assert evaluate.main(words.split()) == 0
    record = read_record(tmp_path / "e.json")
    names = ["uniform", "random", "pool", "resize", "fastervlm", "divprune", "oracle"]
    names += ["attention@0", "attention@1", "attention-mean@0", "attention-mean@1"]
    keeps = ["1/3", "5", "1/9", "1/18"]
    expected = {("full", "1.0"), ("none", "0"), *((name, keep) for name in names for keep in keeps)}
    assert {(row["pruner"], row["keep"]) for row in record["rows"]} == expected
    assert {row["group"] for row in record["rows"]} == {"one", "two", "mean"}
    assert (record["n"], record["split"], record["suite"]) == (8, "test", "fake")
    assert record["command"].startswith("python -m trainers.evaluate --vlm")
    assert {row["tokens"] for row in select(record, pruner="uniform", keep="1/3")} == {12}
    assert {row["tokens"] for row in select(record, pruner="pool", keep="5")} == {5}
    assert {(p["pruner"], p["keep"]) for p in record["paired"]} == {("uniform", keep) for keep in keeps}
    assert len(record["instrument"]) == 2 + 2 + 3
    out = capsys.readouterr().out
    assert "Is this a good instrument?" in out
    assert "uniform" in out
    page = (tmp_path / "report" / "index.html").read_text()
    assert make_items(1)[0].question in page
    assert page.count("data:image/webp") == 2  # two items, their pictures once
    gallery = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert [len(at) for example in gallery["examples"] for at in example["shown"]] == [7] * 2 * 4  # methods, by budget
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pruner", "uniform", "--keep", "0"], "--keep 0: a budget is at least 1 token"),
        (["--pruner", "uniform", "--keep", "-4"], "--keep -4"),
        (["--pruner", "uniform", "--keep", "64", "1.5"], "--keep 1.5: a share lies in"),
        (["--pruner", "uniform", "--keep", "few"], "--keep 'few' is not a budget"),
        (["--pruner", "unifrom"], "unifrom"),
        (["--pruner", "ppm"], "ppm"),
        ([], "nothing to measure"),
        (["--pruner", "full"], "nothing to measure"),
        (["--pruner", "attention@last"], "--pruner attention@last: write the layer as a number"),
        (["--pruner", "attention@7"], "attention@7: the language model has layers 0 to 1"),
        (["--pruner", "uniform", "--limit", "0"], "limit must be at least 1"),
        (["--pruner", "uniform", "--batch-size", "0"], "--batch-size 0"),
        (["--pruner", "uniform", "--suite", "scene"], "suite 'scene' is unknown"),
        (["--pruner", "uniform", "--suite-option", "number"], "write key=value"),
        (["--pruner", "uniform", "--vlm", "no/where/at/all"], "--vlm no/where/at/all: not a loadable"),
    ],
)
def test_mistakes_are_told_in_one_line(fake_suite, tiny_llava_folder, capsys, words, message):
    base = ["--vlm", str(tiny_llava_folder), "--suite", "fake", "--keep", "1/3"]
    with pytest.raises(SystemExit) as caught:
        evaluate.main([*base, *words])
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_equal_tokens_on_the_command_line(fake_suite, tiny_llava_folder, tmp_path, capsys):
    folder = str(tiny_pruner("fastv").save_pretrained(tmp_path / "fastv"))
    words = ["--vlm", str(tiny_llava_folder), "--pruner", folder, "uniform", "--suite", "fake", "--limit", "4"]
    record = tmp_path / "e.json"
    assert evaluate.main([*words, "--keep", "2/3", "--equal-tokens", "--json", str(record)]) == 0
    assert {row["tokens"] for row in read_record(record)["rows"] if row["keep"] == "2/3"} == {24}
    assert evaluate.main([*words, "--keep", "2/3", "--json", str(record)]) == 0
    assert {row["tokens"] for row in select(read_record(record), pruner=folder)} == {30}
    with pytest.raises(SystemExit):
        evaluate.main([*words, "--keep", "1/9", "--equal-tokens"])
    assert "error: --equal-tokens: 'fastv' reads 18.5 of 36 tokens" in capsys.readouterr().err


def test_as_a_command_on_scenes(tiny_llava_folder, tmp_path):
    words = ["-m", "trainers.evaluate", "--vlm", str(tiny_llava_folder), "--pruner", "uniform", "--keep", "1/9"]
    words += ["--suite", "scenes", "--limit", "14", "--json", str(tmp_path / "e.json")]
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, *words], cwd=root, env=os.environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "e.json").read_text())
    assert record["n"] == 14
    assert {row["tokens"] for row in record["rows"] if row["pruner"] == "uniform"} == {4}


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
