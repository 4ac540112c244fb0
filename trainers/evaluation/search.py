"""Search the options of a method: trials on items that were encoded once, each at the same mean of tokens.

A trial sets the options, prunes for real, and is worth the mean KL(full ‖ pruned) at the answer positions, or the share
of wrong answers. One that reads more tokens than was asked for, or that the model cannot have, is no candidate. Trials
are proposed by optuna's TPE and kept in a file of SQLite, from which an interrupted search goes on.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import urlencode

import optuna
import torch
from torch import Tensor

from prunezoo.core.bounds import parse_json
from prunezoo.core.budgets import budget as counts_of_budget
from prunezoo.core.errors import PruneZooError
from prunezoo.core.near import near
from prunezoo.core.registry import split_options
from prunezoo.host import Encoded, encode, full_forward
from prunezoo.host.run import run_pruned
from trainers.data.conversation import IGNORED, ConversationCollator
from trainers.data.suite import Item, Suite

from .budgets import Budget
from .measure import Answers
from .methods import View, build_method

Objective = Literal["kl", "accuracy"]
SLACK = 0.01
"""Share of the mean asked for by which a trial may be above it: counts are whole numbers."""
Space = Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Trial:
    """What a setting was worth: the less the better; and the tokens of an image, mean over layers and items."""

    value: float
    tokens: float


def is_range(values: Sequence[Any]) -> bool:
    """Whether they are least and most of a number, and not all that an option may be."""
    return len(values) == 2 and all(type(value) in (int, float) for value in values)


def parse_range(text: str) -> tuple[str, tuple[Any, ...]]:
    """Read ``cell=3:24``, a range of numbers, whole if both ends are, or ``attention=cls,received``, choices.

    Raises:
        PruneZooError: Neither; the message quotes it.
    """
    name, mark, values = text.partition("=")
    try:
        if name and mark and ":" in values:
            low, high = (parse_json(value) for value in values.split(":"))
            if is_range((low, high)) and low < high:
                return name, (low, high)
        elif name and values:
            try:
                return name, tuple(parse_json(f"[{values}]"))
            except ValueError:
                return name, tuple(values.split(","))
    except ValueError:
        pass
    raise PruneZooError(f"--range {text!r}: write NAME=LEAST:MOST, as cell=3:24, or NAME=A,B,C")


def with_options(name: str, options: Mapping[str, Any]) -> str:
    """The name of a pruner with these options, over those that it has."""
    plain, own = split_options(name)
    words = {
        key: value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        for key, value in {**own, **options}.items()
    }
    return f"{plain}?{urlencode(words, safe=',[]/:')}" if words else str(plain)


class Items:
    """The items of a search, encoded once, with the full model's answers.

    Args:
        vlm: The frozen model.
        processor: Its processor.
        suite: The items, of a training or validation split.
        batch_size: Items at once.
    """

    def __init__(self, vlm: Any, processor: Any, suite: Suite, batch_size: int) -> None:
        if not len(suite):
            raise PruneZooError(f"suite {suite.name}: split {suite.split} has no items")
        self.vlm, self.depth = vlm, vlm.config.get_text_config().num_hidden_layers
        collate = ConversationCollator(processor)
        self.items = [suite[start : start + batch_size] for start in range(0, len(suite), batch_size)]
        self.batches = [collate(items) for items in self.items]
        self.needs: tuple[str, ...] | None = None
        self.held: list[tuple[View, Encoded, Answers, int]] = []

    def encoded(self, needs: Sequence[str]) -> list[tuple[View, Encoded, Answers, int]]:
        """All batches with at least these signals; encoded anew only where one of them is new."""
        if self.needs is None or not set(needs) <= set(self.needs):
            self.needs = tuple(sorted({*needs, *(self.needs or ())}))
            self.held = [self._encode(batch, items) for batch, items in zip(self.batches, self.items, strict=True)]
        return self.held

    def _encode(self, batch: Mapping[str, Any], items: Sequence[Item]) -> tuple[View, Encoded, Answers, int]:
        """One batch, the full model's answers, and how many places from the end these begin."""
        device = self.vlm.device
        moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        assert self.needs is not None
        encoded = encode(self.vlm, moved, self.needs)
        assert encoded.labels is not None
        tail = encoded.labels.shape[1] - int((encoded.labels != IGNORED).any(0).int().argmax()) + 1
        output = full_forward(self.vlm, encoded, logits_to_keep=tail)
        assert output.labels is not None
        return View(encoded.inputs, items), encoded, Answers.read(output.logits, output.labels[:, -tail:]), tail

    @torch.no_grad()
    def measure(self, name: str, keep: Budget, objective: Objective) -> tuple[Trial, float]:
        """What a pruner is worth at a budget that is meant as the mean over layers, and the mean that was asked for.

        Raises:
            PruneZooError: The pruner cannot be built, or the model cannot have it.
        """
        method = build_method(name, depth=self.depth)
        worth, tokens, wanted, count = 0.0, 0.0, 0.0, 0
        for view, encoded, full, tail in self.encoded(method.needs):
            run = run_pruned(
                self.vlm, encoded, method.pruner(view), method.amount(view, keep.keep), logits_to_keep=tail
            )
            assert run.host.labels is not None
            answers = Answers.read(run.host.logits, run.host.labels[:, -tail:])
            right, _, kl = answers.compare(full, len(view.items))
            worth += float((kl if objective == "kl" else 1 - right).double().sum())
            tokens += float(run.layers.double().mean(1).sum())
            wanted += float(counts_of_budget(keep.keep, encoded.inputs.valid.sum(1)).double().sum())
            count += len(view.items)
        return Trial(worth / count, tokens / count), wanted / count


