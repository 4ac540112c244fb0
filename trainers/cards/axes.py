"""Where a method stands on the axes by which surveys of pruning sort: what goes, by what, when, and for how much time.

Of a method's file only its `criteria` are asked, see `Criterion`; all else follows from what its class does. The time
is that of `hub_cards/speed.json`.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from prunezoo.core.contract import Pruner
from prunezoo.core.errors import PruneZooError
from prunezoo.core.files import read_object
from prunezoo.core.registry import pruner_class
from trainers.benchmarking.tables import settings_of
from trainers.cli.names import has_weights

from .about import stage_of
from .parts import CARDS, SPEED_FILE

KEEP = "1/9"
"""The budget whose time is shown."""
UNKNOWN = "–"
NOTE = (
    "All are structured: whole tokens leave, so that sequences get shorter, and no weight of the frozen model goes. "
    "Data: whether the method has to see any before it is used; optional: to search its options. Count: exactly what "
    "is asked for, or its own. Time: end to end, the bare model over the pruned one at "
    f"{KEEP}, median and interquartile range, from hub_cards/{SPEED_FILE}; a dash: not measured."
)


def axes(method: str) -> dict[str, str]:
    """A method on every axis, by the axis's name, with its default options.

    Args:
        method: A registered name.
    """
    cls = pruner_class(method)
    trained = has_weights(method)
    return {
        "criterion": ", ".join(cls.criteria) or UNKNOWN,
        "acts": stage_of(cls),
        "leaves": _leaves(cls),
        "data": "training" if trained else "optional" if _searches(cls) else "none",
        "made": "trained" if trained else "one-shot",
        "prompt": _reads_prompt(cls),
        "count": "exact" if cls.exact else "own",
        "time": _time(method),
    }


def markdown(found: dict[str, str]) -> str:
    """One method's axes as a table of two lines."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (list(found), ["---"] * len(found), list(found.values())))


def lines_of(methods: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of several methods."""
    found = {method: axes(method) for method in methods}
    header = ["method", *next(iter(found.values()), {})]
    return header, [[method, *own.values()] for method, own in found.items()]


def by_default(cls: type[Pruner]) -> Pruner | None:
    """An instance with default options and weights without memory, to look at; None: its config has no default."""
    try:
        with torch.device("meta"):
            return cls()
    except PruneZooError:
        return None


def _leaves(cls: type[Pruner]) -> str:
    """For how long tokens leave."""
    if cls.restore:
        return "in the tower"
    return "for some layers" if cls.comes_back else "for good"


def _searches(cls: type[Pruner]) -> bool:
    """Whether there are options that are to be searched for a model, on its data."""
    return cls.search_space.__func__ is not Pruner.search_space.__func__  # type: ignore[attr-defined]


def _reads_prompt(cls: type[Pruner]) -> str:
    pruner = by_default(cls)
    return "its parts" if pruner is None else "read" if pruner.reads_prompt else "no"


def _time(method: str) -> str:
    for _, cases in settings_of(_speed()["rows"]):
        row = cases.get((method, KEEP), {}).get("end_to_end")
        if row is not None:
            return f"{row['speedup']:.2f} ({row['speedup_spread']:.2f})"
    return UNKNOWN


@cache
def _speed() -> dict[str, Any]:
    remedy = "write it with `python -m trainers.benchmark … --json`"
    return read_object(CARDS / SPEED_FILE, "rows", what="a measurement of speed", remedy=remedy)
