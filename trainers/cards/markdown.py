"""Other people's texts in a card: letter by letter, whatever Markdown, HTML or BibTeX would make of them."""

import json
import re
from collections.abc import Sequence

from trainers.cli.text import visible, without_folders

from .about import Reference

LONGEST = 300
"""Of a text within a line."""
VENUES = {None: ("misc", "note"), "TMLR": ("article", "journal")}
"""What is no conference: kind of its entry, and the field that names it."""


def inline(text: object) -> str:
    """A text within a line, without folders of this machine; no letter of it is markup."""
    line = _one_line(text)
    return re.sub(r"([\\`*\[\]<>|#$~&]|(?<!\w)_|_(?!\w))", r"\\\1", line)


def code(text: object) -> str:
    """A text as code within a line, without folders of this machine."""
    line = _one_line(text)
    if "|" in line or not line.strip():  # a table would end its cell there, also within code
        return inline(line)
    ticks = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if "`" in line else ""
    return f"{ticks}{space}{line}{space}{ticks}"


def fence(text: object, language: str = "") -> str:
    """Lines of code, without folders of this machine; nothing in them ends the block."""
    body = visible(without_folders(str(text))).rstrip()
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", body)), default=0))
    return f"{ticks}{language}\n{body}\n{ticks}"


def quoted(text: str) -> str:
    """A text as a string of Python."""
    return json.dumps(visible(text), ensure_ascii=False)


def bibtex(papers: Sequence[Reference]) -> str:
    """An entry for each paper, with what is known of it."""
    return "\n\n".join(map(_entry, papers))


def _entry(paper: Reference) -> str:
    kind, where = VENUES.get(paper.venue, ("inproceedings", "booktitle"))
    fields = {
        "title": f"{{{_tex(paper.title)}}}" if paper.title else None,  # as it is, capitals too
        "author": _tex(re.sub(r" et al\.$", " and others", paper.authors)) if paper.authors else None,
        where: _tex(paper.venue) if paper.venue else None,
        "year": paper.year,
        "archiveprefix": "arXiv",
        "eprint": paper.number,
        "url": f"https://arxiv.org/abs/{paper.number}",
    }
    lines = [f"  {name} = {{{value}}}" for name, value in fields.items() if value]
    return f"@{kind}{{arXiv:{paper.number},\n" + ",\n".join(lines) + "\n}"


def _tex(text: str) -> str:
    """A text letter by letter, but for braces and backslashes, which BibTeX cannot have alone."""
    return re.sub(r"([&%$#_])", r"\\\1", re.sub(r"[{}\\]", "", text))


def _one_line(text: object) -> str:
    line = visible(" ".join(without_folders(str(text)).split()))
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}…"


FILTERS = {"inline": inline, "code": code, "fence": fence, "bibtex": bibtex, "quoted": quoted}
"""Of the templates."""
