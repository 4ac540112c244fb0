"""Runs of lmms-eval, each of one task under one pruner at one budget, kept in a folder so that none is done twice."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from prunezoo.core.bounds import MOST_RECORD_BYTES, parse_json, read_bytes
from prunezoo.core.errors import PruneZooError
from prunezoo.core.files import read_object
from trainers.cards.parts import weights_digest
from trainers.cli.errors import whole_file
from trainers.evaluation.record import versions
from trainers.evaluation.scores import ALL_TOKENS, FULL, NO_TOKENS, NONE

MOST_SAMPLES_BYTES = 1 << 31
"""Of what lmms-eval writes of the questions of a task, prompts and answers included."""
SAME = 1e-6
"""By how much the mean of the questions' scores may miss what lmms-eval says of a task."""
DONE, LOG, TOKENS, SAMPLES = "done.json", "log.txt", "tokens.json", "_samples_"


@dataclass(frozen=True)
class Settings:
    """What all runs of a command have in common.

    Attributes:
        vlm: folder or Hub id.
        batch_size: questions at once.
        device: as lmms-eval takes it; None: its own choice.
        dtype: of the model; None: by the device.
        limit: only the first so many questions of a task; None: all.
        include: folder of tasks of one's own; None: lmms-eval's alone.
    """

    vlm: str
    batch_size: int
    device: str | None = None
    dtype: str | None = None
    limit: int | None = None
    include: str | None = None


@dataclass(frozen=True)
class Job:
    """One task under one pruner at one budget."""

    pruner: str
    keep: str
    task: str

    @property
    def place(self) -> str:
        """A folder's name, of the job alone."""
        return "/".join(re.sub(r"[^\w.-]+", "_", part) for part in (f"{self.pruner}@{self.keep}", self.task))


@dataclass(frozen=True)
class Outcome:
    """What a run said of a task, or of one of those that a group holds.

    Attributes:
        task: its name.
        metrics: every figure of it, as lmms-eval says it.
        metric: the first of which the questions' scores are the parts; None: of none.
        scores: of each question in [0, 1], in their order, by that metric.
        ids: numbers of these questions.
    """

    task: str
    metrics: dict[str, float]
    metric: str | None
    scores: list[float]
    ids: list[int]


@dataclass(frozen=True)
class Result:
    """A run that is done: its outcomes, and image tokens read of a picture, mean over pictures and layers."""

    outcomes: tuple[Outcome, ...]
    tokens: float


def jobs_of(pruners: Sequence[str], keeps: Sequence[str], tasks: Sequence[str]) -> list[Job]:
    """All runs: the full model and zero tokens first, then each pruner at each budget."""
    settings = [(FULL, ALL_TOKENS), (NONE, NO_TOKENS), *((pruner, keep) for pruner in pruners for keep in keeps)]
    return [Job(pruner, keep, task) for pruner, keep in settings for task in tasks]


def check_installed() -> str:
    """The version of lmms-eval.

    Raises:
        PruneZooError: it is not installed here.
    """
    try:
        return version("lmms-eval")
    except PackageNotFoundError:
        raise PruneZooError(
            "lmms-eval is not installed here: `make test-extras` makes .venv-extras, which has it; then "
            ".venv-extras/bin/python -m trainers.harness …"
        ) from None


def fingerprint(job: Job, settings: Settings) -> str:
    """All that a result depends on; device and size of batches aside."""
    own = {key: value for key, value in asdict(settings).items() if key not in ("device", "batch_size")}
    digests = [weights_digest(settings.vlm), weights_digest(job.pruner.partition("?")[0])]
    return json.dumps([asdict(job), own, digests, versions(), check_installed()])


def words_of(job: Job, settings: Settings, folder: Path) -> list[str]:
    """The command line of lmms-eval.

    Raises:
        PruneZooError: a name with a comma, where lmms-eval would take it apart.
    """
    keep = {FULL: "1.0", NONE: "1"}.get(job.pruner, job.keep)
    given = {"pretrained": settings.vlm, "pruner": job.pruner, "keep": keep, "stats": str(folder / TOKENS)}
    given |= {"dtype": settings.dtype} if settings.dtype else {}
    for name, value in given.items():
        if "," in value:
            raise PruneZooError(f"{name} {value}: lmms-eval takes names apart at a comma; give it another")
    words = ["--model", "prunezoo", "--tasks", job.task, "--batch_size", str(settings.batch_size), "--log_samples"]
    words += ["--output_path", str(folder / "out"), "--model_args", ",".join(f"{k}={v}" for k, v in given.items())]
    words += ["--device", settings.device] if settings.device else []
    words += ["--limit", str(settings.limit)] if settings.limit else []
    return [*words, *(["--include_path", settings.include] if settings.include else [])]


