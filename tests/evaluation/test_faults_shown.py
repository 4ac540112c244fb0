"""What other people's texts can do to what is shown, and what must not be shown: each once failed, or said too much."""

import ast
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from fake_suite import FakeSuite
from matplotlib.figure import Figure
from measurements import ESCAPE, HEADER, measured, measurement
from PIL import Image
from rich.table import Table

from trainers import benchmark, evaluate, show
from trainers.benchmarking import run as benchmarking
from trainers.benchmarking.tables import print_record as print_speed
from trainers.cards.about import About
from trainers.cli.errors import command
from trainers.cli.names import ROOT
from trainers.cli.terminal import Terminal, progress_bar
from trainers.cli.text import in_figure, visible, without_folders
from trainers.data import suite as suites
from trainers.data.suite import Item
from trainers.evaluation import run as evaluation
from trainers.evaluation.curves import draw_curves
from trainers.evaluation.demo import verdict
from trainers.evaluation.examples import Example, Shown
from trainers.evaluation.look import print_example
from trainers.evaluation.record import build_record, read_record, select, write_record
from trainers.evaluation.report import write_report
from trainers.evaluation.sheet import draw_sheet
from trainers.evaluation.sight import sight_note
from trainers.evaluation.tables import print_record
from trainers.list import Entry, print_entry

HOSTILE = ["a[/b]", "[/INST]", "[red", r"$\bad{$", "_$", ESCAPE, ":fire:", "<b>&", "{0}", "\udce9"]


def printed():
    return Terminal(file=io.StringIO(), width=200, force_terminal=True, color_system=None)


def text_of(console):
    return console.file.getvalue()


def renamed(name):
    """A record whose methods, groups, model and suite are all called so."""
    m = measurement()
    scores = {(name if pruner == "good" else pruner, keep): of for (pruner, keep), of in m.scores.items()}
    groups = (name, "count")
    header = {"vlm": name, "suite": name, "split": "test", "command": f"python -m trainers.evaluate --pruner {name}"}
    chance = {name: 0.25, "count": 0.1}
    return build_record(replace(m, groups=groups, chance=chance, scores=scores), [name], header, resamples=50)


def example(name):
    item = Item("i", Image.new("RGB", (12, 12)), (("first " + name, name), (name, name)), "colour")
    return Example(item, (2, 2), name, True, [Shown(name, "1/9", np.array([[0, 1]]), False, name, False)])


# Terminals


@pytest.mark.parametrize("name", HOSTILE)
def test_a_terminal_shows_every_text_as_it_is(name):
    """Printed, in a cell, a title, a heading and a rule, and what a progress bar is called."""
    console = printed()
    console.print(name)
    console.print(name, style="bold")
    table = Table(name, title=name)
    table.add_row(name)
    console.print(table)
    console.rule(name)
    with progress_bar(console, "items") as progress:
        progress.add_task(name, total=1)
    text = text_of(console)
    assert text.count(visible(name)) >= 7
    assert not re.search("[\x07\ud800-\udfff]", text) and "\x1b]" not in text and "\x1b[31m" not in text


@pytest.mark.parametrize("name", HOSTILE)
def test_every_table_of_the_commands_can_be_printed(name):
    console = printed()
    print_record(renamed(name), console)
    print_example(example(name), console)
    row = {"pruner": name, "keep": "1/9", "tokens": 4, "batch": 1, "length": 8, "part": "prefill"}
    times = {"median_s": 0.1, "spread": 0.0, "speedup": 2.0, "speedup_spread": 0.0, "ideal_speedup": None}
    rows = [{**row, **times}, {**row, **times, "pruner": "bare", "keep": "1.0"}]
    print_speed({"vlm": name, "device": name, "rows": rows, "overhead": []}, console)
    print_entry(Entry(name, name, "learned", "prompt", name, None, About(name, name, (), "ours")), console)
    assert visible(name) in text_of(console)
    assert "\x1b]" not in text_of(console)


def test_no_command_has_a_console_of_another_kind():
    """Nothing in `trainers` makes rich's own console, its columns that read markup, or writes markup."""
    for path in sorted((ROOT / "trainers").rglob("*.py")):
        if path.name == "terminal.py":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        called = {call.id for call in calls if isinstance(call, ast.Name)}
        assert not called & {"Console", "TextColumn", "from_markup"}, path
        constants = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        texts = [value for value in constants if isinstance(value, str)]
        assert not [text for text in texts if re.search(r"\[/\]|\[/?(bold|red|green|yellow|dim|cyan)\b", text)], path


def test_an_error_that_names_a_folder_brings_no_control_characters(tmp_path, capsys):
    """Ours, and those of the operating system."""
    path = tmp_path / "a[b]\x1b[31m\x07"
    path.write_text("no folder")
    for words in ([str(path), "what?"], ["scenes:1", "--keep", "4", "--out", str(path / "x.png")]):
        with pytest.raises(SystemExit):
            show.main(words)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and "a[b]" in line and line.isprintable()

    @command
    def fails():
        path.mkdir()

    with pytest.raises(SystemExit):
        fails()
    assert capsys.readouterr().err.strip() == f"error: {visible(str(path))}: File exists; name another file or folder"


# Figures, pages, pictures


@pytest.mark.parametrize("name", HOSTILE)
def test_figures_pages_and_pictures_take_every_text(name, tmp_path):
    page = write_report(renamed(name), [example(name)], tmp_path / "report")
    assert "<b>&" not in page.read_text(encoding="utf-8").replace("<b>&lt;", "")
    assert draw_sheet([example(name)], name, "other").width > 216
    assert in_figure(name).count("$") == in_figure(name).count(r"\$") and not in_figure(name).startswith("_")


