r"""Suites of somebody's own questions: `llava-json FILE` and `hub-dataset ID`.

    python -m trainers.evaluate … --suite llava-json questions.json --suite-option images=pictures scorer=exact
    python -m trainers.evaluate … --suite hub-dataset ORG/NAME --suite-option rows=val answer=answers scorer=vqa

A row asks one question (fields `question` and `answer`, whatever they are called) or holds a conversation, of which
each answer is asked for. The model writes its answers, in batches, and a scorer judges them (`scorers.py`).
"""

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prunezoo.core.base_model import public_name
from prunezoo.core.errors import PruneZooError

from .hub_dataset import HubDataset
from .llava_json import LlavaJson
from .scorers import LETTERS, chosen, find_scorer, plain
from .suite import Item, Suite, register_suite
from .talks import PLACEHOLDER, Talks, Turns, Wrong, read_turns, whole_text

MOST_GROUPS = 26
"""Different values of the field that makes the groups; a table with more columns than letters is read by nobody."""
MOST_TOKENS = 4096
"""Of an answer that is written."""


@dataclass(frozen=True)
class Asked:
    """What is noted of a row beside its turns: as Item has it."""

    group: str
    references: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Asking:
    """What a row asks, by the names of its fields.

    Attributes:
        question: of the question's text; None: the row holds a conversation.
        answer: of the answer, or of the list of all that count.
        conversations: of the conversation, LLaVA-style.
        choices: of the list of choices, or of each of them; none: the question offers none.
        group: of what makes the groups; None: there is one, `all`.
        prompt: put behind each question.
    """

    question: str | None
    answer: str
    conversations: str
    choices: tuple[str, ...]
    group: str | None
    prompt: str

    @property
    def fields(self) -> list[str]:
        """The fields that are read."""
        asked = [self.conversations] if self.question is None else [self.question, self.answer, *self.choices]
        return list(dict.fromkeys([*asked, *filter(None, [self.group])]))

    def __call__(self, row: Mapping[str, Any], wrong: Wrong) -> tuple[Turns, int, Asked]:
        """A reader of rows, see `talks.Reader`."""
        group = "all" if self.group is None else text_of(row, self.group, wrong)
        if self.question is None:
            turns, place = read_turns(row.get(self.conversations), wrong)
            return tuple((self._with_prompt(question), answer) for question, answer in turns), place, Asked(group)
        question = text_of(row, self.question, wrong).replace(PLACEHOLDER, "").strip()
        answers = answers_of(row, self.answer, wrong)
        choices = choices_of(row, self.choices, wrong)
        if self.choices:
            answers = tuple(letter_of(answer, row[self.answer], choices, wrong) for answer in answers)
            question = "\n".join([question, *(f"{LETTERS[at]}. {text}" for at, text in enumerate(choices))])
        most = max(answers, key=answers.count)  # what most people said, the first among equals
        return ((self._with_prompt(question), most),), 0, Asked(group, answers, choices)

    def _with_prompt(self, question: str) -> str:
        return f"{question}\n{self.prompt}" if self.prompt else question


def text_of(row: Mapping[str, Any], field: str, wrong: Wrong) -> str:
    """A field's text; a number as it is written."""
    if field not in row:
        raise wrong(f"field '{field}' is missing, there are: {', '.join(map(str, row))}; name yours by --suite-option")
    return as_text(row[field], field, wrong)


