"""What the file of a method says of itself: the text of cards, and the papers and evidence in tables."""

import ast
import inspect
import io
import re
import sys
import textwrap
import tokenize
from dataclasses import dataclass, is_dataclass
from functools import cache

from prunezoo.core.contract import Pruner
from prunezoo.core.hub import Pretrained
from prunezoo.core.registry import list_pruners, pruner_class

# "Title, Authors, Venue Year, https://arxiv.org/abs/NNNN.NNNNN" begins a paragraph; a title may have commas
REFERENCE = re.compile(
    r"(?P<title>.+), (?P<authors>[^,]+), (?:(?P<venue>[^,]+) )?(?P<year>\d{4}), "
    r"https://arxiv\.org/abs/(?P<number>\d{4}\.\d{5})"
)


@dataclass(frozen=True)
class Reference:
    """A paper; of one that is named by its number alone, title, authors and venue are not known.

    Attributes:
        number: of arXiv.
        year: of the venue, else of the number.
        authors: `Liu et al.`, or `Bolya and Hoffman`.
        venue: where it came out, without the year; None: on arXiv alone.
    """

    number: str
    year: str
    title: str | None = None
    authors: str | None = None
    venue: str | None = None


@dataclass(frozen=True)
class About:
    """A method in words.

    Attributes:
        title: the first sentence of its file, or the paper's title there.
        text: its first paragraphs, Markdown.
        references: papers that it names, by number.
        evidence: how far it follows a paper, by what its file says: "paper", "paper, in part reconstructed", "after a
            paper, in part ours", or "ours".
    """

    title: str
    text: str
    references: tuple[Reference, ...]
    evidence: str

    @property
    def papers(self) -> tuple[str, ...]:
        """Their arXiv numbers."""
        return tuple(one.number for one in self.references)


def about(method: type[Pretrained]) -> About:
    """Read the docstring of the file that a method stands in."""
    text = _text(method)
    whole = [part for part in text.split("\n\n") if not part.startswith("Letters")]
    # A table stays as it is, and what stands in it says nothing about the rest.
    paragraphs = [part if part.startswith("|") else " ".join(part.split()) for part in whole]
    said = [part for part in paragraphs if not part.startswith("|")]
    papers = sorted(set(re.findall(r"\b\d{4}\.\d{5}\b", text)))
    if re.search(r"\bReconstructed\b", " ".join(said)):
        evidence = "paper, in part reconstructed"
    elif not papers or re.search(r"(^|[.:] )Ours\b", " ".join(said)):
        evidence = "ours"
    else:
        evidence = "after a paper, in part ours" if re.search(r"\bours\b", " ".join(said)) else "paper"
    known = {**_references(), **_headers(text)}  # what its own file calls a paper goes first
    references = tuple(known.get(paper) or Reference(paper, f"20{paper[:2]}") for paper in papers)
    return About(paragraphs[0], "\n\n".join(paragraphs), references, evidence)


def _text(method: type[Pretrained]) -> str:
    return inspect.getdoc(sys.modules[method.__module__]) or ""


def _headers(text: str) -> dict[str, Reference]:
    """The papers that a docstring names in full, by number."""
    found = [REFERENCE.match(" ".join(part.split())) for part in text.split("\n\n")]
    return {match["number"]: Reference(**match.groupdict()) for match in found if match}


@cache
def _references() -> dict[str, Reference]:
    """Those of all methods: a file may name by its number what another one follows."""
    texts = [_text(pruner_class(name)) for name in list_pruners()]
    return {number: one for text in texts for number, one in _headers(text).items()}


def stage_of(method: type[Pruner]) -> str:
    """Where a method acts: input, vision, prompt, layer, or several of them."""
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
    return "\n\n".join(part for part in _text(method).split("\n\n") if not part.startswith("Letters"))
