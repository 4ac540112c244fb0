"""Is a frozen model with a suite a good instrument for measuring pruners? Five bars, each with what was measured.

An instrument is good where the model can answer (full), cannot answer without looking (none), needs the right tokens
(random), has the answer in few of them (oracle), and does not give them away by its own attention (attention).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .record import MEAN, select
from .scores import ALL_TOKENS, FULL, NO_TOKENS, NONE, ORACLE, RELEVANCE, is_diagnostic

BUDGETS = ("1/9", "1/18")
"""The budgets that the bars speak of."""
FULL_BAR = 0.90
FULL_BAR_OF = {"counting": 0.85, "relation": 0.85}
"""Least accuracy with all tokens, and the groups that have a bar of their own."""
BARS_OF = {"pages": {"full": 0.85, "fall": 20.0, "room": 5.0}, "several": {"full": 0.85}}
"""What a suite asks for otherwise: least accuracy of every group, RANDOM_FALL, ATTENTION_ROOM."""
ABOVE_CHANCE = 0.10
"""Most that zero tokens may lie above chance, in any group."""
RANDOM_FALL = 15.0
"""Least fall of the mean accuracy at 1/9 random tokens, in points."""
ORACLE_GAP = 2.0
"""Most that the oracle at 1/9 may lie below full, in points of mean accuracy."""
ATTENTION_ROOM = 3.0
"""Least distance of the best attention score below the oracle at 1/18, in points of mean accuracy."""


@dataclass(frozen=True)
class Verdict:
    """One bar: what is asked, what was measured, whether it holds."""

    bar: str
    measured: str
    passed: bool


def judge(record: Mapping[str, Any]) -> list[Verdict]:
    """Hold a record measured with `--instrument` against the five bars."""
    chance = record["chance"]
    full = _accuracies(record, FULL, ALL_TOKENS)
    none = _accuracies(record, NONE, NO_TOKENS)
    own = BARS_OF.get(str(record.get("suite")), {})
    least_fall, least_room = own.get("fall", RANDOM_FALL), own.get("room", ATTENTION_ROOM)
    verdicts = []
    for group in record["groups"]:
        bar = own.get("full", FULL_BAR_OF.get(group, FULL_BAR))
        verdicts.append(Verdict(f"full, {group}: at least {bar:.0%}", f"{full[group]:.1%}", full[group] >= bar))
    for group in record["groups"]:
        if chance[group] is not None:
            bar = chance[group] + ABOVE_CHANCE
            verdicts.append(
                Verdict(f"zero tokens, {group}: at most {bar:.1%}", f"{none[group]:.1%}", none[group] <= bar)
            )
    ninth, eighteenth = BUDGETS
    fall = 100 * (full[MEAN] - _accuracies(record, "random", ninth)[MEAN])
    verdicts.append(
        Verdict(f"random at {ninth}: mean falls by at least {least_fall:g} points", f"{fall:.1f}", fall >= least_fall)
    )
    gap = 100 * (full[MEAN] - _accuracies(record, ORACLE, ninth)[MEAN])
    verdicts.append(
        Verdict(f"oracle at {ninth}: within {ORACLE_GAP:g} points of full", f"{gap:.1f} below", gap <= ORACLE_GAP)
    )
    attention = {
        row["pruner"]: row["accuracy"]
        for row in select(record, keep=eighteenth, group=MEAN)
        if is_diagnostic(row["pruner"]) and row["pruner"] not in (ORACLE, RELEVANCE)
    }
    best = max(attention, key=lambda name: attention[name])
    room = 100 * (_accuracies(record, ORACLE, eighteenth)[MEAN] - attention[best])
    verdicts.append(
        Verdict(
            f"best attention score at {eighteenth}: at least {least_room:g} points below the oracle",
            f"{best} is {room:.1f} below",
            room >= least_room,
        )
    )
    return verdicts


def _accuracies(record: Mapping[str, Any], pruner: str, keep: str) -> dict[str, float]:
    """Accuracy by group, the mean included."""
    return {row["group"]: row["accuracy"] for row in select(record, pruner=pruner, keep=keep)}
