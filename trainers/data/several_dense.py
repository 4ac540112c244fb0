"""Questions about several pictures for training `tiny-llava-multi`: many in one sequence, on tokens of a frozen tower.

The tower is not trained, so a bank of pictures is encoded once. Sequences are made of it anew at every step: which
patches are left, what is asked, and in-context examples, which are put together out of single pictures.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from . import several_icl, several_steps, several_video
from .scenes_dense import encode_dialogue
from .scenes_render import COLORS
from .several_icl import Example, Rule
from .several_render import PATCH, SHAPES, SIDE, Piece, background, draw, new_piece, scatter, some
from .several_steps import SEEN, STEPS, Episode, make_episode
from .several_video import COUNTS, FRAMES, Clip, coming, moving

GROUPS = (*several_icl.GROUPS, *several_video.GROUPS, several_video.COUNTING, *several_steps.GROUPS)
SCENES = ("icl", "moving", "staying", "steps", "coming")
"""Kinds of scenes: single pictures; clips of things that move, or stand still for two frames; episodes; clips of things
that are there for one frame.
"""
CLIPS = ("moving", "staying", "coming")
KINDS = ("icl-2", "icl-4", *SCENES[1:])
"""Kinds of sequences."""
GRID = SIDE // PATCH
PATCHES = GRID * GRID
QUERIES = 5
"""In-context questions behind the same examples."""
_SEED = 5  # apart from the seeds of the suites' own splits
_OPENING = ("<s>", "<user>")


def covered(piece: Piece) -> np.ndarray:
    """(36,) float: how much of each patch a thing covers, 2 where its centre is."""
    edges = np.arange(GRID) * PATCH

    def along(middle: int) -> np.ndarray:
        low, high = middle - piece.across / 2, middle + piece.across / 2
        return np.clip(np.minimum(edges + PATCH, high) - np.maximum(edges, low), 0, PATCH) / PATCH

    share = np.outer(along(piece.y), along(piece.x))
    share[min(piece.y // PATCH, GRID - 1), min(piece.x // PATCH, GRID - 1)] = 2
    return share.reshape(-1)


@dataclass(frozen=True)
class Query:
    """A question, and how much it is about each patch of the sequence's pictures and of its own."""

    group: str
    turns: tuple[tuple[str, str], ...]
    wanted: dict[int, np.ndarray]  # (36,) by picture
    picture: int | None = None  # its own, which no other question sees
    value: str = ""  # the colour or shape that is to be found on the way to the answer


