"""The command `trainers.evaluate`: the rows and the page that it writes, and what is wrong, in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_suite import FakeSuite, make_items, tiny_pruner

from trainers import evaluate
from trainers.data import suite as suites
from trainers.evaluation.record import read_record, select


@pytest.fixture
def fake_suite(monkeypatch):
    monkeypatch.setitem(suites._SUITES, "fake", FakeSuite)


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
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, *words], cwd=root, env=os.environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "e.json").read_text())
    assert record["n"] == 14
    assert {row["tokens"] for row in record["rows"] if row["pruner"] == "uniform"} == {4}
