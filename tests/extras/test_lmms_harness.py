"""`trainers.harness` drives the real lmms-eval, on local tasks of each kind of metric, by lmms-eval's own functions.

Of each kind the same questions are asked by `trainers.evaluate`: both must say the same, of every pruner.
"""

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval", reason="`make test-extras` installs lmms-eval in an environment of its own")

from datasets import Dataset, DatasetDict, Image

from trainers import evaluate, harness
from trainers.data.suite import load_suite
from trainers.evaluation.record import read_record, select

ROOT = Path(__file__).parent.parent.parent
ITEMS, PRUNER, VLM = 14, "checkpoints/ppm-tiny", "checkpoints/tiny-llava"
KINDS = {
    "exact": "exact_match",
    "anls": "anls",
    "vqa": "exact_match",
    "relaxed": "relaxed_overall",
    "contains": "found",
}
"""Our scorers, and what lmms-eval calls its metric for it."""
UTILS = '''
"""How the tasks score: by lmms-eval's own functions."""

from lmms_eval.api.metrics import anls
from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor
from lmms_eval.tasks.chartqa.utils import relaxed_correctness


def image(doc):
    return [doc["image"].convert("RGB")]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def messages(doc, lmms_eval_specific_kwargs=None):
    parts = [{"type": "image", "url": doc["image"].convert("RGB")}, {"type": "text", "text": doc["question"]}]
    return [{"role": "user", "content": parts}]


def exact(doc, results):
    return {"exact_match": float(results[0].lower() in [answer.lower() for answer in doc["answers"]])}


def distance(doc, results):
    return anls(doc["answers"], [results[0]])


def vqa(doc, results):
    clean = EvalAIAnswerProcessor()
    said, answers = clean(results[0]), [clean(answer) for answer in doc["answers"]]
    scores = []
    for left_out in range(len(answers)):
        others = [answer for number, answer in enumerate(answers) if number != left_out]
        scores.append(min(1, sum(said == answer for answer in others) / 3))
    return {"exact_match": sum(scores) / len(scores)}


def relaxed(doc, results):
    return {"relaxed_overall": float(relaxed_correctness(results[0], doc["answers"][0]))}


def found(doc, results):
    score = int(any(answer.lower() in results[0].lower() for answer in doc["answers"]))
    return {"found": {"question_id": doc["question"], "score": score}, "total": {"score": score}}


def share(results):
    return sum(result["score"] for result in results) / len(results)


def points(results):
    """Of no question: as of MME and OCRBench."""
    return 1000 * sum(result["score"] for result in results) / len(results)
'''
FUNCTIONS = {"exact": "exact", "anls": "distance", "vqa": "vqa", "relaxed": "relaxed", "contains": "found"}


