"""Suite easy-vqa: somebody else's pictures and questions, to see whether a pruner transfers.

Data card
    Source: the PyPI package ``easy-vqa`` 1.0 (Victor Zhou, MIT licence), ``pip install 'prunezoo[easy-vqa]'``.
    Pictures: 5,000 of 64×64 pixels, each ONE circle, rectangle or triangle in one of eight colours on a light ground.
    Questions: 48,248 in 13 answers. Groups: color, shape, existence (yes or no, often negated).
    Splits: by picture. Test is the package's own; of its 4,000 training pictures, the last 400 are the validation.
    No picture is in two splits, not even as a copy.
    Limits: one shape a picture, so the tokens that matter are the same for every question: good for transfer and as a
    smoke test, no instrument for pruners that read the question.
"""

from collections import Counter
from functools import cache
from importlib.resources import files
from importlib.util import find_spec

import numpy as np

from prunezoo.core.bounds import parse_json
from prunezoo.core.errors import PruneZooError

from .pictures import decode_picture
from .suite import Item, Suite, register_suite

_VALIDATION_FROM = 3600  # the first training picture that is kept for validation
_LIGHT = 225  # no channel of a ground is darker (it is drawn from 230 to 255); every shape has one that is


@cache
def _questions(folder: str) -> list[tuple[str, str, int]]:
    """(question, answer, picture number) of the package's ``train`` or ``test`` folder, in file order."""
    if find_spec("easy_vqa") is None:
        raise PruneZooError("suite easy-vqa: its data are not installed; do: pip install easy-vqa")
    text = files("easy_vqa").joinpath("data", folder, "questions.json").read_text("utf-8")
    return [(question, answer, picture) for question, answer, picture in parse_json(text)]


def _group(answer: str) -> str:
    if answer in ("yes", "no"):
        return "existence"
    return "shape" if answer in ("circle", "rectangle", "triangle") else "color"


@register_suite("easy-vqa")
class EasyVqa(Suite):
    """The easy-VQA questions, one item each, in the order of the package's files."""

    groups = ("color", "shape", "existence")

    def __init__(self, split: str = "test", limit: int | None = None) -> None:
        super().__init__(split, limit)
        self._folder = "test" if split == "test" else "train"
        rows = _questions(self._folder)
        if split != "test":
            rows = [row for row in rows if (row[2] >= _VALIDATION_FROM) == (split == "validation")]
        self._rows = rows
        answers = {group: Counter(a for _, a, _ in rows if _group(a) == group) for group in self.groups}
        self.chance = {group: max(count.values()) / count.total() for group, count in answers.items()}

    def size(self) -> int:
        """Number of questions in the split."""
        return len(self._rows)

    def item(self, index: int) -> Item:
        """Question ``index``; relevant are the pixels of the shape."""
        question, answer, number = self._rows[index]
        image = decode_picture(files("easy_vqa").joinpath("data", self._folder, "images", f"{number}.png").read_bytes())
        return Item(
            id=f"{self._folder}-{number}-{index}",
            image=image,
            turns=((question, answer),),
            group=_group(answer),
            relevant=(np.asarray(image).min(axis=-1) < _LIGHT).astype(np.float32),
        )
