"""Other people's texts in a card: letter by letter, whatever Markdown, HTML or BibTeX would make of them."""

import json
import re
from collections.abc import Sequence

from trainers.cli.text import visible, without_folders

LONGEST = 300
"""Of a text within a line."""


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


def bibtex(papers: Sequence[str]) -> str:
    """An entry for each arXiv number, with what the number says."""
    entries = [
        f"@misc{{arXiv:{paper},\n  archiveprefix = {{arXiv}},\n  eprint = {{{paper}}},\n  year = {{20{paper[:2]}}},\n"
        f"  url = {{https://arxiv.org/abs/{paper}}}\n}}"
        for paper in papers
    ]
    return "\n\n".join(entries)


def _one_line(text: object) -> str:
    line = visible(" ".join(without_folders(str(text)).split()))
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}…"


FILTERS = {"inline": inline, "code": code, "fence": fence, "bibtex": bibtex, "quoted": quoted}
"""Of the templates."""
