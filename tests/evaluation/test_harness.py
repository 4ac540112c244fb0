"""`trainers.harness` without lmms-eval: what a run leaves is read, resumed, put together and refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import ModelCard
from records import SIZES

from prunezoo.core.errors import PruneZooError
from prunezoo.core.registry import build_pruner
from trainers import harness
from trainers.cli.terminal import Terminal
from trainers.evaluation.answers import join_answers
from trainers.evaluation.record import read_record, select
from trainers.harnessing import jobs
from trainers.harnessing.jobs import Job, Outcome, Result, Settings, jobs_of, outcome_of, run_job
from trainers.harnessing.record import benchmarks_of, record_of
from trainers.publishing.package import check

SETTINGS = Settings("org/llava", 8)
RIGHT = {"full": 0.9, "none": 0.2, "divprune": 0.7, "uniform": 0.5, "random": 0.4}
ITEMS = 40


def scores_of(pruner, task):
    """Of each question, the same questions under all pruners."""
    draws = np.random.default_rng(len(task)).random(ITEMS)
    return (draws < RIGHT.get(pruner, 0.8)).astype(float).tolist()


class FakeHarness:
    """In place of `subprocess`: writes what lmms-eval would."""

    def __init__(self, fails=()):
        self.calls, self.fails = [], fails

    def run(self, words, stdout, **_):
        given = dict(pair.split("=", 1) for pair in words[words.index("--model_args") + 1].split(","))
        task, pruner = words[words.index("--tasks") + 1], given["pruner"]
        self.calls.append((pruner, given["keep"], task))
        if (pruner, task) in self.fails:
            stdout.write(b"Traceback\nprunezoo.core.errors.PruneZooError: no such signal; use another\nbye\n")
            return SimpleNamespace(returncode=0)
        out = jobs.Path(words[words.index("--output_path") + 1]) / "llava"
        out.mkdir(parents=True)
        scores = scores_of(pruner, task)
        said = {
            "alias": task,
            "points,none": 1000 * np.mean(scores),
            "acc,none": np.mean(scores),
            "acc_stderr,none": 0.1,
        }
        (out / "1_results.json").write_text(json.dumps({"results": {task: said}}))
        rows = [{"doc_id": number, "acc": {"score": score}} for number, score in enumerate(scores)]
        (out / f"1_samples_{task}.jsonl").write_text("\n".join(map(json.dumps, reversed(rows))) + "\n")
        jobs.Path(given["stats"]).write_text(json.dumps({"images": ITEMS, "tokens": 64 if pruner != "none" else 0}))
        return SimpleNamespace(returncode=0)


@pytest.fixture
def fake(monkeypatch):
    fake = FakeHarness()
    monkeypatch.setattr(jobs.subprocess, "run", fake.run)
    monkeypatch.setattr(jobs, "version", lambda name: "0.7.3")
    return fake


def words(tmp_path, *more):
    base = ["--vlm", "org/llava", "--pruner", "divprune", "--keep", "64", "1/9", "--tasks", "gqa,pope"]
    return [*base, "--out", str(tmp_path / "runs"), "--json", str(tmp_path / "r.json"), *more]


def test_the_record_is_one_of_evaluate(fake, tmp_path, capsys):
    assert harness.main(words(tmp_path, "--report", str(tmp_path / "report"))) == 0
    record = read_record(tmp_path / "r.json")
    assert (record["suite"], record["suite_version"], record["n"]) == ("lmms-eval", "lmms-eval 0.7.3", 2 * ITEMS)
    assert record["groups"] == ["gqa", "pope"]
    for task in record["groups"]:
        (full,) = select(record, pruner="full", group=task)
        (row,) = select(record, pruner="divprune", keep="64", group=task)
        assert row["accuracy"] == pytest.approx(np.mean(scores_of("divprune", task)))
        assert row["retention"] == pytest.approx(100 * row["accuracy"] / full["accuracy"], abs=1e-3)
        assert row["ci"][0] < row["retention"] < row["ci"][1] and row["kl"] is None and row["tokens"] == 64
    assert np.mean(join_answers([record]).right["full", "1.0"]) == pytest.approx(
        np.mean(scores_of("full", "gqa") + scores_of("full", "pope"))
    )
    points = [row for row in record["benchmarks"] if (row["pruner"], row["metric"]) == ("divprune", "points")]
    assert [row["value"] for row in points[:1]] == [pytest.approx(1000 * np.mean(scores_of("divprune", "gqa")))]
    out = capsys.readouterr().out
    assert "8/8 pope under divprune at 1/9" in out and "% of full" in out
    assert fake.calls[:4] == [
        ("full", "1.0", "gqa"),
        ("full", "1.0", "pope"),
        ("none", "1", "gqa"),
        ("none", "1", "pope"),
    ]
    assert "gqa" in (tmp_path / "report" / "index.html").read_text()


def test_the_card_and_its_index_say_what_the_benchmarks_said(fake, tmp_path):
    folder = tmp_path / "ppm-mine"
    build_pruner("ppm", **SIZES).save_pretrained(folder)
    more = ["--pruner", str(folder), "divprune", "--card", str(folder)]
    assert harness.main(words(tmp_path, *more)) == 0
    metrics = read_record(folder / "metrics.json")
    assert (metrics["suite"], metrics["suite_version"]) == ("lmms-eval", "lmms-eval 0.7.3")
    card = ModelCard.load(folder / "README.md")
    assert {(result.dataset_type, result.dataset_config) for result in card.data.eval_results} == {
        ("lmms-eval", group) for group in ("gqa", "pope", "mean")
    }
    (row,) = select(metrics, pruner=str(folder), keep="64", group="pope")
    said = [result.metric_value for result in card.data.eval_results if result.dataset_config == "pope"]
    assert row["accuracy"] in said and f"{row['retention']:.1f}" in card.text
    package = check(folder, "org/ppm-mine")  # which may be published
    assert json.loads(package.files["metrics.json"])["suite"] == "lmms-eval"


def test_it_goes_on_where_it_stopped(fake, tmp_path, capsys):
    fake.fails = {("divprune", "pope")}
    with pytest.raises(SystemExit) as ended:
        harness.main(words(tmp_path))
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: pope under divprune at 64: no such signal; use another (all of it in ")
    done = list(fake.calls)
    fake.fails, fake.calls = (), []
    assert harness.main(words(tmp_path)) == 0
    assert fake.calls == [done[-1], ("divprune", "1/9", "gqa"), ("divprune", "1/9", "pope")]
    fake.calls = []
    assert harness.main(words(tmp_path, "--batch-size", "2")) == 0 and fake.calls == []
    assert harness.main(words(tmp_path, "--limit", "5")) == 0 and len(fake.calls) == 8, "another question, another run"


def test_rivals_that_the_model_cannot_have_are_left_out(fake, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(harness, "RIVALS", ("uniform", "random"))
    fake.fails = {("uniform", "pope")}
    assert harness.main(words(tmp_path, "--rivals")) == 0
    record = read_record(tmp_path / "r.json")
    assert {row["pruner"] for row in record["rows"]} == {"full", "none", "divprune", "random"}
    assert record["left_out"][0]["pruner"] == "uniform" and "no such signal" in record["left_out"][0]["why"]
    assert ("uniform", "1/9", "gqa") not in fake.calls, "once is enough"
    assert "no such signal" in capsys.readouterr().out


def test_a_metric_that_is_no_mean_of_questions_is_told_alone(fake, tmp_path):
    rows = [{"doc_id": 0, "acc": 1.0}, {"doc_id": 1, "acc": 0.0}]
    assert outcome_of("t", {"acc,none": 0.5, "alias": "t", "acc_stderr,none": 1.0}, rows).metric == "acc"
    assert outcome_of("t", {"acc,none": 0.6}, rows) == Outcome("t", {"acc": 0.6}, None, [], [])
    assert outcome_of("t", {"acc,none": 0.5}, [*rows, {"doc_id": 2}]).metric is None, "of one it is not known"
    results = {
        job: Result((Outcome("t", {"score": 1.5}, None, [], []),), 4.0) for job in jobs_of(["pool"], ["4"], ["t"])
    }
    assert record_of(results, ["pool"], {}) is None
    assert [row["full"] for row in benchmarks_of(results)] == [1.5] * 3


def test_runs_over_other_questions_are_refused():
    results = {
        job: Result((Outcome("t", {"acc": 1.0}, "acc", [1.0, 1.0], [0, 1 + (job.pruner == "pool")]),), 4.0)
        for job in jobs_of(["pool"], ["4"], ["t"])
    }
    with pytest.raises(PruneZooError, match="t under pool: other questions than the full model's"):
        record_of(results, ["pool"], {})


def test_a_folder_that_is_damaged(fake, tmp_path):
    job = Job("full", "1.0", "gqa")
    run_job(job, SETTINGS, tmp_path)
    path = tmp_path / job.place / "done.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "outcomes": [{"no": 1}]}))
    with pytest.raises(PruneZooError, match="not what a run leaves; remove its folder"):
        run_job(job, SETTINGS, tmp_path)
    with pytest.raises(PruneZooError, match="takes names apart at a comma"):
        run_job(Job("a,b", "1", "gqa"), SETTINGS, tmp_path)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--keep", "few"], "keep=few: write tokens"),
        (["--tasks", " ,"], "nothing to measure: name --tasks"),
        (["--pruner", "full"], "nothing to measure: name a --pruner"),
        (["--pruner", "divprun"], "did you mean 'divprune'"),
        (["--limit", "0"], "--limit 0: at least 1"),
        (["--card", "checkpoints/ppm-tiny"], "not among what is measured"),
    ],
)
def test_mistakes_are_one_line(fake, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as ended:
        harness.main(words(tmp_path, *more))
    assert ended.value.code == 2 and not fake.calls
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and message in error[0]


def test_without_lmms_eval_it_says_where_it_is(tmp_path, capsys):
    with pytest.raises(SystemExit):
        harness.main(words(tmp_path))
    assert "error: lmms-eval is not installed here: `make test-extras` makes .venv-extras" in capsys.readouterr().err


def test_nothing_is_printed_as_markup(capsys):
    row = {"pruner": "full", "keep": "1.0", "task": "[red]t", "metric": "m", "value": 0.0, "full": 0.0, "tokens": 1.0}
    harness.show(None, [row], Terminal(width=150))
    out = capsys.readouterr().out
    assert "[red]t" in out and "no retention" in out