def task_of(kind, data):
    own = f"  - metric: {KINDS[kind]}\n    aggregation: mean\n    higher_is_better: true\n"
    if kind == "contains":
        own = own.replace("mean", "!function kinds.share")
        own = f"  - metric: total\n    aggregation: !function kinds.points\n    higher_is_better: true\n{own}"
    return (
        f"task: own_{kind}\ndataset_path: {data}\ndataset_kwargs:\n  load_from_disk: true\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_visual: !function kinds.image\ndoc_to_text: !function kinds.text\n"
        "doc_to_messages: !function kinds.messages\ndoc_to_target: answer\n"
        "generation_kwargs:\n  max_new_tokens: 16\n  temperature: 0\n  do_sample: false\n"
        f"process_results: !function kinds.{FUNCTIONS[kind]}\nmetric_list:\n{own}metadata:\n  - version: 0.0\n"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tasks, a group of all, and questions of the embedded suite with several answers, of which not all are right."""
    folder = tmp_path_factory.mktemp("kinds")
    items = [item for item in load_suite("scenes", "test", 40) if len(item.turns) == 1][:ITEMS]
    answers = []
    for number, item in enumerate(items):
        said = [item.answer, item.answer.upper(), f"the {item.answer}", f"{item.answer[:-1]}x"]
        answers.append(said[number % 2 :] + ["no"] * (number % 3))
    columns = {
        "image": [item.image for item in items],
        "question": [item.question for item in items],
        "answers": [(own * 4)[:5] for own in answers],
        "answer": [own[0] for own in answers],
    }
    DatasetDict({"test": Dataset.from_dict(columns).cast_column("image", Image())}).save_to_disk(folder / "data")
    (folder / "tasks").mkdir()
    (folder / "tasks" / "kinds.py").write_text(UTILS)
    for kind in KINDS:
        (folder / "tasks" / f"own_{kind}.yaml").write_text(task_of(kind, folder / "data"))
    group = "group: own_kinds\ntask:\n" + "".join(f"  - own_{kind}\n" for kind in KINDS)
    (folder / "tasks" / "own_kinds.yaml").write_text(group)
    return folder


@pytest.fixture(scope="module")
def ran(folder):
    """The command, on the group, offline; the words and the record."""
    os.chdir(ROOT)
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"), "1")
    words = ["--vlm", VLM, "--pruner", PRUNER, "--keep", "8", "--tasks", "own_kinds", "--out", str(folder / "runs")]
    words += ["--include-path", str(folder / "tasks"), "--batch-size", "8", "--device", "cpu"]
    words += ["--json", str(folder / "record.json"), "--report", str(folder / "report")]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**offline, "HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1"}.items():
            patch.setenv(name, value)
        assert harness.main(words) == 0
    return words, read_record(folder / "record.json")


def test_every_kind_says_what_evaluate_says(folder, ran):
    _, record = ran
    different = set()
    for kind, metric in KINDS.items():
        out = folder / f"{kind}.json"
        answer = "answer" if kind == "relaxed" else "answers"  # ChartQA has one
        words = ["--vlm", VLM, "--pruner", PRUNER, "--keep", "8", "--suite", "hub-dataset", str(folder / "data")]
        words += ["--suite-option", f"scorer={kind}", f"answer={answer}", "--json", str(out), "--device", "cpu"]
        assert evaluate.main(words) == 0
        ours = read_record(out)
        for pruner, keep in (("full", "1.0"), ("none", "0"), (PRUNER, "8")):
            (own,) = select(ours, pruner=pruner, keep=keep, group="mean")
            (theirs,) = select(record, pruner=pruner, keep=keep, group=f"own_{kind}")
            assert theirs["accuracy"] == pytest.approx(own["accuracy"], abs=1e-6), (kind, pruner)
            assert theirs["retention"] == pytest.approx(own["retention"], abs=1e-4, nan_ok=True), (kind, pruner)
            (said,) = (
                row for row in record["benchmarks"]
                if (row["pruner"], row["keep"], row["task"], row["metric"]) == (pruner, keep, f"own_{kind}", metric)
            )  # fmt: skip
            assert said["value"] == pytest.approx(own["accuracy"], abs=1e-6)
            assert theirs["tokens"] == own["tokens"] == said["tokens"]
            different.add(round(own["accuracy"], 4))
    assert len(different) >= 5, "the equalities would say little"


def test_figures_of_no_question_are_told_as_they_are(ran):
    _, record = ran
    points = [row for row in record["benchmarks"] if row["metric"] == "total"]
    assert len(points) == 3 and all(row["value"] > 1 for row in points if row["pruner"] == "full")
    assert record["suite"] == "lmms-eval" and set(record["groups"]) == {f"own_{kind}" for kind in KINDS}


def test_what_is_done_is_not_run_again(folder, ran, monkeypatch, capsys):
    words, record = ran
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("trainers.harnessing.jobs.subprocess.run", lambda *_, **__: pytest.fail("it ran again"))
    assert harness.main(words) == 0
    assert capsys.readouterr().out.count("was done") == 3
    assert json.loads((folder / "record.json").read_text()) == record
    assert (folder / "report" / "index.html").is_file()


def test_a_pruner_that_cannot_be_had_is_one_line(folder, ran, monkeypatch, capsys):
    words, _ = ran
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        harness.main([*words[:3], "corematching?layer=99", *words[4:]])
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        error.startswith("error: own_kinds under corematching?layer=99 at 8: pruner 'corematching'")
        and "log.txt" in error
    )
