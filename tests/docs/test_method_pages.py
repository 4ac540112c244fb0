"""docs/methods/ and docs/league.md say what the files of the methods and the records say."""

import re

import pytest

from prunezoo import list_pruners
from prunezoo.core.registry import pruner_class
from trainers.cards.about import options
from trainers.evaluation.league import SCENES, league
from trainers.upkeep.pages import FOLDER, INDEX, pages
from trainers.upkeep.readme import PAGES, rendered

METHODS = list_pruners()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_what_was_measured(page):
    text = page.read_text(encoding="utf-8")
    assert rendered(text, page) == text, "run `python -m trainers.upkeep.readme`"


def test_every_method_has_its_page():
    made = pages()
    assert {path.name for path in FOLDER.glob("*.md")} == {INDEX, *(f"{name}.md" for name in METHODS)}
    for name, text in made.items():
        assert (FOLDER / name).read_text(encoding="utf-8") == text, "run `python -m trainers.upkeep.pages`"


@pytest.mark.parametrize("method", METHODS)
def test_options_are_all_there_with_a_word_on_each(method):
    found = {one.name: one for one in options(pruner_class(method))}
    assert set(found) == set(pruner_class(method).config_class.__dataclass_fields__)
    for one in found.values():
        assert one.text, f"{method}: a comment behind the field '{one.name}' says what it is"


def test_the_table_of_the_league_is_sorted():
    for keep in SCENES.budgets:
        retention = [place.row["retention"] for place in league()[keep]]
        assert len(retention) > 10 and retention == sorted(retention, reverse=True), keep


def test_pages_link_to_what_is_there():
    for path in FOLDER.glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