def as_text(value: Any, field: str, wrong: Wrong) -> str:
    """A value of a field as a text that is not empty."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise wrong(f"field '{field}' must be a text or a number, not {type(value).__name__}; mend it or drop the row")
    text = whole_text(str(value)).strip()
    if not text:
        raise wrong(f"field '{field}' is empty; fill it or drop the row")
    return text


def answers_of(row: Mapping[str, Any], field: str, wrong: Wrong) -> tuple[str, ...]:
    """All answers of a row: one, a list of them, or a list of objects with the key `answer`, as VQAv2 has it."""
    if not isinstance(row.get(field), list):
        return (text_of(row, field, wrong),)
    values = [value.get("answer") if isinstance(value, dict) else value for value in row[field]]
    if not values:
        raise wrong(f"field '{field}' is an empty list; fill it or drop the row")
    return tuple(as_text(value, field, wrong) for value in values)


def choices_of(row: Mapping[str, Any], fields: Sequence[str], wrong: Wrong) -> tuple[str, ...]:
    """The choices: of one field with a list, or of a field each, of which some may be empty."""
    if not fields:
        return ()
    for field in fields:
        if field not in row:
            text_of(row, field, wrong)  # says which there are
    values = row[fields[0]] if len(fields) == 1 else [row[field] for field in fields]
    if not isinstance(values, list):
        raise wrong(f"field '{fields[0]}' must be a list of choices; name one field each as choices=A,B,C,D")
    there = [value for value in values if value not in (None, "") and value == value]  # NaN is not
    if not 2 <= len(there) <= len(LETTERS):
        raise wrong(f"{len(there)} choices, it must be 2 to {len(LETTERS)}; mend it or drop the row")
    return tuple(as_text(value, fields[0], wrong) for value in there)


def letter_of(answer: str, written: Any, choices: Sequence[str], wrong: Wrong) -> str:
    """The letter of the right choice: from its number counted from 0, its text or its letter."""
    if isinstance(written, int) and 0 <= written < len(choices):
        return LETTERS[written]
    texts = [plain(text) for text in choices]
    if plain(answer) in texts:
        return LETTERS[texts.index(plain(answer))]
    letter = chosen(answer, choices)
    if letter is None:
        raise wrong(f"answer '{answer:.40}' is none of the {len(choices)} choices; mend it or drop the row")
    return letter


class OwnQuestions(Suite):
    """The questions of a source; a subclass opens it.

    Args:
        split: with `validation_share`, that part as a training splits it; else what the rows are called in the record.
        limit: only the first so many items.
        source: file, folder or Hub id.
        question: field of the question; without it, rows hold conversations.
        answer: field of the answer, or of the list of those that count.
        conversations: field of the conversation.
        choices: field of the list of choices, or fields of one each, `A,B,C,D`.
        group: field whose values are reported apart.
        prompt: put behind each question, e.g. "Answer with one word."
        scorer: a name of `scorers.py`; by default `choice` where there are choices, else `exact`.
        new_tokens: longest answer that is written.
        validation_share: share of the pictures that a training held out.
    """

    def __init__(
        self,
        split: str,
        limit: int | None,
        source: str,
        question: str | None = None,
        answer: str = "answer",
        conversations: str = "conversations",
        choices: str = "",
        group: str | None = None,
        prompt: str = "",
        scorer: str | None = None,
        new_tokens: str | int = 16,
        validation_share: str | float | None = None,
    ) -> None:
        super().__init__(split, limit)
        self.name, self.source = f"{type(self).name} {public_name(source)}", source
        offered = tuple(filter(None, choices.split(",")))
        if offered and question is None:
            raise PruneZooError(f"suite {self.name}: choices= belongs to rows with question= and answer=")
        self.scorer = scorer or ("choice" if offered else "exact")
        find_scorer(self.scorer)
        self.new_tokens = whole_number("new_tokens", new_tokens, MOST_TOKENS)
        asking = Asking(question, answer, conversations, offered, group, prompt)
        talks = self.open(asking)
        if validation_share is not None:
            if split == "test":
                raise PruneZooError("validation_share splits into train and validation: name one of them at --split")
            talks = talks.part(split, share_of(validation_share))
        self.talks = talks
        numbers = dict.fromkeys(number for number, _ in talks.places)
        self.groups = tuple(sorted({talks.entries[number].asked.group for number in numbers}))
        if len(self.groups) > MOST_GROUPS:
            raise PruneZooError(
                f"group={asking.group}: {len(self.groups)} values, more than {MOST_GROUPS}; choose a coarser one"
            )
        if "mean" in self.groups:
            raise PruneZooError(f"group={asking.group}: one is called 'mean', as the mean over groups is; rename it")
        texts = hashlib.sha256(repr((asking, self.scorer, self.new_tokens, self.groups)).encode(errors="surrogatepass"))
        for index in range(len(talks)):
            number, _ = talks.places[index]
            texts.update(repr((talks.mark(index), talks.entries[number].asked)).encode(errors="surrogatepass"))
        self.version = texts.hexdigest()[:12]

    @abstractmethod
    def open(self, asking: Asking) -> Talks:
        """The source's conversations, read by this reader."""

    def size(self) -> int:
        """Number of answers that are asked for."""
        return len(self.talks)

    def item(self, index: int) -> Item:
        """One answer; its picture is opened here.

        Raises:
            BrokenImage: it cannot be read.
        """
        asked: Asked = self.talks.entries[self.talks.places[index][0]].asked
        found = self.talks.item(index)
        return replace(found, group=asked.group, references=asked.references, choices=asked.choices)

    def lengths(self, places: Sequence[int]) -> list[int]:
        """Characters of the items' texts."""
        known = self.talks.lengths()
        return [known[place] for place in places]

    def stamp(self, index: int) -> str | None:
        """See Items."""
        return self.talks.stamp(index)

    def fingerprint(self) -> str:
        """Another one whenever a text changes, or, as far as that can be told without opening it, a picture."""
        digest = hashlib.sha256(self.version.encode())
        for index in range(len(self)):
            digest.update(repr(self.talks.stamp(index)).encode(errors="surrogatepass"))
        return digest.hexdigest()


