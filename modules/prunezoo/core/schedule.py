"""Schedules: how many tokens are left by each vision block, or read by each decoder layer, as a thing of its own.

Whatever made it (`DiffRate's` gradient, PreCrop's closed form, a search, a hand), it is a small JSON file, and every
method that acts at several blocks or layers takes it: ``tome?schedule=half.json``. What is taken over is its shape. At
the budget and the picture that it was made for its counts are met exactly; at others each stage does the same part of
the whole reduction, counted in factors (logarithms).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from .bounds import MOST_ENTRIES
from .errors import PruneZooError
from .files import read_json
from .near import near

PLACES = {"vision": "vision blocks", "layer": "decoder layers"}
"""Stages that have several places, and what these are."""
MOST_TOKENS = 1 << 20
"""Of an image."""
MOST_NAME = 200
"""Characters of the word on where it comes from."""


@dataclass(frozen=True)
class Schedule:
    """Counts by place."""

    stage: str  # "vision": counts are what blocks leave; "layer": what layers read
    available: int  # tokens of the image that it was made for
    counts: tuple[int, ...]  # one for each block or layer, from 1 to `available`, never rising
    made_by: str = "hand"  # for people

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.stage not in PLACES:
            raise PruneZooError(f"stage='{self.stage}' of a schedule is unknown{near(self.stage, PLACES)}")
        if not 1 <= self.available <= MOST_TOKENS:
            raise PruneZooError(f"available={self.available} of a schedule is out of range: 1 to {MOST_TOKENS:,}")
        if not 1 <= len(self.counts) <= MOST_ENTRIES:
            raise PruneZooError(f"a schedule has {len(self.counts)} counts: give 1 to {MOST_ENTRIES}, one a place")
        rises = any(one < two for one, two in pairwise((self.available, *self.counts)))
        if rises or self.counts[-1] < 1:
            raise PruneZooError(
                f"counts={list(self.counts)!s:.80} of a schedule must never rise, from at most available="
                f"{self.available} down to at least 1"
            )
        if len(self.made_by) > MOST_NAME:
            raise PruneZooError(f"made_by of a schedule has {len(self.made_by)} characters, more than {MOST_NAME}")

    @classmethod
    def from_dict(cls, values: object, where: str = "") -> Self:
        """From what :meth:`to_dict` gave.

        Raises:
            PruneZooError: Keys or values that are none; the message names ``where``.
        """
        keys = [one.name for one in fields(cls)]
        if not isinstance(values, Mapping) or set(values) != set(keys):
            raise PruneZooError(f"{where}a schedule must be an object of {', '.join(keys)}, and nothing else")
        counts = values["counts"]
        whole = [values["available"], *counts] if isinstance(counts, list | tuple) else [None]
        if any(type(one) is not int for one in whole):
            raise PruneZooError(f"{where}available and the list counts of a schedule must be whole numbers")
        if not isinstance(values["stage"], str) or not isinstance(values["made_by"], str):
            raise PruneZooError(f"{where}stage and made_by of a schedule must be strings")
        try:
            return cls(**{**values, "counts": tuple(counts)})
        except PruneZooError as error:
            raise PruneZooError(f"{where}{error}") from None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "counts": list(self.counts)}

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """From a file that :meth:`save` wrote, or a hand; PruneZooError for what is none."""
        remedy = "give a file that `python -m trainers.schedule` wrote"
        return cls.from_dict(read_json(Path(path), remedy=remedy), f"{path}: ")

    def save(self, path: str | Path) -> Path:
        """Write it."""
        path = Path(path)
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        return path

    def at(self, places: Sequence[int], keep: Tensor, available: Tensor, depth: int) -> list[Tensor]:
        """Tokens left by a method that acts at some of the places, the last of which leaves ``keep``.

        Args:
            places: Blocks or layers, ascending, below ``depth``; several.
            keep: ``(B,)`` long, on the host.
            available: ``(B,)`` long, likewise.
            depth: Blocks or layers that the model has.

        Returns:
            ``(B,)`` long for each place.

        Raises:
            PruneZooError: It is of another number of blocks or layers, or drops nothing up to the last of the places.
        """
        what = PLACES[self.stage]
        if depth != len(self.counts):
            raise PruneZooError(
                f"a schedule of {len(self.counts)} {what} does not fit {depth}: make one for this model"
            )
        if len(places) < 2:
            raise PruneZooError(f"a schedule is for methods that act at several {what}, and this one acts at one")
        whole = math.log(self.available / self.counts[places[-1]])
        if not whole:
            raise PruneZooError(
                f"the schedule drops nothing up to the last of the {what} where the method acts, {places[-1]}: "
                "let it drop earlier"
            )
        share = keep.double() / available.clamp_min(1)
        parts = [math.log(self.available / self.counts[place]) / whole for place in places[:-1]]
        return [torch.maximum((available * share**part).round().long(), keep) for part in parts] + [keep]


def precrop(costs: Sequence[float], budget: float) -> list[float]:
    """Shares of the tokens at places of different cost, in closed form.

    PreCropping (https://arxiv.org/abs/2203.02549) has the densities p of a network's layers maximise sum log p with
    sum cost * p <= budget and p <= 1, whose solution is p = min(1, factor / cost). Tokens do not come back, so here p
    must not rise besides: neighbours that would are pooled, and count with their mean cost. Where all places cost the
    same the shares are even.

    Args:
        costs: Of one place each, for all tokens, in any unit, above 0.
        budget: What they may cost together, in the same unit, above 0.

    Returns:
        Shares in (0, 1], never rising; all 1 where the budget pays for that.

    Raises:
        PruneZooError: A cost or the budget is not above 0.
    """
    if not costs or min(costs) <= 0:
        raise PruneZooError(f"costs={list(costs)!s:.60}: each place must cost more than 0")
    if budget <= 0:
        raise PruneZooError(f"budget={budget}: it must be above 0")
    pools: list[tuple[float, int]] = []  # cost and number of neighbours that have the same share
    for cost in costs:
        pools.append((cost, 1))
        while len(pools) > 1 and pools[-2][0] * pools[-1][1] > pools[-1][0] * pools[-2][1]:  # else the share would rise
            (first, one), (second, two) = pools[-2:]
            pools[-2:] = [(first + second, one + two)]
    means = [cost / number for cost, number in pools for _ in range(number)]
    # Of places by rising mean cost the first few keep all; the others share what is left of the budget evenly.
    for whole in range(len(means) + 1):
        left, rest = budget - sum(costs[:whole]), len(means) - whole
        if not rest or left / rest <= means[whole]:
            break
    return [1.0] * whole + [left / rest / mean for mean in means[whole:]]
