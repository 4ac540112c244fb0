"""How a written answer is judged, by name: a score in [0, 1] from what a model wrote and the reference answers.

- `exact`: a reference, but for case and white space.
- `vqa`: VQA accuracy, min(people who gave this answer / 3, 1), mean over leaving out one of them in turn. Antol et al.,
  VQA, ICCV 2015, https://arxiv.org/abs/1505.00468; https://visualqa.org/evaluation.html
- `anls`: 1 - edit distance / longer length, 0 beyond half; the best reference. Biten et al., Scene Text Visual Question
  Answering, ICCV 2019, https://arxiv.org/abs/1905.13648. At just half the paper says 0, what the field measures with,
  such as lmms-eval, 0.5, and so it is here. The distance is torchmetrics'.
- `relaxed`: a number within 5 % of the reference, or the same text. Masry et al., ChartQA, ACL Findings 2022,
  https://arxiv.org/abs/2203.10244
- `choice`: the letter of the right choice: alone, in front, in brackets, behind "answer is"; or the choice's text.
- `contains`: a reference stands somewhere in the answer. Liu et al., OCRBench, https://arxiv.org/abs/2305.07895
"""

import math
import re
import string
from collections.abc import Callable, Sequence

from prunezoo.core.errors import PruneZooError
from prunezoo.core.near import near

LETTERS = string.ascii_uppercase
PEOPLE = 4
"""Fewest answers to a question that VQA accuracy is defined for here: one left out, and three."""
NUMBERS = "zero one two three four five six seven eight nine ten"
_WORDS = {"none": "0", **{word: str(number) for number, word in enumerate(NUMBERS.split())}}
_ARTICLES = {"a", "an", "the"}

Scorer = Callable[[str, Sequence[str], Sequence[str]], float]
"""From what was written, the references (at least one) and the choices (perhaps none) to a score in [0, 1]."""


def plain(text: str) -> str:
    """A text in lower case, with single spaces."""
    return " ".join(text.lower().split())


def exact(said: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """1 for a reference, but for case and white space."""
    return float(plain(said) in map(plain, references))


def vqa_words(text: str) -> str:
    """An answer as VQA compares it: no case, articles or (most) punctuation; number words as digits.

    Apostrophes are dropped, where the authors' script puts those in that people leave out (`dont`): both make the two
    spellings one. Commas within numbers go, points within numbers stay.
    """
    text = re.sub(r"(?<=\d),(?=\d)|'", "", text.lower())
    text = re.sub(r"(?<!\d)\.|\.(?!\d)", "", text)
    words = re.sub(r"[;/\[\]\"{}()=+\\_\-><@`,?!]", " ", text).split()
    return " ".join(_WORDS.get(word, word) for word in words if word not in _ARTICLES)


def vqa(said: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """VQA accuracy; the references are the answers of at least PEOPLE people, each as often as it was given."""
    if len(references) < PEOPLE:
        raise PruneZooError(
            f"scorer vqa needs {PEOPLE} or more answers to each question, one found {len(references)}: name the column "
            "with all of them (answer=answers), or use scorer=exact"
        )
    same = [vqa_words(said) == vqa_words(reference) for reference in references]
    return sum(min((sum(same) - own) / 3, 1.0) for own in same) / len(same)


def anls(said: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """Average normalised Levenshtein similarity of one answer."""
    from torchmetrics.functional.text import edit_distance

    own, others = plain(said), [plain(reference) for reference in references]
    distances = edit_distance([own] * len(others), others, reduction="none").tolist()
    pairs = zip(distances, others, strict=True)
    shares = [distance / max(len(own), len(other), 1) for distance, other in pairs]
    return max(1 - share if share <= 0.5 else 0.0 for share in shares)


def number_of(text: str) -> float | None:
    """A number, `12 %` as 0.12; None for what is none."""
    text = text.strip().replace(",", "")
    try:
        value = float(text.rstrip("% ")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def relaxed(said: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """1 within 5 % of a reference that is a number; for other references, and for 0, as `exact`."""
    own = number_of(said)
    for reference in references:
        value = number_of(reference)
        if own is not None and value:
            if abs(own - value) <= 0.05 * abs(value) * (1 + 1e-12):  # 0.95 and 1.05 are within
                return 1.0
        elif plain(said) == plain(reference) or (own == value == 0):
            return 1.0
    return 0.0


def chosen(said: str, choices: Sequence[str] = ()) -> str | None:
    """The letter that an answer chooses, or None: the first of the ways named above that says one.

    Args:
        said: what a model wrote.
        choices: their texts, in the order of the letters; of none, any letter may be meant.
    """
    said = said.strip()
    letter = f"[A-{LETTERS[len(choices) - 1] if choices else 'Z'}]"
    patterns = (
        rf"\(?({letter})[).:,]?$",
        rf"\(?({letter})[).:](?=\s)",
        rf"answer\s+is:?\s*\(?({letter})\b",
        rf"\(({letter})\)",
    )
    for number, pattern in enumerate(patterns):
        flags = re.IGNORECASE if number == 0 or "answer" in pattern else 0
        look = re.match if number < 2 else re.search
        if found := look(pattern, said, flags):
            return found[1].upper()
    named = [place for place, text in enumerate(choices) if plain(text) == plain(said).rstrip(".")]
    named = named or [place for place, text in enumerate(choices) if plain(text) and plain(text) in plain(said)]
    return LETTERS[named[0]] if len(named) == 1 else None


def choice(said: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """1 where the chosen letter is a reference's."""
    return float(chosen(said, choices) in {chosen(reference, choices) for reference in references} - {None})


def contains(said: str, references: Sequence[str], choices: Sequence[str] = ()) -> float:
    """1 where a reference stands in the answer, whatever the case and the white space."""
    return float(any(plain(reference) in plain(said) for reference in references if plain(reference)))


SCORERS: dict[str, Scorer] = {
    "exact": exact,
    "vqa": vqa,
    "anls": anls,
    "relaxed": relaxed,
    "choice": choice,
    "contains": contains,
}


def find_scorer(name: str) -> Scorer:
    """The scorer of a name.

    Raises:
        PruneZooError: there is none.
    """
    if name not in SCORERS:
        raise PruneZooError(f"scorer '{name}' is unknown{near(name, SCORERS)}")
    return SCORERS[name]
