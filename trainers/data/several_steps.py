"""Suite scenes-steps: what a robot's policy sees, step by step: nearly equal pictures, and a goal that moves.

An episode has six steps. A hand (a white cross) goes towards a goal, which drifts in a straight line; two other things
stand still. At each step the prompt shows the last four pictures, and asks for the action: which way from the hand to
the goal, along the longer side, or which way the goal goes. The hand takes the first of these actions at every step,
so the pictures of a step follow from those before.

Item i is step i % 6 of episode i // 6, so an episode's items follow one another; `Item.stream` names the episode, for
methods that remember.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

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
    scatter,
    some,
)
from .suite import Item, Suite, register_suite

GROUPS = ("reach", "chase")
STEPS = 6
SEEN = 4  # pictures of a step
WORDS = (*WAYS, *"which way to the does go ?".split())
_DRIFT, _REACH = 3, 2  # pixels a step, of goal and hand
_APART = 4  # pixels by which the way to the goal is longer along one side than along the other, at least
_CLOSE = 12  # pixels along the longer side, at least


@dataclass(frozen=True)
class Episode:
    """What is where, picture by picture."""

    hands: list[Piece]
    goals: list[Piece]
    others: list[Piece]
    way: str  # the goal's

    def action(self, last: int) -> str:
        """Which way from the hand to the goal in a picture; empty where that is not clear."""
        return way_from(self.hands[last], self.goals[last])

    def pictures(self, rng: np.random.Generator, split: str) -> list[Image.Image]:
        """All of them."""
        behind = background(rng, split)
        shown = zip(self.hands, self.goals, strict=True)
        return [draw([*self.others, goal, hand], behind, rng) for hand, goal in shown]

    def question(self, group: str) -> str:
        """As it is asked at every step."""
        goal = f"{self.goals[0].color} {self.goals[0].shape}"
        return f"which way to the {goal} ?" if group == "reach" else f"which way does the {goal} go ?"

    def answer(self, group: str, step: int) -> str:
        """At a step."""
        action = self.action(step + SEEN - 1) if group == "reach" else self.way
        assert action  # `make_episode` sees to it
        return action

    def relevant(self, group: str, step: int) -> np.ndarray:
        """(4, 48, 48) float32: hand and goal as they are now, or the goal in all pictures, most in the outer ones."""
        value = [about([goal], 1 + (number in (0, SEEN - 1)))
                 for number, goal in enumerate(self.goals[step : step + SEEN])]  # fmt: skip
        if group == "reach":
            value = [np.zeros_like(value[0])] * (SEEN - 1)
            value.append(about([self.goals[step + SEEN - 1], self.hands[step + SEEN - 1]]))
        return np.stack(value)


def way_from(hand: Piece, goal: Piece) -> str:
    """The way along the longer side; empty where the two are as long, or where it is short."""
    x, y = goal.x - hand.x, goal.y - hand.y
    if abs(abs(x) - abs(y)) < _APART or max(abs(x), abs(y)) < _CLOSE:
        return ""
    if abs(x) > abs(y):
        return "left" if x < 0 else "right"
    return "up" if y < 0 else "down"


def make_episode(rng: np.random.Generator) -> Episode:
    """One in which every action is clear."""
    colors, shapes = some(rng, tuple(COLORS), 3, but=["white"]), some(rng, SHAPES, 3, but=["cross"])
    hand = new_piece(rng, "white", "cross")
    goal, *others = (new_piece(rng, *look) for look in zip(colors, shapes, strict=True))
    while True:
        way = str(rng.choice(list(WAYS)))
        episode = Episode([], [], [], way)
        steps = _DRIFT * np.outer(np.arange(STEPS + SEEN - 1), WAYS[way])
        start = rng.integers(EDGE - steps.min(0), SIDE - EDGE - steps.max(0) + 1)
        episode.goals.extend(goal.at(int(x), int(y)) for x, y in start + steps)
        x, y = (int(place) for place in rng.integers(EDGE, SIDE - EDGE + 1, 2))
        for picture in range(len(steps)):
            episode.hands.append(hand.at(x, y))
            action = episode.action(picture)
            if not action or not episode.hands[-1].clear_of(episode.goals[picture]):
                break
            x, y = x + _REACH * WAYS[action][0], y + _REACH * WAYS[action][1]
        else:
            for _ in range(20):
                placed = scatter(rng, others)
                if all(goal.clear_of(piece) for goal in episode.goals for piece in placed):
                    episode.others.extend(placed)
                    return episode


@register_suite("scenes-steps")
class ScenesSteps(Suite):
    """Steps of an episode follow one another; groups take turns by episode."""

    groups = GROUPS
    chance = {group: 1 / len(WAYS) for group in GROUPS}
    streams = True

    def size(self) -> int:
        """Number of items in the split; train is as good as endless."""
        return SIZES[self.split]

    def item(self, index: int) -> Item:
        """Make item ``index``, and with it its episode."""
        number, step = divmod(index, STEPS)
        rng = np.random.default_rng((SEEDS[self.split], number, 3))
        group = GROUPS[number % len(GROUPS)]
        episode = make_episode(rng)
        first, *others = episode.pictures(rng, self.split)[step : step + SEEN]
        return Item(
            f"{self.split}-{number}-{step}",
            first,
            ((episode.question(group), episode.answer(group, step)),),
            group,
            episode.relevant(group, step),
            more=tuple((0, picture) for picture in others),
            stream=f"{self.split}-{number}",
        )
