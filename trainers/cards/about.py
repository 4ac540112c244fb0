"""What the file of a method says of itself: the text of cards, and the papers and evidence in tables."""

import ast
import inspect
import io
import re
import sys
import textwrap
import tokenize
from dataclasses import dataclass, is_dataclass

from prunezoo.core.contract import Pruner
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
    whole = [part for part in text.split("\n\n") if not part.startswith("Letters")]
    # A table stays as it is, and what stands in it says nothing about the rest.
    paragraphs = [part if part.startswith("|") else " ".join(part.split()) for part in whole]
    said = [part for part in paragraphs if not part.startswith("|")]
    papers = tuple(sorted(set(re.findall(r"\b\d{4}\.\d{5}\b", text))))
    if re.search(r"\bReconstructed\b", " ".join(said)):
        evidence = "paper, in part reconstructed"
    elif not papers or re.search(r"(^|[.:] )Ours\b", " ".join(said)):
        evidence = "ours"
    else:
        evidence = "after a paper, in part ours" if re.search(r"\bours\b", " ".join(said)) else "paper"
    return About(paragraphs[0], "\n\n".join(paragraphs), papers, evidence)


def stage_of(method: type[Pruner]) -> str:
    """Where a method acts: vision, prompt, layer, or several of them."""
    return method.stage if method.parts is Pruner.parts else "several"


@dataclass(frozen=True)
class Option:
    """A field of a config: its name, its default as Python writes it, and the comment behind it."""

    name: str
    default: str
    text: str


def options(method: type[Pretrained]) -> list[Option]:
    """The fields of a method's config, those of its base classes too."""
    found = {}
    for cls in reversed(method.config_class.__mro__):
        if is_dataclass(cls):
            found.update({one.name: one for one in _options(cls)})
    return list(found.values())


def _options(cls: type) -> list[Option]:
    """Those that a class adds. The comments of a field stand behind it, or within the brackets of its default."""
    source = textwrap.dedent(inspect.getsource(cls))
    comments: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ")
    (body,) = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    found = []
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            default = "–" if node.value is None else ast.unparse(node.value)
            found.append(Option(node.target.id, default, " ".join(comments[n] for n in lines if n in comments)))
    return found


def docstring(method: type[Pretrained]) -> str:
    """The docstring of the file that a method stands in, as Markdown, without what its shapes' letters mean."""
    text = inspect.getdoc(sys.modules[method.__module__]) or ""
    return "\n\n".join(part for part in text.split("\n\n") if not part.startswith("Letters"))
