"""The report's page and pictures."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from browser import CHROMIUM, act
from measurements import measurement
from PIL import Image

from trainers.data.suite import Item
from trainers.evaluation.curves import draw_curves
from trainers.evaluation.examples import Example, Shown
from trainers.evaluation.pictures import EDGE, PAPER, SIDE, draw_kept
from trainers.evaluation.record import build_record
from trainers.evaluation.report import differences_of, preferred_budget, summary_of, write_report
from trainers.evaluation.scores import Measurement

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
    data = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    (example,) = data["examples"]
    assert example["turns"] == [["is 1 < 2 <b>?", "yes & no"]]
    assert example["shown"][0][0] == {
        "name": "good",
        "kept": [1],
        "anchors": False,
        "answer": "<script>x</script>",
        "right": False,
    }
    assert "<script>x" not in text and "<b>?" not in text
    assert "s&lt;i&gt;" in text
    assert text.count("data:image/webp") == 1  # the picture, once for all methods and budgets
    assert not re.search(r"""(src|href)=["']?http|@import|url\(""", text)
    assert (tmp_path / "a" / "b" / "retention.png").stat().st_size > 10_000
    assert "75.0" in text and text.count("<svg") == 3  # the mean and two groups


@pytest.fixture
def page(tmp_path):
    """A report of two methods, three budgets and two pictures."""
    m = measurement()
    scores = {}
    for number, keep in enumerate(("1/3", "1/9", "1/18")):
        for (pruner, budget), of in m.scores.items():
            if pruner in ("good", "bad"):
                scores[pruner, keep] = replace(of, layers=np.full_like(of.layers, 48 / 3**number))
            else:
                scores[pruner, budget] = of
    record = build_record(
        Measurement(m.groups, m.group_of, m.chance, scores),
        ["good"],
        {"vlm": "v", "suite": "s", "split": "test", "command": "python -m trainers.evaluate " + "--long-option " * 30},
    )
    picture = Image.new("RGB", (12, 12), RED)
    items = [Item(str(i), picture, (("which?", "red"),), group) for i, group in enumerate(("colour", "count"))]
    shown = [
        Shown(pruner, keep, np.array([[0, k] for k in range(count)]), False, f"{pruner} {keep}", pruner == "good")
        for keep, count in (("1/3", 3), ("1/9", 2), ("1/18", 1))
        for pruner in ("good", "bad")
    ]
    return write_report(record, [Example(item, (4, 4), "red", True, shown) for item in items], tmp_path)