def whole_number(option: str, text: str | int, most: int) -> int:
    """A whole number from 1 to a bound, of a command line."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= most:
        raise PruneZooError(f"{option}={text}: a whole number from 1 to {most}")
    return value


def share_of(text: str | float) -> float:
    """A share of a command line; `Talks.part` says what it must be."""
    try:
        return float(text)
    except ValueError:
        raise PruneZooError(f"validation_share={text}: a number in (0, 1), e.g. 0.01") from None


@register_suite("llava-json")
class LlavaJsonQuestions(OwnQuestions):
    """Questions of a JSON file (a list, or one a line in `.jsonl`), with pictures in a folder.

    Args:
        split: see OwnQuestions.
        limit: only the first so many items.
        source: the file.
        images: the folder; by default the file's.
        image: field of the picture's path.
        common: see OwnQuestions.
    """

    def __init__(
        self,
        split: str = "test",
        limit: int | None = None,
        *,
        source: str,
        images: str | None = None,
        image: str = "image",
        **common: Any,
    ) -> None:
        if not Path(source).is_file():
            raise PruneZooError(f"--suite llava-json {source}: no such file")
        self.images, self.image = Path(images or Path(source).parent), image
        if not self.images.is_dir():
            raise PruneZooError(f"--suite-option images={images}: no such folder")
        super().__init__(split, limit, source, **common)

    def open(self, asking: Asking) -> Talks:
        """The file."""
        return LlavaJson(self.source, self.images, self.image, asking)


@register_suite("hub-dataset")
class HubQuestions(OwnQuestions):
    """Questions of a data set: a Hub id, a folder of `save_to_disk`, or a parquet, arrow or JSON-lines file.

    Args:
        split: which of its splits; with `rows`, see OwnQuestions.
        limit: only the first so many items.
        source: the data set.
        rows: its split, where it is called neither train, validation nor test.
        configuration: which of its configurations.
        image: column of the picture.
        conversations: column of the conversation; without it, rows have a question and an answer.
        question: column of the question.
        common: see OwnQuestions.
    """

    def __init__(
        self,
        split: str = "test",
        limit: int | None = None,
        *,
        source: str,
        rows: str | None = None,
        configuration: str | None = None,
        image: str = "image",
        conversations: str | None = None,
        question: str = "question",
        **common: Any,
    ) -> None:
        self.rows, self.configuration, self.image = rows or split, configuration, image
        asked = {"question": question} if conversations is None else {"conversations": conversations}
        super().__init__(split, limit, source, **asked, **common)

    def open(self, asking: Asking) -> Talks:
        """The data set."""
        return HubDataset(
            self.source, self.rows, self.configuration, {"image": self.image}, asking, asking.fields, "--suite-option"
        )

    def fingerprint(self) -> str:
        """Another one whenever a text or the data set's own fingerprint changes."""
        assert isinstance(self.talks, HubDataset)
        return f"{self.version} {self.talks.table_fingerprint}"
