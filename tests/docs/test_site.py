"""The site that `make docs` builds has every page of docs/ and every public name of the library."""

import re

import pytest

import prunezoo
from docs.links import on_page_markdown
from trainers.cli.names import ROOT
from trainers.cli.recipes import load_yaml

DOCS = ROOT / "docs"


class File:
    """Of a page of mkdocs, as far as the hook reads it."""

    src_uri = "methods/ppm.md"


class Page:
    file = File()


def test_every_page_is_in_the_menu():
    menu = str(load_yaml((DOCS / "mkdocs.yml").read_text("utf-8"))["nav"])
    named = set(re.findall(r"'([\w/]+\.md)'", menu))
    assert named == {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md") if path.parent.name != "methods"} | {
        "methods/README.md"
    }


def test_every_public_name_is_described():
    said = "".join(path.read_text("utf-8") for path in (DOCS / "reference").glob("*.md"))
    assert set(re.findall(r"^::: prunezoo\.(\w+)$", said, re.M)) == set(prunezoo.__all__) - {"__version__"}


@pytest.mark.parametrize(
    ("address", "wanted"), [(None, "ppm"), ("https://x/", "[ppm](https://x/modules/prunezoo/learned/ppm.py)")]
)
def test_links_out_of_docs_lead_to_the_repository_or_are_text(monkeypatch, address, wanted):
    monkeypatch.delenv("REPOSITORY", raising=False)
    if address:
        monkeypatch.setenv("REPOSITORY", address)
    text = "[a](divprune.md) [ppm](../../modules/prunezoo/learned/ppm.py)\n```\n[b](../../Makefile)\n```\n"
    assert on_page_markdown(text, Page()) == text.replace("[ppm](../../modules/prunezoo/learned/ppm.py)", wanted)
