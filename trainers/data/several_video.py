"""Suite scenes-video: a clip of 8 frames in which things come, move and go; what is asked is when and how.

A clip shows three things of different colours that come one after the other, move by 12 to 18 pixels in a straight line
or stand still, and go, but for one that is there at the end.

Groups: which colour came first, which is there at the end, which way a thing moved. How many things of a colour came,
in clips of things that stand still for a frame each, is asked in training alone: `tiny-llava-multi` has not learnt it.
Frames are pictures of one prompt, before the question. The background stands still, but for the camera's noise.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from prunezoo.core.errors import PruneZooError

from .scenes_render import COLORS
from .several_render import (
    EDGE,
    SEEDS,
    SHAPES,
    SIDE,
    SIZES,
    WAYS,
    Piece,
    about,
    background,
    draw,
    new_piece,
    some,
)
from .suite import Item, Suite, register_suite

GROUPS = ("first", "end", "move")
COUNTING = "count"
COUNTS = ("1", "2", "3", "4")
FRAMES = 8
WORDS = (
    *WAYS,
    *COUNTS,
    *"what color came first is there at the end which way did move how many objects came ?".split(),
)


@dataclass(frozen=True)
class Track:
    """A thing in the frames in which it is there."""

    start: int
    places: tuple[Piece, ...]  # in each of them
    way: str = ""  # of WAYS, for one that moves

    @property
    def stop(self) -> int:
        """The first frame in which it is there no more."""
        return self.start + len(self.places)

    @property
    def look(self) -> Piece:
        """The thing, at its first place."""
        return self.places[0]

    def at(self, frame: int) -> list[Piece]:
        """The thing as it is in a frame, if it is there."""
        return [self.places[frame - self.start]] if self.start <= frame < self.stop else []

    def clear_of(self, other: "Track") -> bool:
        """Whether the two never touch."""
        frames = range(max(self.start, other.start), min(self.stop, other.stop))
        return all(self.at(frame)[0].clear_of(other.at(frame)[0]) for frame in frames)


@dataclass(frozen=True)
class Question:
    """A question about a clip, and what it is about: how much each thing matters in each frame."""

    group: str
    text: str
    answer: str
    wanted: tuple[tuple[Track, Callable[[int], float]], ...]


class Clip:
    """What happens in a clip.

    Args:
        tracks: of its things.
        frames: F, how many.
    """

    def __init__(self, tracks: list[Track], frames: int) -> None:
        self.tracks, self.frames = tracks, frames

    def pictures(self, rng: np.random.Generator, split: str) -> list[Image.Image]:
        """The F frames."""
        behind = background(rng, split)
        shown = [[piece for track in self.tracks for piece in track.at(frame)] for frame in range(self.frames)]
        return [draw(pieces, behind, rng) for pieces in shown]

    def relevant(self, question: Question) -> np.ndarray:
        """(F, 48, 48) float32."""
        frames = range(self.frames)
        maps = [[about(track.at(frame), weight(frame)) for track, weight in question.wanted] for frame in frames]
        return np.stack([np.max(of, axis=0) for of in maps])

    def first(self) -> Question:
        """Which colour came first."""
        track = min(self.tracks, key=lambda track: track.start)
        return Question("first", "what color came first ?", track.look.color, ((track, lambda frame: 8.0 - frame),))

    def end(self) -> Question:
        """Which colour is there at the end."""
        (track,) = (track for track in self.tracks if track.stop == self.frames)
        wanted = ((track, lambda frame: 1.0 + frame),)
        return Question("end", "what color is there at the end ?", track.look.color, wanted)

    def move(self, track: Track) -> Question:
        """Which way a thing moved."""
        text = f"which way did the {track.look.color} {track.look.shape} move ?"
        return Question("move", text, track.way, ((track, lambda frame: self._from_middle(track, frame)),))

    def count(self, color: str) -> Question:
        """How many things of a colour came."""
        tracks = [track for track in self.tracks if track.look.color == color]
        wanted = tuple((track, lambda frame: 1.0) for track in tracks)
        return Question(COUNTING, f"how many {color} objects came ?", str(len(tracks)), wanted)

    @staticmethod
    def _from_middle(track: Track, frame: int) -> float:
        """The first and the last place of a thing tell most."""
        return 1 + abs(frame - (track.start + track.stop - 1) / 2)


def moving(rng: np.random.Generator, frames: int = FRAMES) -> Clip:
    """Three things of different colours and shapes; the last frame has one of them."""
    looks = list(zip(some(rng, tuple(COLORS), 3), some(rng, SHAPES, 3), strict=True))
    half = frames // 2
    while True:
        starts = rng.permutation(half)[:3]
        left = int(rng.integers(3))
        tracks = []
        for number, (look, start) in enumerate(zip(looks, starts, strict=True)):
            stop = frames if number == left else int(rng.integers(start + half, frames))
            tracks.append(_track(rng, new_piece(rng, *look), int(start), stop))
        if all(a.clear_of(b) for number, a in enumerate(tracks) for b in tracks[:number]):
            return Clip(tracks, frames)


def _track(rng: np.random.Generator, piece: Piece, start: int, stop: int) -> Track:
    """A thing that moves, one in four stands still."""
    way = "" if rng.random() < 0.25 else str(rng.choice(list(WAYS)))
    far = int(rng.integers(12, 19)) if way else 0
    steps = np.outer(np.linspace(0, far, stop - start), WAYS.get(way, (0, 0))).round().astype(int)
    low, high = EDGE - steps.min(0), SIDE - EDGE - steps.max(0)
    places = rng.integers(low, high + 1) + steps
    return Track(start, tuple(piece.at(int(x), int(y)) for x, y in places), way)


def coming(rng: np.random.Generator, counts: tuple[int, int], frames: int = FRAMES, life: int = 0) -> Clip:
    """Things of two colours, so many of each, that are there for ``life`` frames; 0: for an eighth of the clip."""
    life = life or frames // 8
    colors = some(rng, tuple(COLORS), 2)
    shapes = [color for color, count in zip(colors, counts, strict=True) for _ in range(count)]
    while True:
        tracks = []
        for color in shapes:
            piece = new_piece(rng, color, str(rng.choice(SHAPES)))
            x, y = (int(place) for place in rng.integers(EDGE, SIDE - EDGE + 1, 2))
            tracks.append(Track(int(rng.integers(frames - life + 1)), (piece.at(x, y),) * life))
        if all(a.clear_of(b) for number, a in enumerate(tracks) for b in tracks[:number]):
            return Clip(tracks, frames)


def ask(group: str, rng: np.random.Generator, frames: int = FRAMES) -> tuple[Clip, Question]:
    """A clip and a question of a group, or of counting, about it; answers are balanced."""
    if group == COUNTING:
        wanted, other = (int(count) for count in rng.integers(1, len(COUNTS) + 1, 2))
        clip = coming(rng, (wanted, other), frames)
        return clip, clip.count(clip.tracks[0].look.color)
    clip = moving(rng, frames)
    while group == "move" and not any(track.way for track in clip.tracks):
        clip = moving(rng, frames)
    if group == "move":
        movers = [track for track in clip.tracks if track.way]
        return clip, clip.move(movers[int(rng.integers(len(movers)))])
    return clip, clip.first() if group == "first" else clip.end()


@register_suite("scenes-video")
class ScenesVideo(Suite):
    """Item i asks about a clip of its own; groups take turns.

    Args:
        split: train, validation or test.
        limit: only the first so many items.
        frames: of a clip, 8 or 16; what happens is stretched.
    """

    groups = GROUPS
    chance = {"first": 1 / len(COLORS), "end": 1 / len(COLORS), "move": 1 / len(WAYS)}
    clips = True

    def __init__(self, split: str = "test", limit: int | None = None, frames: int | str = FRAMES) -> None:
        super().__init__(split, limit)
        if str(frames) not in ("8", "16"):
            raise PruneZooError(f"suite scenes-video: frames={frames} must be 8 or 16")
        self.frames = int(frames)

    def size(self) -> int:
        """Number of items in the split; train is as good as endless."""
        return SIZES[self.split]

    def item(self, index: int) -> Item:
        """Make item ``index``."""
        rng = np.random.default_rng((SEEDS[self.split], index, 2))
        clip, question = ask(GROUPS[index % len(GROUPS)], rng, self.frames)
        first, *others = clip.pictures(rng, self.split)
        return Item(
            f"{self.split}-{index}",
            first,
            ((question.text, question.answer),),
            question.group,
            clip.relevant(question),
            more=tuple((0, picture) for picture in others),
        )
