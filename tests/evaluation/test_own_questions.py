"""Suites of one's own questions: what a row becomes, what is refused, and that answers are written and scored."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from fake_suite import FakeSuite, greedy, make_items, suite_of, tiny_pruner
from measurements import HEADER, measurement
from tiny_llava import make_image

from prunezoo import attach
from prunezoo.core.errors import PruneZooError
from trainers import evaluate
from trainers.data.suite import load_suite
from trainers.evaluation.answers import join_answers, read_back, written_down
from trainers.evaluation.budgets import parse_budgets
from trainers.evaluation.examples import show_examples
from trainers.evaluation.measure import measure
from trainers.evaluation.methods import PrunerMethod, build_method
from trainers.evaluation.processes import own_device
from trainers.evaluation.record import build_record, read_record
from trainers.evaluation.summary import gather
from trainers.evaluation.written import prompts_of, write

ROWS = [
    {
        "pic": f"{number}.png",
        "ask": f"what color is the ball {number % 4} ?",
        "told": ["red", "blue", "red", "no"][: 1 + number % 4],
        "kind": ("b", "a")[number % 2],
    }
    for number in range(12)
]
OPTIONS = {"image": "pic", "question": "ask", "answer": "told"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    for number in range(12):
        make_image(number).save(folder / f"{number}.png")
    (folder / "q.json").write_text(json.dumps(ROWS))
    table = datasets.Dataset.from_list([{**row, "pic": make_image(number)} for number, row in enumerate(ROWS)])
    datasets.DatasetDict({"val": table}).save_to_disk(folder / "set")
    return folder


def written_to(folder, *rows, name="other.json"):
    (folder / name).write_text(json.dumps([{"pic": "0.png", **row} for row in rows]))
    return str(folder / name)


def test_the_file_and_the_data_set_ask_the_same(folder):
    file = load_suite("llava-json", source=str(folder / "q.json"), group="kind", scorer="contains", **OPTIONS)
    table = load_suite(
        "hub-dataset", source=str(folder / "set"), rows="val", group="kind", scorer="contains", **OPTIONS
    )
    assert len(file) == len(table) == 12 and file.groups == table.groups == ("a", "b")
    for one, other in zip(file, table, strict=True):
        assert one.turns == other.turns and one.references == other.references and one.group == other.group
        assert one.image.tobytes() == other.image.tobytes()
    assert file[3].references == ("red", "blue", "red", "no") and file[3].answer == "red" and file[3].group == "a"
    assert (file.name, table.name) == ("llava-json q.json", "hub-dataset set")
    assert file.score(file[3], "not blue") == 1 and file.score(file[0], "blue") == 0


def test_conversations_choices_prompts_and_splits(folder):
    talk = [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "red"}] * 2
    talk[2] = {"from": "human", "value": "and ?"}
    rows = [{"id": f"n{n}", "pic": f"{n}.png", "conversations": talk} for n in range(12)]
    suite = load_suite("llava-json", source=written_to(folder, *rows), image="pic", prompt="Say one word.")
    assert len(suite) == 24 and suite.scorer == "exact"
    assert suite[1].turns == (("what ?\nSay one word.", "red"), ("and ?\nSay one word.", "red"))
    parts = [
        load_suite("llava-json", split, source=suite.source, image="pic", validation_share="0.3")
        for split in ("train", "validation")
    ]
    assert len(parts[0]) + len(parts[1]) == 24 and len(parts[1]) > 0
    assert not {item.image.tobytes() for item in parts[0]} & {item.image.tobytes() for item in parts[1]}

    rows = [
        {"ask": "which ?", "told": 1, "of": ["dog", "cat"]},
        {"ask": "which ?", "told": "cat", "of": ["dog", "cat"]},
        {"ask": "which ?", "told": "B", "of": ["dog", "cat"]},
    ]
    for item in load_suite("llava-json", source=written_to(folder, *rows), choices="of", **OPTIONS):
        assert item.turns == (("which ?\nA. dog\nB. cat", "B"),) and item.choices == ("dog", "cat")
    columns = {"ask": "which ?", "told": "C", "A": "1", "B": "2", "C": 3, "D": None}
    suite = load_suite("llava-json", source=written_to(folder, columns), choices="A,B,C,D", **OPTIONS)
    assert suite.scorer == "choice" and suite[0].choices == ("1", "2", "3")
    assert [suite.score(suite[0], said) for said in ("(C)", "3", "B")] == [1, 1, 0]


def test_what_changes_a_suite_changes_its_version(folder):
    def version(rows, **options):
        return load_suite("llava-json", source=written_to(folder, *rows), **{**OPTIONS, **options}).version

    known = version(ROWS)
    assert version(ROWS) == known
    others = [version(ROWS, scorer="anls"), version(ROWS, prompt="x"), version(ROWS[:-1]), version(ROWS, group="kind")]
    others.append(version([{**ROWS[0], "told": "blue"}, *ROWS[1:]]))
    assert len({known, *others}) == 6


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"told": "x"}, {}, "field 'ask' is missing, there are: pic, told; name yours by --suite-option"),
        ({"ask": "a ?", "told": True}, {}, "field 'told' must be a text or a number, not bool"),
        ({"ask": "a ?", "told": " "}, {}, "field 'told' is empty"),
        ({"ask": "a ?", "told": []}, {}, "field 'told' is an empty list"),
        ({"ask": "a ?", "told": [{"x": 1}]}, {}, "must be a text or a number, not NoneType"),
        ({"ask": "a ?", "told": "x"}, {"group": "kind"}, "field 'kind' is missing"),
        ({"ask": "a ?", "told": "x", "kind": "mean"}, {"group": "kind"}, "one is called 'mean'"),
        ({"ask": "a ?", "told": "x", "of": ["a", "b"]}, {"choices": "of"}, "answer 'x' is none of the 2 choices"),
        ({"ask": "a ?", "told": "x", "of": "a, b"}, {"choices": "of"}, "must be a list of choices"),
        ({"ask": "a ?", "told": "x", "of": ["a"]}, {"choices": "of"}, "1 choices, it must be 2 to 26"),
        ({"ask": "a ?", "told": "x"}, {"scorer": "bleu"}, "scorer 'bleu' is unknown"),
        ({"ask": "a ?", "told": "x"}, {"new_tokens": "many"}, "new_tokens=many: a whole number from 1 to 4096"),
        ({"ask": "a ?", "told": "x"}, {"validation_share": "0.1"}, "name one of them at --split"),
        ({"ask": "a ?", "told": "x"}, {"images": "nowhere"}, "images=nowhere: no such folder"),
        ({"ask": "a ?", "told": "x"}, {"qestion": "x"}, "option 'qestion' is unknown; did you mean 'question'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(folder, row, options, message):
    with pytest.raises(PruneZooError) as caught:
        load_suite("llava-json", source=written_to(folder, row), **{**OPTIONS, **options})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_wrong_with_a_source(folder):
    many = [{"ask": "a ?", "told": "x", "kind": str(number)} for number in range(27)]
    for call, message in (
        (lambda: load_suite("llava-json"), "suite llava-json: it needs source, e.g. --suite llava-json SOURCE"),
        (lambda: load_suite("llava-json", source="no.json"), "--suite llava-json no.json: no such file"),
        (
            lambda: load_suite("hub-dataset", source=str(folder / "set"), rows="val"),
            "column image, question, answer is missing, there are: ask, kind, pic, told; name yours in --suite-option",
        ),
        (lambda: load_suite("hub-dataset", source=str(folder / "set")), "cannot be opened as a data set, split 'test'"),
        (
            lambda: load_suite("llava-json", source=written_to(folder, *many), group="kind", **OPTIONS),
            "group=kind: 27 values, more than 26",
        ),
        (
            lambda: load_suite("llava-json", source=str(folder / "q.json"), image="pic", choices="of"),
            "choices= belongs to rows with question=",
        ),
    ):
        with pytest.raises(PruneZooError) as caught:
            call()
        assert message in str(caught.value)


class Written(FakeSuite):
    """Scores the share of an answer's letters that are in the reference."""

    scorer, new_tokens = "letters", 6

    def score(self, item, said):
        return sum(letter in item.answer for letter in said) / max(len(said), 1)