class Sequencer:
    """Lays pictures and questions out as one row; questions see what is shared and themselves, not one another.

    Args:
        word_ids: token id of each word and special token.
        rng: what is left of pictures, and who is blind to what, is drawn from it.
        keep: patches left of each picture.
        firsts: (P, 36) of the bank: what is left first.
        most_hidden: highest share of patches beside the point that a question may not see.
    """

    def __init__(
        self, word_ids: dict[str, int], rng: np.random.Generator, keep: int, firsts: np.ndarray, most_hidden: float
    ) -> None:
        self.word_ids, self.rng, self.keep, self.firsts, self.most_hidden = word_ids, rng, keep, firsts, most_hidden
        self.columns: list[tuple[int, ...]] = []  # id, target, segment, place, group, value
        self.shown: list[tuple[int, int]] = []  # picture and patch of each column, -1 for words
        self.places = {0: 0}
        self.queries: list[Query] = []

    def picture(self, number: int, segment: int = 0, group: int = -1) -> None:
        """Some patches of a picture."""
        first = self.firsts[number] + self.rng.random(PATCHES)
        left = np.sort(np.argsort(-first, kind="stable")[: self.keep])
        begin = self._begin(segment)
        for patch in left.tolist():
            self.columns.append((self.word_ids["<image>"], -100, segment, begin + patch, group, -100))
            self.shown.append((number, patch))
        self.places[segment] = begin + PATCHES

    def words(
        self, tokens: Sequence[int], targets: Sequence[int], segment: int = 0, group: int = -1, values: Any = None
    ) -> None:
        """Words, one behind the other."""
        begin, values = self._begin(segment), values or [-100] * len(tokens)
        for number, (token, target, value) in enumerate(zip(tokens, targets, values, strict=True)):
            self.columns.append((token, target, segment, begin + number, group, value))
            self.shown.append((-1, -1))
        self.places[segment] = begin + len(tokens)

    def open(self) -> None:
        """What comes before the first picture."""
        ids = [self.word_ids[word] for word in _OPENING]
        self.words(ids, [-100] * len(ids))

    def turn(self, question: str, answer: str, value: str) -> None:
        """A worked example, behind its picture; and what opens the next turn. At the answer its value is known."""
        tokens, _ = encode_dialogue(((question, answer),), self.word_ids)
        values = [-100] * (len(tokens) - 2) + [self.word_ids[value], -100, -100]
        tokens.append(self.word_ids["<user>"])
        self.words(tokens, [-100] * len(tokens), values=values)

    def ask(self, query: Query) -> None:
        """A question of its own segment."""
        self.queries.append(query)
        segment, group = len(self.queries), GROUPS.index(query.group)
        if query.picture is not None:
            self.picture(query.picture, segment, group)
        tokens, answered = encode_dialogue(query.turns, self.word_ids)
        targets = [token if said else -100 for token, said in zip(tokens, answered, strict=True)]
        values = [-100] * len(tokens)
        if query.value:  # before the answer
            values[answered.index(True) - 1] = self.word_ids[query.value]
        self.words(tokens, targets, segment, group, values)

    def hidden(self, most: int) -> np.ndarray:
        """(most + 1, L) bool: the columns that each segment may not see."""
        length = len(self.columns)
        out = np.zeros((most + 1, length), bool)
        pictures = np.array([picture for picture, _ in self.shown])
        patches = np.array([patch for _, patch in self.shown])
        for number, query in enumerate(self.queries, 1):
            rate = self.most_hidden * self.rng.random() if self.rng.random() < 0.5 else 0.0
            out[number] = (self.rng.random(length) < rate) & (pictures >= 0)
            for picture, value in query.wanted.items():
                own = pictures == picture
                out[number, own] &= value[patches[own]] < 0.15
        return out

    def _begin(self, segment: int) -> int:
        return self.places.setdefault(segment, self.places[0])


@dataclass
class Bank:
    """Scenes of all kinds, and their pictures.

    Attributes:
        singles: numbers of pictures of two things, with these.
        clips: first picture and contents of clips, by kind.
        episodes: first picture and contents.
        firsts: (P, 36) float32: what of each picture is left first.
    """

    singles: list[tuple[int, list[Piece]]] = field(default_factory=list)
    clips: dict[str, list[tuple[int, Clip]]] = field(default_factory=lambda: {kind: [] for kind in CLIPS})
    episodes: list[tuple[int, Episode]] = field(default_factory=list)
    firsts: list[np.ndarray] = field(default_factory=list)

    def add(self, shown: Sequence[Sequence[Piece]]) -> int:
        """Pictures of these things; the number of the first."""
        for pieces in shown:
            self.firsts.append(np.max([covered(piece) for piece in pieces], axis=0) if pieces else np.zeros(PATCHES))
        return len(self.firsts) - len(shown)