def test_what_stands_in_a_figure_is_the_text_and_no_formula(tmp_path):
    """A legend of `$x$` is as wide as its letters are."""
    figure = Figure()
    drawn = [figure.text(0, 0, text) for text in (in_figure("$x_i$"), r"\$x_i\$", "$x_i$")]
    figure.savefig(tmp_path / "f.png")
    ours, letters, formula = (text.get_window_extent().width for text in drawn)
    assert ours == letters != formula


# The numbers first


@pytest.fixture
def fake_suite(monkeypatch):
    monkeypatch.setitem(suites._SUITES, "fake", FakeSuite)


def test_the_numbers_of_an_evaluation_are_written_before_anything_can_fail(
    fake_suite, tiny_llava_folder, tmp_path, monkeypatch
):
    def fail(*_):
        raise RuntimeError("while it is shown")

    words = ["--vlm", str(tiny_llava_folder), "--pruner", "uniform", "--keep", "5", "--suite", "fake", "--limit", "4"]
    for part in ("print_record", "write_report", "show_examples"):
        path = tmp_path / f"{part}.json"
        with monkeypatch.context() as patch:
            patch.setattr(evaluation, part, fail)
            with pytest.raises(RuntimeError, match="while it is shown"):
                evaluate.main([*words, "--json", str(path), "--report", str(tmp_path / "report")])
        assert read_record(path)["n"] == 4


def test_the_numbers_of_a_benchmark_are_written_before_anything_can_fail(tiny_llava_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarking, "print_record", lambda *_: 1 / 0)
    words = ["--vlm", str(tiny_llava_folder), "--repeats", "1", "--decode", "1", "--length", "8", "--picture", "24x24"]
    with pytest.raises(ZeroDivisionError):
        benchmark.main([*words, "--json", str(tmp_path / "b.json")])
    assert json.loads((tmp_path / "b.json").read_text())["rows"]


# Retention


def test_a_model_that_does_not_see_has_no_retention_and_no_ranking_anywhere(tmp_path):
    """Full 20 %, zero tokens 16 %: retention would be a ratio of noise."""
    record = build_record(measured([0.2], [0.16], [0.3]), ["good"], HEADER)
    assert {row["retention"] for row in record["rows"]} == {None}
    assert {tuple(row["ci"]) for row in record["rows"]} == {(None, None)}
    assert {pair["difference"] for pair in record["paired"]} == {None}
    assert {row["accuracy"] for row in select(record, pruner="good", group="mean")} == {0.3}
    (gap,) = (row for row in record["sight"] if row["group"] == "mean")
    assert gap["difference"] == 4.0 and gap["ci"][0] < 0 < gap["ci"][1]
    note = sight_note(record)
    assert note.startswith(
        "No retention and no ranking: the full model answers 20.0 % right and with zero tokens 16.0 %"
    )
    assert "\n" not in note
    console = printed()
    print_record(record, console)
    text = " ".join(text_of(console).split())
    assert note in text and "Accuracy in %" in text and "Paired" not in text and "Retention in %" not in text
    page = write_report(record, [], tmp_path).read_text(encoding="utf-8")
    assert note.replace("'", "&#39;") in page
    assert "keeps <b>" not in page and "Paired differences" not in page and 'class="best' not in page
    assert '<div class="panels"' not in page and "<svg" not in page and "156" not in page
    write_record(record, tmp_path / "e.json")
    assert read_record(tmp_path / "e.json")["rows"][0]["retention"] is None
    draw_curves(record, tmp_path / "f.png")
    assert note in verdict(record, "good").plain


def test_a_group_that_is_not_seen_stays_out_of_the_mean():
    record = build_record(measured([1.0, 0.2], [0.0, 0.2], [0.5, 0.9], 2), ["good"], HEADER)
    found = {row["group"]: row["retention"] for row in select(record, pruner="good")}
    assert found == {"g0": 50.0, "g1": None, "mean": 50.0}
    assert sight_note(record).startswith("No retention in g1, which stay out of the mean")
    assert {pair["difference"] for pair in record["paired"]} == {0.0}


def test_a_model_that_sees_has_its_retention_as_ever():
    record = build_record(measurement(), ["good"], HEADER)
    assert sight_note(record) is None and [row["ci"][0] for row in record["sight"]] == [100, 100, 100]
    assert select(record, pruner="bad", group="mean")[0]["retention"] == 75


def test_a_model_that_answers_nothing_is_told_so():
    record = build_record(measured([0.0], [0.0], [0.0]), ["good"], HEADER)
    assert "with all its image tokens the model answers nothing right" in sight_note(record)


# Paths


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("trainers.fit --out=/home/me/x/ppm --data /home/me/d.json", "trainers.fit --out=ppm --data d.json"),
        ("--pruner '/home/me/my data/x?adaptive=false' --vlm '~/models/y'", "--pruner 'x?adaptive=false' --vlm 'y'"),
        ("data:\n  root: /home/me/my pictures\n- /x/y/z\n", "data:\n  root: my pictures\n- z\n"),
        ("LlavaDataModule(/home/me/mix.json, /srv/images)", "LlavaDataModule(mix.json, images)"),
        (r"C:\Users\me\x --out D:/data/y file:///home/me/z", "x --out y z"),
        (f"--pruner {ROOT}/checkpoints/ppm-tiny", "--pruner checkpoints/ppm-tiny"),
        ("--keep 1/9 --vlm org/name https://a.b/c s3://b/c configs/x.yaml ../y /", None),
    ],
)  # fmt: skip
def test_texts_that_are_passed_on_carry_no_folders_of_a_machine(text, shown):
    assert without_folders(text) == (text if shown is None else shown)
