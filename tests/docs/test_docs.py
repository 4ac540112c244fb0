"""The documentation cannot rot: each command and piece of code in it is run as it stands, and links lead somewhere."""

import importlib
import json
import re
import shlex
import shutil

import pytest

from prunezoo.command import main as prunezoo_command
from prunezoo.core import registry
from trainers.cli.names import ROOT
from trainers.evaluation.record import MEAN, read_record, select
from trainers.upkeep.readme import PAGES, rendered

DOCS = ROOT / "docs"
RUN = (
    *("README", "quick_start", "choose", "input", "train", "publish", "protocol", "own_questions", "command"),
    *("serving", "tokenizer", "tower", "faq", "several_pictures", "slim", "budgets", "pages"),
)
NEEDS = {"network", "gpu", "hours", "install"}
"""What a block may say that it needs, and is not run for."""


def blocks(page):
    """Language, what it needs, and text of each fenced block."""
    path = ROOT / "README.md" if page == "README" else DOCS / f"{page}.md"
    return re.findall(r"^```(bash|python) ?(\w*)\n(.*?)^```$", path.read_text("utf-8"), re.S | re.M)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder that looks like a clone, in which commands may write."""
    for name in ("modules", "trainers", "configs", "docs", "hub_cards", "README.md"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "checkpoints", tmp_path / "checkpoints")
    monkeypatch.chdir(tmp_path)
    registry.list_pruners()
    monkeypatch.setattr(registry, "_PRUNERS", dict(registry._PRUNERS))
    return tmp_path


def command_of(name):
    """The module that `python -m` runs."""
    found = importlib.import_module(name)
    return importlib.import_module(f"{name}.__main__") if hasattr(found, "__path__") else found


def run_command(line):
    """`python -m trainers.NAME …` or `prunezoo …`, in this process."""
    words = shlex.split(line.partition(" && ")[0])
    if words[0] == "prunezoo":
        assert prunezoo_command(words[1:]) == 0, line
        return
    assert words[:2] == ["python", "-m"] and words[2].startswith("trainers."), line
    main, code = command_of(words[2]).main, None
    try:
        code = main(words[3:])
    except SystemExit as end:
        code = end.code
    assert not code, line


def run_code(text, scope):
    """Python, as it stands."""
    exec(compile(text, "docs", "exec"), scope)


@pytest.mark.parametrize("page", RUN)
def test_every_command_on_a_page(page, clone, capsys):
    scope: dict = {"__name__": "docs"}
    for language, needs, text in blocks(page):
        assert not needs or needs in NEEDS, f"{page}: {needs}"
        if needs:
            continue
        if language == "python":
            run_code(text, scope)
        else:
            for line in text.replace("\\\n", " ").splitlines():
                run_command(line)
    capsys.readouterr()
    if page == "train":
        assert (clone / "runs" / "mine" / "README.md").is_file()  # the card, of what was trained a page earlier
    if page == "quick_start":
        assert (clone / "runs" / "report" / "index.html").is_file() and (clone / "runs" / "show.png").is_file()


def test_the_first_screen_of_the_readme_runs_as_it_stands(clone, capsys):
    scope: dict = {"__name__": "readme"}
    (code,) = (text for language, _, text in blocks("README") if language == "python")
    run_code(code, scope)
    said = capsys.readouterr().out.splitlines()
    assert said[0].strip() in ("yes", "no") and "64 tokens" in said[1]
    assert scope["pruner"].name == "ppm"


def test_most_is_run():
    """Of what the pages hold, that is: a page full of blocks that need something would prove nothing."""
    followed = (*RUN, "add_a_method")  # by test_add_a_method.py
    found = [(page, needs) for page in followed for _, needs, _ in blocks(page)]
    for page in ("lmms_eval", "benchmarks", "real_vlm"):  # which `make test-extras` shows
        assert {needs for _, needs, _ in blocks(page)} <= NEEDS
    assert sum(not needs for _, needs in found) >= 12
    assert {page for page, needs in found if not needs} == set(followed) - {"faq"}


def run_notebook(name):
    """All its code, in order: what it has defined in the end."""
    notebook = json.loads((DOCS / name).read_text("utf-8"))
    scope: dict = {"__name__": "notebook"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            run_code("".join(cell["source"]), scope)
    return scope


def test_the_notebook_runs_offline(clone, capsys):
    scope = run_notebook("quick_start.ipynb")
    assert scope["answers"].keys() == {48, 16, 8} and scope["answers"][48] == scope["full"] != ""
    assert scope["sheet"].width > 800
    capsys.readouterr()


@pytest.mark.slow
def test_the_tutorial_ends_with_a_pruner_that_learned_something(clone, capsys):
    run_notebook("tutorial.ipynb")
    said = capsys.readouterr().out
    assert "dry run: nothing was uploaded" in said and "prunezoo.keep 0.25" in said
    folder = clone / "runs" / "tutorial"
    assert (folder / "report" / "index.html").is_file() and (folder / "ppm" / "README.md").is_file()
    record = read_record(folder / "ppm" / "metrics.json")
    assert record["n"] == 40 and record["vlm"].endswith("tutorial/vlm")
    kept = {row["pruner"].rpartition("/")[2]: row["retention"] for row in select(record, keep="1/16", group=MEAN)}
    assert kept["ppm"] > kept["random"] + 20


@pytest.mark.parametrize("page", [*sorted(DOCS.glob("*.md")), *sorted(ROOT.glob("*.md"))], ids=lambda path: path.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [DOCS / "architecture.md", DOCS / "add_a_method.md", ROOT / "CONTRIBUTING.md"])
def test_places_that_a_page_names_are_there(page):
    named = re.findall(r"`((?:modules|trainers|tests|configs|docs)/[\w./]*)`", page.read_text("utf-8"))
    assert len(named) > 2
    made = {"modules/prunezoo/training_free/brightest.py", "configs/brightest.yaml"}  # the example's
    assert not [place for place in named if place not in made and not (ROOT / place).exists()]


def test_tables_are_what_was_measured():
    for page in PAGES:
        text = page.read_text("utf-8")
        assert rendered(text, page) == text, "run `python -m trainers.upkeep.readme`"