def fill(bank: Bank, kind: str, number: int, split: str, apart: int = 0) -> list[Image.Image]:
    """Add a scene to a bank; its pictures.

    Args:
        bank: grows.
        kind: of SCENES.
        number: of the scene.
        split: whose photographs.
        apart: other scenes for another one.
    """
    rng = np.random.default_rng((_SEED, apart, SCENES.index(kind), number))
    if kind == "icl":
        looks = zip(some(rng, tuple(COLORS), 2), some(rng, SHAPES, 2), strict=True)
        pieces = scatter(rng, [new_piece(rng, *look) for look in looks])
        bank.singles.append((bank.add([pieces]), pieces))
        return [draw(pieces, background(rng, split), rng)]
    if kind == "steps":
        episode = make_episode(rng)
        shown = [[*episode.others, goal, hand] for hand, goal in zip(episode.hands, episode.goals, strict=True)]
        bank.episodes.append((bank.add(shown), episode))
        return episode.pictures(rng, split)
    counts = (1 + number % len(COUNTS), 1 + number // len(COUNTS) % len(COUNTS))
    clip = moving(rng) if kind == "moving" else coming(rng, counts, life=2 if kind == "staying" else 1)
    shown = [[piece for track in clip.tracks for piece in track.at(frame)] for frame in range(clip.frames)]
    bank.clips[kind].append((bank.add(shown), clip))
    return clip.pictures(rng, split)


class DenseSeveral(Dataset[dict[str, Any]]):
    """Each item is a whole batch of sequences of one kind, so that little is padded.

    Args:
        bank: scenes.
        tokens: (P, 36, D) what the tower says of the bank's pictures.
        word_ids: token id of each word and special token.
        batches: how many.
        batch_size: sequences of each.
        shares: how often a kind of KINDS is drawn.
        keep: patches left of each picture of a batch, and how often.
        start: number of the first batch.
        most_hidden: see Sequencer.
    """

    def __init__(
        self, bank: Bank, tokens: Tensor, word_ids: dict[str, int], batches: int, batch_size: int,
        shares: dict[str, float], keep: dict[int, float], start: int = 0, most_hidden: float = 0.9,
    ) -> None:  # fmt: skip
        self.bank, self.tokens, self.word_ids, self.batches, self.batch_size = (
            bank,
            tokens,
            word_ids,
            batches,
            batch_size,
        )
        self.shares, self.keep, self.start, self.most_hidden = shares, keep, start, most_hidden
        self.firsts = np.stack(bank.firsts)
        self.by_look: dict[tuple[str, str], list[tuple[int, int]]] = {}
        for place, (_, pieces) in enumerate(bank.singles):
            for which, piece in enumerate(pieces):
                self.by_look.setdefault(("color", piece.color), []).append((place, which))
                self.by_look.setdefault(("shape", piece.shape), []).append((place, which))
        self.makers: dict[str, Callable[[Sequencer, np.random.Generator], None]] = {
            "icl-2": lambda row, rng: self._icl(row, rng, 2),
            "icl-4": lambda row, rng: self._icl(row, rng, 4),
            "moving": self._moving,
            "staying": lambda row, rng: self._coming(row, rng, "staying"),
            "steps": self._steps,
            "coming": lambda row, rng: self._coming(row, rng, "coming"),
        }

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng((_SEED, 9, self.start + index))
        kind, keep = _draw(rng, self.shares), _draw(rng, self.keep)
        rows = []
        for _ in range(self.batch_size):
            row = Sequencer(self.word_ids, rng, keep, self.firsts, self.most_hidden)
            self.makers[kind](row, rng)
            rows.append(row)
        return self._batch(rows)

    def _icl(self, row: Sequencer, rng: np.random.Generator, count: int) -> None:
        named = "color" if rng.random() < 0.5 else "shape"
        rule = Rule(f"{named}-{count}", rng)
        row.open()
        examples = {}
        for value in rule.words:
            number, example = self._example(rule, value, rng)
            row.picture(number)
            row.turn(example.question, example.answer, value)
            examples[number] = covered(example.pieces[0])
        for _ in range(QUERIES):
            value = some(rng, tuple(rule.words), 1)[0]
            number, example = self._example(rule, value, rng)
            wanted = {**examples, number: covered(example.pieces[0])}
            row.ask(Query(f"{named}-{count}", ((example.question, example.answer),), wanted, number, value))

    def _example(self, rule: Rule, value: str, rng: np.random.Generator) -> tuple[int, Example]:
        """A picture of the bank with such a thing, and the question about it."""
        found = self.by_look[rule.named, value]
        place, which = found[int(rng.integers(len(found)))]
        number, pieces = self.bank.singles[place]
        return number, rule.about(pieces[which], pieces[1 - which])

    def _moving(self, row: Sequencer, rng: np.random.Generator) -> None:
        first, clip = _pick(rng, self.bank.clips["moving"])
        questions = [clip.first(), clip.end(), *(clip.move(track) for track in clip.tracks if track.way)]
        self._clip(row, first, clip, questions)

    def _coming(self, row: Sequencer, rng: np.random.Generator, kind: str) -> None:
        first, clip = _pick(rng, self.bank.clips[kind])
        self._clip(row, first, clip, [clip.count(color) for color in dict.fromkeys(t.look.color for t in clip.tracks)])

    @staticmethod
    def _clip(row: Sequencer, first: int, clip: Clip, questions: list[several_video.Question]) -> None:
        row.open()
        for frame in range(FRAMES):
            row.picture(first + frame)
        for question in questions:
            wanted = {
                first + frame: np.max([np.zeros(PATCHES), *(covered(piece) for track, _ in question.wanted
                                                          for piece in track.at(frame))], axis=0)
                for frame in range(FRAMES)
            }  # fmt: skip
            row.ask(Query(question.group, ((question.text, question.answer),), wanted))

    def _steps(self, row: Sequencer, rng: np.random.Generator) -> None:
        first, episode = _pick(rng, self.bank.episodes)
        step = int(rng.integers(STEPS))
        row.open()
        for picture in range(step, step + SEEN):
            row.picture(first + picture)
        last = step + SEEN - 1
        hand = covered(episode.hands[last])
        reached = {first + last: np.maximum(hand, covered(episode.goals[last]))}
        row.ask(Query("reach", ((episode.question("reach"), episode.answer("reach", step)),), reached))
        followed = {first + p: covered(episode.goals[p]) for p in range(step, step + SEEN)}
        row.ask(Query("chase", ((episode.question("chase"), episode.answer("chase", step)),), followed))
        for other in episode.others:  # they stand still, and ask for the way as well as a goal does
            answer = several_steps.way_from(episode.hands[last], other)
            if answer:
                text = f"which way to the {other.color} {other.shape} ?"
                row.ask(Query("reach", ((text, answer),), {first + last: np.maximum(hand, covered(other))}))

    def _batch(self, rows: list[Sequencer]) -> dict[str, Any]:
        """Rows padded to the longest: ``ids`` and others (B, L), ``hidden`` (B, most questions + 1, L), ``picture`` and
        ``patch`` (B, L), -1 for words, ``tokens`` (B, L, D), 0 for words.
        """
        most, length = max(len(row.queries) for row in rows), max(len(row.columns) for row in rows)
        columns = np.tile(np.array([self.word_ids["<pad>"], -100, -1, 0, -1, -100]), (len(rows), length, 1))
        shown = np.full((len(rows), length, 2), -1)
        hidden = np.zeros((len(rows), most + 1, length), bool)
        for number, row in enumerate(rows):
            columns[number, : len(row.columns)] = row.columns
            shown[number, : len(row.columns)] = row.shown
            hidden[number, :, : len(row.columns)] = row.hidden(most)
        ids, targets, segment, place, group, values = np.moveaxis(columns, -1, 0).copy()
        tokens = self.tokens[shown[..., 0], shown[..., 1]]
        return {"ids": ids, "targets": targets, "segment": segment, "place": place, "group": group, "values": values,
                "hidden": hidden, "tokens": tokens}  # fmt: skip


def _pick(rng: np.random.Generator, choices: Sequence[Any]) -> Any:
    return choices[int(rng.integers(len(choices)))]


def _draw(rng: np.random.Generator, shares: dict[Any, float]) -> Any:
    """A key, as often as its share says."""
    chance = np.array(list(shares.values()))
    return list(shares)[int(rng.choice(len(chance), p=chance / chance.sum()))]
