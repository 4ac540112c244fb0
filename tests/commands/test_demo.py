"""The demo's own parts: the commands that it runs, its verdict, and the sample questions."""

import re
from pathlib import Path

import pytest
from rich.console import Console

from prunezoo import build_pruner
from trainers import demo, evaluate
from trainers.evaluation.demo import ASKED, KEEP, SUITE, ask, verdict
from trainers.evaluation.methods import RIVALS

ROOT = Path(__file__).resolve().parent.parent.parent


def record(own, rivals, low):
    row = {"keep": "1/9", "group": "mean"}
    rows = [{**row, "pruner": name, "retention": value} for name, value in {"ppm": own, **rivals}.items()]
    paired = [{"pruner": "ppm", "rival": name, "keep": "1/9", "difference": 1.0, "ci": [low, 2.0]} for name in rivals]
    return {"rows": rows, "paired": paired, "n": 70}


@pytest.mark.parametrize(
    ("own", "low", "said"),
    [
        (97.0, 0.5, "is above every rival:"),
        (97.0, -0.1, "above every rival, but an interval reaches 0"),
        (79.0, -2.0, "is NOT above every rival"),
        (None, None, "No comparison"),
    ],
)
def test_verdict_says_what_was_measured(own, low, said):
    rivals = {name: (80.0 if name == "pool" else 50.0) if own else None for name in RIVALS}
    text = verdict(record(own, rivals, low), "ppm").plain
    assert said in text
    if own:
        assert f"{own:.1f} %" in text
        assert "pool, has 80.0 %" in text


def test_commands_are_ones_that_the_repository_has(tmp_path):
    words = demo.evaluate_words(70, "runs/demo/ppm", tmp_path)
    assert words[:2] == ["-m", "trainers.evaluate"]
    args = evaluate.parser().parse_args(words[2:])
    assert args.rivals
    assert (args.vlm, args.suite, args.keep, args.limit) == (demo.VLM, [SUITE], [KEEP], 70)
    fit = demo.fit_words(10, "runs/demo/ppm")
    assert (ROOT / fit[fit.index("--config") + 1]).is_file()
    assert "--trainer.max_steps=10" in fit


def test_sample_questions_are_answered_with_all_tokens_and_with_few(tiny_llava_folder, tmp_path):
    console = Console(record=True, width=160)
    ask(console, str(tiny_llava_folder), build_pruner("uniform"), tmp_path / "questions")
    printed = console.export_text()
    assert len(re.findall("36 -> 4", printed)) == len(ASKED)
    assert {path.stem for path in (tmp_path / "questions").iterdir()} == set(ASKED)