class Search:
    """A search that goes on where it was, in a folder.

    Args:
        folder: Where its trials lie, and go.
        name: The pruner, with the options that are the start.
        space: What is varied.
        facts: What makes it this search and no other; JSON values.
        seed: Of the proposals.
    """

    FILE = "trials.db"

    def __init__(self, folder: Path, name: str, space: Space, facts: Mapping[str, Any], seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        folder.mkdir(parents=True, exist_ok=True)
        self.name, self.space = name, space
        self.study = optuna.create_study(
            study_name="search", storage=f"sqlite:///{(folder / self.FILE).resolve()}", load_if_exists=True
        )
        known = self.study.user_attrs.get("facts")
        whole = {**facts, "pruner": name, "space": {key: list(values) for key, values in space.items()}}
        if known is None:
            self.study.set_user_attr("facts", whole)
        elif known != parse_json(json.dumps(whole)):
            unlike = ", ".join(key for key in whole if known.get(key) != parse_json(json.dumps(whole[key])))
            raise PruneZooError(f"--out {folder} holds a search with another {unlike}: name another folder")
        # Another seed as it goes on, so that nothing is proposed twice.
        self.study.sampler = optuna.samplers.TPESampler(seed=seed + self.done, multivariate=True, n_startup_trials=20)

    @classmethod
    def begin(
        cls, folder: Path, name: str, space: Space, facts: Mapping[str, Any], seed: int, config: Mapping[str, Any]
    ) -> Self:
        """Open it; a new one tries the start first, which ``config``, the pruner's, names."""
        space = check_space(name, space, config)
        search = cls(folder, name, space, facts, seed)
        if not search.study.trials:
            start = {key: config[key] if is_range(values) else dumped(config[key]) for key, values in space.items()}
            search.study.enqueue_trial(start)
        return search

    @property
    def done(self) -> int:
        """Trials that have ended."""
        return sum(trial.state.is_finished() for trial in self.study.trials)

    def step(self, items: Items, keep: Budget, objective: Objective) -> Trial | None:
        """One more trial; None where it was no candidate."""
        asked = self.study.ask()
        options: dict[str, Any] = {}
        for key, values in self.space.items():
            if not is_range(values):
                options[key] = parse_json(asked.suggest_categorical(key, [dumped(value) for value in values]))
            elif all(type(value) is int for value in values):
                options[key] = asked.suggest_int(key, *values)
            else:
                options[key] = asked.suggest_float(key, *values)
        asked.set_user_attr("options", options)
        try:
            found, wanted = items.measure(with_options(self.name, options), keep, objective)
            above = found.tokens > wanted * (1 + SLACK)
            why = f"reads {found.tokens:.2f} tokens in the mean, {wanted:.2f} were asked for" if above else None
        except PruneZooError as error:
            found, why = None, str(error)
        if found is None or why is not None:
            asked.set_user_attr("why_not", why)
            self.study.tell(asked, state=optuna.trial.TrialState.PRUNED)
            return None
        asked.set_user_attr("tokens", found.tokens)
        self.study.tell(asked, found.value)
        return found

    def best(self) -> tuple[dict[str, Any], Trial]:
        """The best setting of all trials.

        Raises:
            PruneZooError: None was a candidate; the message says why the last one was not.
        """
        if not any(trial.state is optuna.trial.TrialState.COMPLETE for trial in self.study.trials):
            reasons = [trial.user_attrs["why_not"] for trial in self.study.trials if "why_not" in trial.user_attrs]
            raise PruneZooError(f"no trial of {self.name} could be used: {reasons[-1] if reasons else 'none was made'}")
        trial = self.study.best_trial
        assert trial.value is not None
        return dict(trial.user_attrs["options"]), Trial(trial.value, trial.user_attrs["tokens"])

    def start(self) -> Trial | None:
        """What the first trial, the start, was worth; None where it was no candidate."""
        first = self.study.trials[0]
        return None if first.value is None else Trial(first.value, first.user_attrs["tokens"])


def dumped(value: Any) -> str:
    """A choice as the text that optuna is told."""
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def check_space(name: str, space: Space, config: Mapping[str, Any]) -> Space:
    """Refuse what cannot be searched: no option, an unknown one, or a start that lies outside of its range.

    Returns:
        The space; a range is of whole numbers only if the option is.

    Raises:
        PruneZooError: The message names option and remedy.
    """
    if not space:
        raise PruneZooError(f"'{name}' names no options to search: give them by --range NAME=LEAST:MOST")
    for key, values in space.items():
        if key not in config:
            raise PruneZooError(f"--range {key}: '{name}' has no such option{near(key, config)}")
        start = config[key]
        inside = values[0] <= start <= values[1] if is_range(values) else dumped(start) in map(dumped, values)
        if not inside:
            raise PruneZooError(
                f"--range {key}: the start, {start}, is not in it; give another by the pruner's name, {name}?{key}=…"
            )
    return {
        key: tuple(map(float, values)) if is_range(values) and isinstance(config[key], float) else values
        for key, values in space.items()
    }
