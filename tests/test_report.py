"""The report's page and pictures."""

import numpy as np
import pytest
from PIL import Image
from test_evaluate_statistics import measurement

from trainers.data.suite import Item
from trainers.evaluation.curves import draw_curves
from trainers.evaluation.examples import Example, Shown
from trainers.evaluation.pictures import EDGE, PAPER, SIDE, draw_kept
from trainers.evaluation.record import build_record
from trainers.evaluation.report import preferred_budget, summary_of, write_report

RED = (200, 30, 60)


@pytest.fixture
def record():
    header = {"vlm": "v", "suite": "s<i>", "split": "test", "command": "python -m trainers.evaluate"}
    return build_record(measurement(), ["good"], header)


def test_kept_tokens_stay_in_colour_and_the_rest_fades():
    picture = draw_kept(Image.new("RGB", (24, 12), RED), (2, 4), np.array([[0, 0], [1, 3]]))
    assert picture.size == (SIDE, SIDE // 2)
    cell = SIDE // 4
    centre = {
        (row, column): picture.getpixel((column * cell + cell // 2, row * cell + cell // 2))
        for row in range(2)
        for column in range(4)
    }
    for place, pixel in centre.items():
        if place in ((0, 0), (1, 3)):
            assert pixel == RED
        else:
            assert max(pixel) - min(pixel) < 5
            assert min(pixel) > PAPER.min() - 50
    assert picture.getpixel((cell - 1, cell // 2)) == EDGE
    assert picture.getpixel((cell, cell // 2)) != EDGE


def test_anchors_are_dots_and_the_picture_stays():
    picture = draw_kept(Image.new("RGB", (24, 24), RED), (4, 4), np.array([[1, 2]]), anchors=True)
    cell = SIDE // 4
    assert picture.getpixel((int(2.5 * cell), int(1.5 * cell))) == EDGE
    away = picture.getpixel((cell // 2, cell // 2))
    assert away[0] - away[1] > 80


def test_nothing_kept_and_everything_kept():
    plain = Image.new("RGB", (10, 30), RED)
    assert EDGE not in {colour for _, colour in draw_kept(plain, (3, 1), np.zeros((0, 2), int)).getcolors()}
    everything = draw_kept(plain, (3, 1), np.array([[0, 0], [1, 0], [2, 0]]))
    assert everything.getcolors() == [(SIDE // 3 * SIDE, RED)]


def test_the_page_stands_alone_and_escapes(record, tmp_path):
    item = Item("i", Image.new("RGB", (12, 12), RED), (("is 1 < 2 <b>?", "yes & no"),), "colour")
    shown = [
        Shown(name, "1/9", np.array([[0, 1]]), name == "bad", "<script>x</script>", False) for name in ("good", "bad")
    ]
    page = write_report(record, [Example(item, (2, 2), "yes & no", True, shown)], tmp_path / "a" / "b")
    text = page.read_text(encoding="utf-8")
    assert "is 1 &lt; 2 &lt;b&gt;?" in text
    assert "<script>" not in text
    assert "s&lt;i&gt;" in text
    assert text.count("data:image/webp") == 3
    assert "data:image/png" in text
    assert 'src="http' not in text
    assert (tmp_path / "a" / "b" / "retention.png").stat().st_size > 10_000
    assert "75.0" in text


def test_the_summary_names_the_best_rival(record):
    assert preferred_budget(record) == "1/9"
    summary = summary_of(record)
    assert (summary["leader"]["pruner"], summary["rival"]["pruner"]) == ("good", "bad")
    assert summary["pair"]["difference"] == 25


def test_a_report_of_a_hopeless_model(tmp_path):
    """The full model is never right: there is no retention anywhere, and the page says so without failing."""
    hopeless = measurement()
    for scores in hopeless.scores.values():
        scores.correct[:] = 0
    record = build_record(hopeless, ["good"], {"vlm": "v", "suite": "s", "split": "test", "command": "c"})
    assert all(row["retention"] is None for row in record["rows"])
    draw_curves(record, tmp_path / "curves.png")
    assert "–" in write_report(record, [], tmp_path).read_text(encoding="utf-8")
