"""The curves of a report's page as numbers that its template draws: retention against tokens, a panel a group."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .record import MEAN, select
from .scores import NONE, is_diagnostic
from .sight import unseen
from .tables import methods_of

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 270, 190, 32, 258, 28, 168
HIGHEST = 110.0
"""Percent at the top of a panel; intervals beyond are cut there."""


@dataclass(frozen=True)
class Curve:
    """One method: its place among them, and points (x, y, low, high) in pixels; the ends of an interval may be None."""

    pruner: str
    number: int
    diagnostic: bool
    points: list[tuple[float, float, float | None, float | None]]


@dataclass(frozen=True)
class Panel:
    """One group; all places in pixels, y downwards."""

    title: str
    curves: list[Curve]
    x_ticks: list[tuple[float, str]]
    full: float
    floor: float | None
    y_ticks: tuple[tuple[float, str], ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = RIGHT
    bottom: int = BOTTOM


def panels_of(record: Mapping[str, Any]) -> list[Panel]:
    """A panel for the mean and one for each group that has a retention; ticks where the first method was measured."""
    pruners = methods_of(record)
    tokens = sorted({row["tokens"] for row in record["rows"] if row["pruner"] in pruners})
    low, high = math.log(tokens[0]), math.log(tokens[-1])

    def x(value: float) -> float:
        share = (math.log(value) - low) / (high - low) if high > low else 0.5
        return round(LEFT + 12 + share * (RIGHT - LEFT - 24), 1)

    def y(value: float) -> float:
        return round(BOTTOM - min(max(value, 0.0), HIGHEST) / HIGHEST * (BOTTOM - TOP), 1)

    def maybe_y(value: float | None) -> float | None:
        return None if value is None else y(value)

    ticks: list[tuple[float, str]] = []
    measured = {row["tokens"] for row in select(record, pruner=pruners[0], group=MEAN)}
    for value in sorted(measured):  # as many as can be read
        if not ticks or x(value) - ticks[-1][0] > 18:
            ticks.append((x(value), f"{value:.0f}"))
    panels = []
    for group in (name for name in (MEAN, *record["groups"]) if name not in unseen(record)):
        curves = []
        for number, pruner in enumerate(pruners):
            rows = [row for row in select(record, pruner=pruner, group=group) if row["retention"] is not None]
            points = [
                (x(row["tokens"]), y(row["retention"]), maybe_y(row["ci"][0]), maybe_y(row["ci"][1]))
                for row in sorted(rows, key=lambda row: row["tokens"])
            ]
            curves.append(Curve(pruner, number, is_diagnostic(pruner), points))
        (none,) = select(record, pruner=NONE, group=group)
        title = "mean over groups" if group == MEAN else group
        y_ticks = tuple((y(value), str(value)) for value in (0, 25, 50, 75, 100))
        # the first is drawn last, on top
        panels.append(Panel(title, curves[::-1], ticks, y(100.0), maybe_y(none["retention"]), y_ticks))
    return panels
