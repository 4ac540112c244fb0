"""Measure cases against the bare model in turns, and make rows of what was measured.

Each case is run right after or right before the bare model (A B, B A, A B, ...), and compared within such a pair, so
that whatever else the machine does strikes both alike. Medians over the pairs, with the interquartile range beside.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from prunezoo.core.contract import Pruner
from prunezoo.core.registry import build_pruner
from trainers.evaluation.budgets import Budget
from trainers.evaluation.scores import ALL_TOKENS, FULL

from .flops import Work, request_work
from .memory import peak_memory, weights_size
from .probe import PARTS, Asked, Reading, timed_request

BARE = "bare"
"""The model with nothing attached: what every ratio is against."""
MEMORY = ("peak_memory", "working_memory")
"""Bytes at the peak, with the weights and without."""

Row = dict[str, Any]


@dataclass
class Case:
    """A pruner at a budget, or the bare model, and what is known of it so far.

    Attributes:
        name: As on the command line.
        keep: Budget as on the command line.
        pruner: None for the bare model.
        amount: What ``attach`` is told to keep.
        pairs: Seconds by part, of the bare model and of this case, measured side by side.
        tokens: Image tokens in the language model, mean over its layers.
        work: Operations of the model.
        memory: Bytes at the peak beyond the weights.
    """

    name: str
    keep: str
    pruner: Pruner | None = None
    amount: int | float | str = 1.0
    pairs: list[tuple[dict[str, float], dict[str, float]]] = field(default_factory=list)
    tokens: float = 0.0
    work: Work = field(default_factory=lambda: Work(0, 0, 0))
    memory: int = 0

    def seconds(self, part: str) -> list[float]:
        """Every time measured for a part."""
        return [own[part] for _, own in self.pairs if part in own]

    def speedups(self, part: str) -> list[float]:
        """The bare model's time over this one's, pair by pair."""
        return [bare[part] / own[part] for bare, own in self.pairs if own.get(part, 0.0) > 0]


def cases_of(pruners: Sequence[tuple[str, Pruner]], budgets: Sequence[Budget]) -> list[Case]:
    """The bare model, then `full` (attached, everything kept: what attaching costs), then each pruner and budget."""
    cases = [Case(BARE, ALL_TOKENS), Case(FULL, ALL_TOKENS, build_pruner(FULL).eval())]
    wanted = [(name, pruner) for name, pruner in pruners if name != FULL]
    return cases + [Case(name, budget.label, pruner, budget.keep) for budget in budgets for name, pruner in wanted]


class Setting:
    """One batch size and prompt length, under every case.

    Args:
        vlm: The model.
        request: What is asked.
        cases: From :func:`cases_of`, the bare model first; they are filled in.
        decode: New tokens.
        repeats: Pairs for each case, at least 1.
    """

    def __init__(self, vlm: Any, request: Asked, cases: Sequence[Case], decode: int, repeats: int) -> None:
        self.vlm, self.request, self.decode, self.repeats = vlm, request, decode, repeats
        self.bare, *self.cases = cases
        self.weights = weights_size(vlm)

    @property
    def steps(self) -> int:
        """Requests that :meth:`measure` runs."""
        return 2 * (1 + len(self.cases)) + 2 * self.repeats * len(self.cases)

    def measure(self, advance: Callable[[], None]) -> None:
        """Count and warm up every case, then time them in turns; after an interrupt, what was timed is there."""
        for case in (self.bare, *self.cases):
            self._count(case)
            advance()
            case.memory = peak_memory(self.vlm.device, partial(self._run, case))
            advance()
        for turn in range(self.repeats):
            for case in self.cases:
                order = (self.bare, case) if turn % 2 == 0 else (case, self.bare)
                seconds = {}
                for one in order:
                    seconds[one.name] = self._run(one).seconds
                    advance()
                case.pairs.append((seconds[BARE], seconds[case.name]))

    def _run(self, case: Case, count: bool = False) -> Reading:
        return timed_request(self.vlm, self.request, case.pruner, case.amount, self.decode, count)

    def _count(self, case: Case) -> None:
        """Tokens and operations of a case, from a run that is not timed."""
        reading = self._run(case, count=True)
        config, batch = self.vlm.config.get_text_config(), len(self.request.items)
        case.tokens = float(np.mean(reading.lengths)) - self.request.length
        case.work = request_work(config, reading.lengths, self.decode, batch, reading.vision_flops)

    def rows(self) -> list[Row]:
        """A row for each case and part: `{pruner, keep, tokens, batch, length, part, median_s, spread, speedup, …}`.

        Times are in seconds, spreads are interquartile ranges; a memory row has `bytes` instead of times. A speed-up
        is the bare model over the case, also for memory; `ideal_speedup` is the ratio of the model's operations.
        Cases that were not timed yet are left out.
        """
        timed = [case for case in self.cases if case.pairs]
        bare = Case(**{**vars(self.bare), "pairs": [(b, b) for case in timed for b, _ in case.pairs]})
        return [row for case in (bare, *timed) for row in self._rows_of(case)] if timed else []

    def _rows_of(self, case: Case) -> list[Row]:
        rows = []
        head = {"pruner": case.name, "keep": case.keep, "tokens": round(case.tokens, 3)}
        head |= {"batch": len(self.request.items), "length": self.request.length}
        for part in PARTS:
            seconds, speedups = case.seconds(part), case.speedups(part)
            if not seconds or (part == "pruner" and case.pruner is None):
                continue
            own, whole = case.work.of(part), self.bare.work.of(part)
            rows.append(
                {
                    **head,
                    "part": part,
                    "median_s": _digits(float(np.median(seconds))),
                    "spread": _digits(_spread(seconds)),
                    "speedup": None if part == "pruner" else _digits(float(np.median(speedups))),
                    "speedup_spread": None if part == "pruner" else _digits(_spread(speedups)),
                    "ideal_speedup": _digits(whole / own) if own and whole else None,
                }
            )
        for part, extra in zip(MEMORY, (self.weights, 0), strict=True):
            size = case.memory + extra
            none = {"median_s": None, "spread": None, "speedup_spread": None, "ideal_speedup": None}
            ratio = _digits((self.bare.memory + extra) / size)
            rows.append({**head, "part": part, **none, "speedup": ratio, "bytes": size})
        return rows

    def overhead(self) -> Row | None:
        """What attaching costs where nothing is dropped, as a share of the bare model's prefill.

        Returns:
            `{batch, length, tokens, share, spread, first_token, first_token_spread}`: tokens of the prompt, images
            included; share: of what is done more in front of the language model, pruner `full` and all; first_token:
            of the whole difference up to the first token, in which the noise of the model itself is; None before any
            timing.
        """
        pairs = next(case for case in self.cases if case.name == FULL).pairs
        if not pairs:
            return None
        own = [(full["other"] + full["pruner"] - bare["other"]) / bare["prefill"] for bare, full in pairs]
        whole = [(full["first_token"] - bare["first_token"]) / bare["prefill"] for bare, full in pairs]
        return {
            "batch": len(self.request.items),
            "length": self.request.length,
            "tokens": self.request.columns,
            "share": _digits(float(np.median(own))),
            "spread": _digits(_spread(own)),
            "first_token": _digits(float(np.median(whole))),
            "first_token_spread": _digits(_spread(whole)),
        }


def _spread(values: Sequence[float]) -> float:
    """Interquartile range."""
    low, high = np.quantile(values, [0.25, 0.75])
    return float(high - low)


def _digits(value: float) -> float:
    """Six significant digits: more is noise."""
    return float(f"{value:.6g}")