def run_job(job: Job, settings: Settings, root: Path) -> tuple[Result, bool]:
    """The result of a run, and whether it was run now: one that is done with the same settings is read.

    Raises:
        PruneZooError: lmms-eval failed; the message has its last words and names its log.
    """
    folder = (root / job.place).resolve()
    known = read_done(folder / DONE, fingerprint(job, settings))
    if known is not None:
        return known, False
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with (folder / LOG).open("wb") as log:
        words = [sys.executable, "-m", "lmms_eval", *words_of(job, settings, folder)]
        code = subprocess.run(words, stdout=log, stderr=log, env=dict(os.environ), check=False).returncode  # noqa: S603
    found = sorted((folder / "out").rglob("*_results.json"))
    if code or not found:  # it ends with 0 after an error, too
        raise PruneZooError(f"{job.task} under {job.pruner} at {job.keep}: {last_words(folder / LOG)}")
    result = Result(read_outcomes(found[-1]), read_tokens(folder / TOKENS))
    with whole_file(folder / DONE) as scratch:
        scratch.write_text(json.dumps({"fingerprint": fingerprint(job, settings), **asdict(result)}), encoding="utf-8")
    return result, True


def last_words(log: Path) -> str:
    """What is wrong, by a log of lmms-eval: the last of our own errors, or the last error of all."""
    lines = [line.strip() for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    for mark in ("PruneZooError: ", "Error: "):
        for line in reversed(lines):
            if mark in line:
                return f"{line.partition(mark)[2] if mark[0] == 'P' else line} (all of it in {log})"
    return f"{lines[-1] if lines else 'lmms-eval said nothing'} (all of it in {log})"


def read_done(path: Path, wanted: str) -> Result | None:
    """A result that was kept; None where there is none, or one of other settings."""
    if not path.is_file():
        return None
    known = read_object(path, "fingerprint", "outcomes", "tokens", what="a run", remedy="remove its folder")
    if known["fingerprint"] != wanted:
        return None
    try:
        return Result(tuple(Outcome(**outcome) for outcome in known["outcomes"]), float(known["tokens"]))
    except (TypeError, ValueError):
        raise PruneZooError(f"{path}: not what a run leaves; remove its folder") from None


def read_tokens(path: Path) -> float:
    """The mean that the model wrote."""
    return float(read_object(path, "tokens", what="tokens", remedy="run it again")["tokens"])


def read_outcomes(path: Path) -> tuple[Outcome, ...]:
    """What lmms-eval wrote of a run: of each task that has questions, in its order.

    Args:
        path: its `…_results.json`, beside which the questions lie, `…_samples_TASK.jsonl`.

    Raises:
        PruneZooError: there are no questions, or no figures.
    """
    said = parse_json(read_bytes(path, MOST_RECORD_BYTES).decode())["results"]
    outcomes = []
    for samples in sorted(path.parent.glob(f"*{SAMPLES}*.jsonl")):
        task = samples.stem.partition(SAMPLES)[2]
        lines = read_bytes(samples, MOST_SAMPLES_BYTES).decode().split("\n")
        rows = sorted((parse_json(line) for line in lines if line.strip()), key=lambda row: row["doc_id"])
        outcomes.append(outcome_of(task, said.get(task, {}), rows))
    if not outcomes or not any(outcome.metrics for outcome in outcomes):
        raise PruneZooError(f"{path}: lmms-eval wrote no figures")
    return tuple(outcomes)


def outcome_of(task: str, said: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Outcome:
    """An outcome, of the figures of a task and its questions."""
    metrics: dict[str, float] = {}
    for key, value in said.items():
        name = key.partition(",")[0]
        if "_stderr" not in name and isinstance(value, int | float) and not isinstance(value, bool):
            metrics.setdefault(name, float(value))
    for name, value in metrics.items():
        scores = [score_of(row.get(name)) for row in rows]
        known = [score for score in scores if score is not None and 0 <= score <= 1]
        if known and len(known) == len(rows) and abs(sum(known) / len(known) - value) < SAME:
            return Outcome(task, metrics, name, known, [int(row["doc_id"]) for row in rows])
    return Outcome(task, metrics, None, [], [])


def score_of(value: Any) -> float | None:
    """The score of a question by a metric: a number, or an object with one as `score`; else None."""
    value = value.get("score") if isinstance(value, Mapping) else value
    return float(value) if isinstance(value, bool | int | float) else None
