"""Which questions each method answered right, kept in a record so that methods of different runs compare in pairs.

`answers` of a record holds `groups`, a letter for each question: "A" is the first of the record's groups; and `right`,
by pruner and budget, a digit for each question: how many fifths of it are right. Five are all; a method that is a mean
of :data:`RANDOM_SEEDS` seeds has some between. Where a score is no number of fifths, it is a list of scores instead.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunezoo.core.errors import PruneZooError

from .methods import RANDOM_SEEDS
from .same_suite import check_same_suite
from .scores import ALL_TOKENS, FULL, NO_TOKENS, NONE, Key, Measurement
from .statistics import Resampled, resample

Floats = NDArray[np.float64]
EXACT = 1e-9
"""A sum of fifths of seeds may miss the number of fifths by so much."""


def answers_of(measurement: Measurement) -> dict[str, Any]:
    """The field `answers` of a record."""
    right: dict[str, dict[str, str | list[float]]] = {}
    for (pruner, keep), scores in measurement.scores.items():
        right.setdefault(pruner, {})[keep] = written_down(scores.correct)
    groups = "".join(chr(ord("A") + group) for group in measurement.group_of)
    return {"groups": groups, "right": right}


def written_down(scores: Floats) -> str | list[float]:
    """Scores (I,) in [0, 1] as a record holds them."""
    fifths = np.rint(scores * RANDOM_SEEDS)
    if np.abs(scores * RANDOM_SEEDS - fifths).max(initial=0) < EXACT:
        return "".join(map(str, fifths.astype(int)))
    return [round(float(score), 6) for score in scores]


def read_back(written: str | list[float]) -> Floats:
    """The scores (I,) that :func:`written_down` wrote."""
    if isinstance(written, str):
        return (np.frombuffer(written.encode(), dtype=np.uint8) - ord("0")) / RANDOM_SEEDS
    return np.array(written, dtype=np.float64)


@dataclass(frozen=True)
class Answers:
    """What methods answered to the same questions.

    Attributes:
        group_of: (I,) index of each question's group.
        right: by (pruner, budget), (I,) in [0, 1]; of the full model and of zero tokens, too.
    """

    group_of: NDArray[np.int64]
    right: Mapping[Key, Floats]

    def resample(self, keys: Sequence[Key]) -> Resampled:
        """Bootstrap these over the same draws of questions."""
        correct = np.stack([self.right[key] for key in keys])
        full, none = self.right[FULL, ALL_TOKENS], self.right[NONE, NO_TOKENS]
        return resample(correct, full, self.group_of, int(self.group_of.max()) + 1, none=none)


def join_answers(records: Sequence[Mapping[str, Any]]) -> Answers:
    """The answers of several records.

    Raises:
        PruneZooError: One has none, or they were given to other questions, or by another model.
    """
    check_same_suite(records)
    group_of, right = None, dict[Key, Floats]()
    for record in records:
        if "answers" not in record:
            raise PruneZooError(f"{record['command']}: the record holds no answers: measure it anew")
        groups = np.frombuffer(record["answers"]["groups"].encode(), dtype=np.uint8).astype(np.int64) - ord("A")
        group_of = groups if group_of is None else group_of
        if not np.array_equal(group_of, groups):
            raise PruneZooError(f"{record['command']}: other questions than {records[0]['command']}: measure it anew")
        for pruner, budgets in record["answers"]["right"].items():
            for keep, digits in budgets.items():
                own = read_back(digits)
                known = right.setdefault((pruner, keep), own)
                if pruner == FULL and not np.array_equal(known, own):
                    raise PruneZooError(f"{record['command']}: the full model answered otherwise: measure it anew")
    assert group_of is not None
    return Answers(group_of, right)