def test_scores_are_those_of_what_generate_writes(ending_llava):
    """The oracle: each item alone, through the ordinary `attach`."""
    vlm, processor = ending_llava
    items, suite = make_items(9), Written()
    suite.items = items
    methods = [PrunerMethod(name, [tiny_pruner(name)]) for name in ("uniform", "fastv")]
    measured = measure(vlm, processor, suite, methods, parse_budgets(["4"]), batch_size=4)
    for method in methods:
        expected = []
        for item in items:
            with attach(vlm, method.pruners[0], 4):
                expected.append(suite.score(item, write(vlm, processor, prompts_of(vlm, processor, [item]), 6)[0]))
        assert len({round(score, 6) for score in expected}) > 3, "the comparison would prove little"
        np.testing.assert_allclose(measured.scores[method.name, "4"].correct, expected, atol=1e-12)
    full = [suite.score(item, write(vlm, processor, prompts_of(vlm, processor, [item]), 6)[0]) for item in items]
    np.testing.assert_allclose(measured.scores["full", "1.0"].correct, full, atol=1e-12)
    plain = measure(vlm, processor, suite_of(items), methods, parse_budgets(["4"]), batch_size=4)
    for key, scores in plain.scores.items():  # all but the scores is what it is without a scorer
        np.testing.assert_array_equal(scores.kl, measured.scores[key].kl)
        np.testing.assert_array_equal(scores.layers, measured.scores[key].layers)
    record = build_record(measured, ["uniform"], {"command": "x"})
    right = join_answers([record]).right["fastv", "4"]
    np.testing.assert_allclose(right, measured.scores["fastv", "4"].correct, atol=1e-6)


