"""Looking at one picture: in the terminal, and on a page of a server on this machine."""

import base64
import json
import urllib.error
import urllib.request

import pytest
from browser import CHROMIUM, probed, read
from PIL import Image
from web import serving

from trainers import show
from trainers.cli.names import ROOT
from trainers.evaluation.loading import load_vlm
from trainers.evaluation.methods import build_method
from trainers.evaluation.web import Page


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def model():
    return load_vlm(str(ROOT / "checkpoints" / "tiny-llava"))


@pytest.fixture
def served(model):
    """Address of a running server with two pruners."""
    methods = [build_method("checkpoints/ppm-tiny"), build_method("pool")]
    with serving(Page(*model, methods, "pool")) as address:
        yield address


def test_a_question_in_the_terminal(tmp_path, capsys, monkeypatch, model):
    monkeypatch.setattr(show, "load_vlm", lambda _: model)
    out = tmp_path / "new" / "kept.png"
    assert show.main(["scenes:2", "--pruner", "ppm", "uniform", "--keep", "1/9", "4", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "how many plates are there ?" in said and "all tokens" in said
    assert [line.split("│")[3].strip() for line in said.splitlines() if "ppm-tiny" in line] == ["16", "4"]
    picture = Image.open(out)
    assert picture.width > 3 * 216 and picture.height > 2 * 216  # all, 16 and 4 across; two pruners down
    Image.new("RGB", (200, 90), (200, 30, 60)).save(tmp_path / "red.jpg")
    assert show.main([str(tmp_path / "red.jpg"), "is there a red circle ?", "--keep", "9", "--out", str(out)]) == 0
    assert "is there a red circle ?" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "which picture?"),
        (["no.png", "what?"], "no.png: no such file; an item of a suite is written scenes:3"),
        (["README.md", "what?"], "README.md: not a picture that can be read"),
        (["README.md"], "README.md: what is the question?"),
        (["scenes:999999999"], "the suite has items 0 to"),
        (["scenes:x"], "scenes:x: an item of a suite is written scenes:3"),
        (["scene:3"], "scene:3: no suite is called 'scene'; did you mean 'scenes'"),
        (["scenes:1", "--keep", "0"], "--keep 0: a budget is at least 1 token"),
        (["scenes:1", "--beside", "pool"], "--beside pool: for the page of --serve; here name several after --pruner"),
        (["scenes:1", "--pruner", "pmm"], "did you mean 'ppm'?"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        show.main(words)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and message in line


def post(address, value, kind="application/json"):
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    request = urllib.request.Request(f"{address}answer", data, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_the_server_answers_and_refuses(served, tmp_path):
    Image.new("RGB", (96, 96), (200, 30, 60)).save(tmp_path / "red.png")
    picture = "data:image/png;base64," + base64.b64encode((tmp_path / "red.png").read_bytes()).decode()
    asked = {"picture": picture, "question": "is there a red circle ?", "pruner": "ppm-tiny", "keep": "16"}
    status, found = post(served, asked)
    assert status == 200, found
    (one,) = found["shown"]
    assert found["grid"] == [12, 12] and len(one["kept"]) == len(set(one["kept"])) == 16
    assert one["same"] == (one["answer"] == found["full"]) and not one["anchors"]
    both = post(served, {**asked, "beside": "pool"})[1]
    assert both["shown"][0] == one and both["full"] == found["full"]
    assert [(shown["pruner"], shown["anchors"]) for shown in both["shown"]] == [("ppm-tiny", False), ("pool", True)]
    assert len(post(served, {**asked, "beside": "ppm-tiny"})[1]["shown"]) == 1
    for change, message in (
        ({"picture": "data:image/png;base64,AAAA"}, "not a picture"),
        ({"picture": "?"}, "not a picture"),
        ({"pruner": "x"}, "no pruner 'x' here; there are: pool, ppm-tiny"),
        ({"beside": "x"}, "no pruner 'x' here"),
        ({"beside": 3}, "beside: the name of a pruner, or nothing"),
        ({"keep": "0"}, "at least 1 token"),
        ({"question": " "}, "what is the question?"),
        ({"question": None}, "a question has picture, question, pruner, keep, all texts"),
    ):
        status, found = post(served, {**asked, **change})
        assert status == 400 and message in found["error"]
    assert post(served, b"{")[0] == 400
    assert post(served, asked, kind="text/plain")[0] == 415  # what a form of another site could send
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{served}etc/passwd", timeout=10)


UNTIL = """
const until = async text => {
  while (!text.test($("said").textContent)) await new Promise(done => setTimeout(done, 50)); };
const answers = () => [...document.querySelectorAll(".answer")].map(one => one.textContent);
const captions = () => [...document.querySelectorAll("figure:not([hidden]) figcaption")].map(one => one.textContent);
const columns = () => getComputedStyle(document.querySelector("main")).gridTemplateColumns.split(" ").length;
await until(/16 of 144/);
"""


def seen(served, tmp_path, monkeypatch, script, **how):
    """What a script found on the real page of the real server."""
    whole = Page.html
    monkeypatch.setattr(Page, "html", lambda self: probed(whole(self), UNTIL + script))
    found = read(served, tmp_path, **how)
    assert found["errors"] == []
    return found


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_asks_and_draws_two_pruners(served, tmp_path, monkeypatch):
    """It answers when opened, and again when the slider moves or the second pruner goes."""
    script = """
        const first = captions(), said = answers(), sizes = [...document.querySelectorAll("canvas")].map(c => c.width);
        $("keep").value = 50; $("keep").dispatchEvent(new Event("input")); $("keep").dispatchEvent(new Event("change"));
        await until(/72 of 144/);
        const then = captions();
        $("beside").value = ""; $("beside").dispatchEvent(new Event("change")); await until(/reading/);
        await until(/72 of 144/);
        return { first, said, sizes, then, alone: captions(), share: $("share").textContent, columns: columns() };
    """
    found = seen(served, tmp_path, monkeypatch, script)
    assert found["first"] == ["all tokens", "ppm-tiny, 16 tokens", "pool, 16 tokens"] and all(found["said"])
    assert found["then"] == ["all tokens", "ppm-tiny, 72 tokens", "pool, 72 tokens"] and found["share"] == "50 %"
    assert found["alone"] == found["then"][:2] and found["sizes"] == [384, 384] and found["columns"] == 2


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_sample_is_pressed_on_a_phone(served, tmp_path, monkeypatch):
    script = """
        const buttons = [...document.querySelectorAll("#samples button")], before = $("picture").src;
        buttons[2].click(); await until(/reading/); await until(/16 of 144/);
        const root = document.documentElement;
        return { count: buttons.length, pressed: buttons.map(one => one.ariaPressed), asked: $("question").value,
          wanted: buttons[2].dataset.question, changed: $("picture").src !== before, columns: columns(),
          wide: root.scrollWidth, window: innerWidth };
    """
    found = seen(served, tmp_path, monkeypatch, script, size=(390, 844), dark=True)
    assert found["count"] >= 5 and [at for at, on in enumerate(found["pressed"]) if on == "true"] == [2]
    assert found["asked"] == found["wanted"] and found["changed"]
    assert found["columns"] == 1 and found["wide"] <= found["window"] <= 640