LOOK = """
const canvases = [...document.querySelectorAll("#gallery canvas")];
const look = () => ({
  kept: canvases.map(c => +c.dataset.kept),
  answers: [...document.querySelectorAll("#gallery .cell .answer")].map(a => a.textContent),
  tables: [...document.querySelectorAll("table.sorts")].map(t => t.hidden),
  label: document.querySelector("output").textContent,
  pixel: [...canvases[0].getContext("2d").getImageData(2, 2, 1, 1).data],
  far: [...canvases[0].getContext("2d").getImageData(canvases[0].width - 9, canvases[0].height - 9, 1, 1).data],
});
const slider = document.getElementById("budget-gallery");
const slide = value => { slider.value = value; slider.dispatchEvent(new Event("input")); };
const rows = () => [...document.querySelector("table.sorts:not([hidden]) tbody").rows];
const order = () => rows().map(row => row.cells[0].textContent);
const wait = () => new Promise(done => setTimeout(done, 200));
await wait();
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_in_a_browser(page, tmp_path):
    """The slider moves tables, pictures and answers; headings sort; names hide curves; the theme turns."""
    found = act(
        page,
        LOOK
        + """
        const first = look(); slide(0); await wait(); const few = look(); slide(2); await wait(); const many = look();
        const before = order();
        const heading = document.querySelector("table.sorts:not([hidden])").tHead.rows[0].cells[2];
        heading.click(); const falling = order(); heading.click(); const rising = order();
        const button = document.querySelectorAll(".legend button")[1]; button.click();
        const hidden = [...document.querySelectorAll('svg [data-pruner="1"]')].map(g => getComputedStyle(g).display);
        const paper = () => getComputedStyle(document.body).backgroundColor;
        const light = paper(); document.getElementById("theme").click();
        const large = document.getElementById("large"); canvases[0].click(); const opened = large.open; large.click();
        const curve = document.querySelector('svg [data-pruner="0"]'), lit = () => curve.classList.contains("lit");
        curve.dispatchEvent(new Event("pointerenter")); const pointed = lit();
        curve.dispatchEvent(new Event("pointerleave"));
        return { opened, closed: !large.open, pointed, left: lit(), title: document.title,
          first, few, many, before, falling, rising, hidden, light, dark: paper() };
        """,
        tmp_path,
    )
    assert found["errors"] == []
    assert found["first"]["label"] == "1/9: 16 tokens" and found["few"]["label"].startswith("1/18")
    assert [found[k]["kept"] for k in ("few", "first", "many")] == [[1] * 4, [2] * 4, [3] * 4]
    assert found["few"]["answers"] == ["✓ good 1/18", "✗ bad 1/18"] * 2
    assert found["few"]["tables"] == [False, True, True] and found["many"]["tables"] == [True, True, False]
    red, green, blue, _ = found["first"]["pixel"]
    assert abs(red - RED[0]) < 12 and abs(green - RED[1]) < 12 and abs(blue - RED[2]) < 12  # kept: as it is
    assert min(found["first"]["far"][:3]) > 180  # dropped: faded
    assert found["before"] == ["full", "good", "bad", "none"]
    assert (found["falling"][-1], found["rising"][0]) == ("none", "none")
    assert set(found["hidden"]) == {"none"} and len(found["hidden"]) == 3
    assert found["light"] != found["dark"]
    assert found["opened"] and found["closed"] and found["pointed"] and not found["left"]
    assert re.fullmatch(r"prunezoo: good on s, \d{4}-\d\d-\d\d", found["title"])


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_on_a_phone_in_the_dark(page, tmp_path):
    found = act(
        page,
        LOOK
        + """
        const root = document.documentElement;
        const seen = panel => getComputedStyle(panel).display !== "none";
        const shown = () => [...document.querySelectorAll(".panels svg")].map(seen);
        const first = shown(), select = document.getElementById("panel");
        select.selectedIndex = 2; select.dispatchEvent(new Event("change"));
        return { panels: [first, shown()],
          wide: root.scrollWidth, window: innerWidth, paper: getComputedStyle(document.body).backgroundColor,
          columns: getComputedStyle(document.querySelector(".example")).gridTemplateColumns.split(" ").length };
        """,
        tmp_path,
        size=(390, 844),
        dark=True,
    )
    assert found["errors"] == []
    assert found["window"] <= 640 and found["wide"] <= found["window"]  # nothing sticks out sideways
    assert found["columns"] == 1
    assert found["panels"] == [[True, False, False], [False, False, True]]
    assert found["paper"] == "rgb(23, 24, 26)"


def test_the_summary_names_the_best_rival(record):
    assert preferred_budget(record) == "1/9"
    summary = summary_of(record)
    assert (summary["leader"]["pruner"], summary["rival"]["pruner"]) == ("good", "bad")
    assert summary["pair"]["difference"] == 25


def test_what_notes_put_between_backticks_is_code(record, tmp_path):
    text = write_report({**record, "scorer": "<i>"}, [], tmp_path).read_text(encoding="utf-8")
    assert "by <code>&lt;i&gt;</code>, of the answers" in text


def test_a_report_of_a_hopeless_model(tmp_path):
    """The full model is never right: there is no retention anywhere, and the page says so without failing."""
    hopeless = measurement()
    for scores in hopeless.scores.values():
        scores.correct[:] = 0
    record = build_record(hopeless, ["good"], {"vlm": "v", "suite": "s", "split": "test", "command": "c"})
    assert all(row["retention"] is None for row in record["rows"])
    draw_curves(record, tmp_path / "curves.png")
    text = write_report(record, [], tmp_path).read_text(encoding="utf-8")
    assert "<h2>Accuracy in each group, %</h2>" in text and "nothing right" in text
    assert "–" not in text and "<svg" not in text and "Paired differences" not in text


def test_each_pair_is_compared_once_the_leader_first_and_in_words_where_unclear(record, tmp_path):
    def pair(pruner, rival, low, high):
        return {"pruner": pruner, "rival": rival, "keep": "1/9", "difference": (low + high) / 2, "ci": [low, high]}

    pairs = [pair("bad", "good", -30.0, -20.0), pair("good", "random", -1.0, 3.0), pair("bad", "random", 1.0, 2.0)]
    own = {**record, "paired": [*pairs, pair("good", "bad", 20.0, 30.0)]}
    own["rows"] = [*record["rows"], *(dict(row, pruner="random") for row in record["rows"] if row["pruner"] == "bad")]
    first, rest = differences_of(own)
    assert [(line["pruner"], line["rival"]) for line in first] == [("good", "random"), ("good", "bad")]
    assert [(line["pruner"], line["rival"]) for line in rest] == [("bad", "random")]
    text = write_report(own, [], tmp_path).read_text(encoding="utf-8")
    assert "not clearly different<small>-1.0 to +3.0" in text and "<summary>All other pairs (1)</summary>" in text
