"""What the file of a method says of itself: the text of cards, and the papers and evidence in tables."""

import inspect
import re
import sys
from dataclasses import dataclass

from prunezoo.core.hub import Pretrained


@dataclass(frozen=True)
class About:
    """A method in words.

    Attributes:
        title: the first sentence of its file, or the paper's title there.
        text: its first paragraphs, Markdown.
        papers: arXiv numbers that it names.
        evidence: how far it follows a paper, by what its file says: "paper", "paper, in part reconstructed", "after a
            paper, in part ours", or "ours".
    """

    title: str
    text: str
    papers: tuple[str, ...]
    evidence: str


def about(method: type[Pretrained]) -> About:
    """Read the docstring of the file that a method stands in."""
    text = inspect.getdoc(sys.modules[method.__module__]) or ""
    paragraphs = [" ".join(p.split()) for p in text.split("\n\n")]
    paragraphs = [p for p in paragraphs if not p.startswith("Letters")]
    papers = tuple(sorted(set(re.findall(r"\b\d{4}\.\d{5}\b", text))))
    if re.search(r"\bReconstructed\b", text):
        evidence = "paper, in part reconstructed"
    elif not papers or re.search(r"(^|[.:] )Ours\b", paragraphs[0] + " " + " ".join(paragraphs[1:])):
        evidence = "ours"
    else:
        evidence = "after a paper, in part ours" if re.search(r"\bours\b", text) else "paper"
    return About(paragraphs[0], "\n\n".join(paragraphs), papers, evidence)