def test_exact_scores_are_those_of_teacher_forcing(ending_llava):
    """Two ways to the same accuracy: what is written, and what would be."""
    vlm, processor = ending_llava
    ids = greedy(vlm, processor, make_items(40), tiny_pruner("uniform"), 6)
    words = [processor.tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids]
    items = [
        replace(item, turns=(*item.turns[:-1], (item.question, text)))
        for item, text, row in zip(make_items(40), words, ids, strict=True)
        if text and len(row) < 6
    ]
    methods, budgets = [build_method("uniform")], parse_budgets(["6", "2"])
    suite = Written()
    suite.items, suite.scorer, suite.score = items, "exact", lambda item, said: FakeSuite.score(suite, item, said)
    written = measure(vlm, processor, suite, methods, budgets, batch_size=8)
    forced = measure(vlm, processor, suite_of(items), methods, budgets, batch_size=8)
    assert len(items) > 5 and 0 < forced.scores["uniform", "2"].correct.mean() < 1
    for key, scores in forced.scores.items():
        np.testing.assert_array_equal(written.scores[key].correct, scores.correct)


def test_the_pictures_of_the_report_are_marked_by_the_scorer(ending_llava):
    vlm, processor = ending_llava
    suite = Written()
    suite.score = lambda item, said: float(item.id == "fake-1")
    items = suite.items[:2]
    for example in show_examples(vlm, processor, items, [build_method("uniform")], parse_budgets(["4"]), suite):
        assert example.right == example.shown[0].right == (example.item.id == "fake-1")


def test_a_score_outside_is_refused(ending_llava):
    vlm, processor = ending_llava
    suite = Written()
    suite.score = lambda item, said: 100.0
    with pytest.raises(PruneZooError, match=r"suite fake: scores fake-\d+ with 100.0, it must lie in \[0, 1\]"):
        measure(vlm, processor, suite, [build_method("uniform")], parse_budgets(["4"]))


@pytest.mark.parametrize("scores", [[0, 1, 0.2, 0.6], [0.3, 1, 1 / 3], [0.1 + 0.2, 1.0], [0.2 * 3, 0.4]])
def test_scores_are_written_down_and_read_back(scores):
    written = written_down(np.array(scores))
    assert isinstance(written, str) == all(abs(5 * score - round(5 * score)) < 1e-9 for score in scores)
    np.testing.assert_allclose(read_back(json.loads(json.dumps(written))), scores, atol=1e-6)


OWN = """
from trainers.data.suite import Item, Suite
from tiny_llava import make_image


class Mine(Suite):
    groups = ("all",)
    scorer = "{scorer}"

    def __init__(self, split="test", limit=None, word="red"):
        super().__init__(split, limit)
        self.word = word

    def size(self):
        return 3

    def item(self, index):
        return Item(str(index), make_image(index), (("what ?", self.word),), "all")
"""


def test_a_suite_of_ones_own_outside_the_repository(tiny_llava_folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "own_suite.py").write_text(OWN.format(scorer="contains"))
    (tmp_path / "own_wrong.py").write_text(OWN.format(scorer="bleu") + "\nclass Less(Suite):\n    groups = ()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    words = f"--vlm {tiny_llava_folder} --pruner uniform --keep 4 --suite own_suite:Mine --suite-option word=blue"
    assert evaluate.main([*words.split(), "--json", str(tmp_path / "r.json")]) == 0
    record = read_record(tmp_path / "r.json")
    assert (record["suite"], record["suite_version"], record["scorer"]) == ("own_suite:Mine", "1", "contains")
    assert "by `contains`, of the answers that the model writes" in " ".join(capsys.readouterr().out.split())
    for name, message in (
        ("own_suite:Other", "suite own_suite:Other: no `import own_suite` here"),
        ("own_none:Mine", "suite own_none:Mine: no `import own_none` here (No module named 'own_none')"),
        (":Mine", "suite :Mine: no `import ` here"),
        ("own_wrong:Less", "must be a trainers.data.suite.Suite that has `size` and `item`"),
        ("json:JSONDecoder", "must be a trainers.data.suite.Suite"),
        ("own_wrong:Mine", "scorer 'bleu' is unknown"),
    ):
        with pytest.raises(PruneZooError) as caught:
            load_suite(name)
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("devices", "device", "message"),
    [(0, None, "--devices 0: at least 1"), (2, "cuda:1", "say cuda or cpu"), (999, "cuda", "--devices 999: there are")],
)
def test_devices_that_are_not_there(devices, device, message):
    with pytest.raises(PruneZooError, match=message):
        own_device(devices, device)


def test_two_processes_write_the_record_of_one(folder, tiny_llava_folder, tmp_path):
    words = ["--vlm", str(tiny_llava_folder), "--pruner", "divprune", "random", "--keep", "4", "--batch-size", "2"]
    words += ["--suite", "llava-json", str(folder / "q.json"), "--suite-option", "image=pic", "question=ask"]
    words += ["answer=told", "group=kind", "scorer=anls", "--device", "cpu"]
    records = []
    for devices in ("1", "2"):
        out = tmp_path / f"{devices}.json"
        call = [sys.executable, "-m", "trainers.evaluate", *words, "--json", str(out), "--devices", devices]
        one = {**os.environ, "OMP_NUM_THREADS": "1"}  # several processes with all threads each wait for one another
        ran = subprocess.run(call, cwd=Path(__file__).parents[2], env=one, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr[-3000:]
        records.append(read_record(out))
        assert records[-1].pop("command").endswith(f"--devices {devices}")
        assert not list(tmp_path.glob("*.npz"))
    assert records[0] == records[1]
    assert "MEMBER: 2/2" in ran.stderr, "there was a second one"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"suite": "t"}, "b: suite is t, that of a is s: they do not compare; measure it anew"),
        ({"suite_version": "2"}, "b: suite_version is 2, that of a is 1"),
        ({"scorer": "anls"}, "b: scorer is anls, that of a is None"),
    ],
)
def test_records_of_other_suites_versions_or_scorers_do_not_mix(other, message):
    one = build_record(measurement(), ["good"], {**HEADER, "command": "a"})
    assert join_answers([one, {**one, "command": "b", "suite_version": "1"}]).right
    with pytest.raises(PruneZooError) as caught:
        join_answers([one, {**one, "command": "b", **other}])
    assert str(caught.value).startswith(message)
    gathered = {"pruner": "good", "weights": {"good": "x"}}
    with pytest.raises(PruneZooError, match="they do not compare"):
        gather({"one": {**one, **gathered}, "other": {**one, **gathered, "command": "b", **other}})


def test_questions_that_change_get_another_version():
    """Whoever changes what `scenes` asks gives it another version, and this digest."""
    suite = load_suite("scenes", "test", 70)
    digest = hashlib.sha256(repr([(item.id, item.turns, item.group) for item in suite]).encode()).hexdigest()[:12]
    assert (suite.version, digest) == ("1", "2e363036c725")
