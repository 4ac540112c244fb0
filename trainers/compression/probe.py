"""A linear probe of codes: how well a line through what they stand for tells the class of a photograph.

The class is the name of the photograph's folder. Beside the codes stand the mean of what a frozen tower sees, as the
ceiling, and the photograph shrunk to as many numbers, as the floor.

Letters: I photographs, F numbers of a feature.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from prunezoo.core.errors import PruneZooError
from prunezoo.tokenizers.base import Tokenizer
from trainers.data.photographs import Photographs
from trainers.evaluation.statistics import interval
from trainers.training.sight import Sight

from .texts import Texts

FOLDS = 3  # of the training photographs, to choose C
CS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
SMALL = 1024  # numbers up to which all vectors of a row are probed side by side, and not their mean alone
MEAN, ALL = "mean", "all"
TOWER, PIXELS = "tower", "pixels"
Features = NDArray[np.float32]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Side:
    """The photographs of a split, and their classes."""

    pictures: Photographs
    labels: Labels  # (I,)
    texts: Texts


@dataclass(frozen=True)
class Reading:
    """What a probe reads."""

    name: str  # of the tokenizer; TOWER; PIXELS
    reads: str  # MEAN of the vectors, or ALL side by side
    budget: int | None = None  # bytes that were allowed; None: as many as the whole row takes
    tokens: int | None = None
    bytes: int | None = None  # of a file of these tokens


def label(images: Path, splits: Sequence[Sequence[Path]]) -> tuple[list[str], list[Labels]]:
    """The classes of photographs, by the folders that they lie in.

    Args:
        images: The folder of all.
        splits: Paths of the training photographs, and of those that are held out.

    Returns:
        The names of the classes, sorted, and for each split a number ``(I,)`` for each of its photographs.

    Raises:
        PruneZooError: A photograph lies in no folder of a class, there is one class alone, or one has too few.
    """
    root = images.resolve()
    named = [[path.parent.relative_to(root).as_posix() for path in paths] for paths in splits]
    if any(name == "." for names in named for name in names):
        raise PruneZooError(f"{images}: pictures lie in no folder of a class: put each into {images}/CLASS/")
    classes = sorted({name for names in named for name in names})
    if len(classes) < 2:
        raise PruneZooError(f"{images}: all pictures are of one class, {classes[0]}: a probe needs two folders or more")
    counts = Counter(named[0])
    for name in classes:
        if counts[name] < FOLDS:
            raise PruneZooError(
                f"{images}/{name}: {counts[name]} training pictures, and a probe needs at least {FOLDS} of each class: "
                "add some, raise --limit or take the folder away"
            )
    return classes, [np.array([classes.index(name) for name in names]) for names in named]


def code_features(
    name: str, tokenizer: Tokenizer, side: Side, budgets: Sequence[int | None], advance: Callable[[], None]
) -> dict[Reading, Features]:
    """What a tokenizer's codes stand for, ``(I, F)`` for each budget: the mean of the vectors, and all where few."""
    lengths = [tokenizer.config.tokens if size is None else tokenizer.length_within(size) for size in budgets]
    found: dict[Reading, list[Tensor]] = {}
    for places, images in _batches(side.pictures, advance):
        codes = tokenizer.encode(images, side.texts(tokenizer, places))
        for budget, length in zip(budgets, lengths, strict=True):
            with torch.no_grad():
                vectors = tokenizer.vectors(codes[:, : tokenizer.numbers(length)]).float()
            reads = {MEAN: vectors.mean(1)}
            if vectors.shape[1] > 1 and vectors[0].numel() <= SMALL:
                reads[ALL] = vectors.flatten(1)
            for read, rows in reads.items():
                reading = Reading(name, read, budget, length, tokenizer.file_size(length))
                found.setdefault(reading, []).append(rows)
    return {reading: torch.cat(rows).numpy() for reading, rows in found.items()}


def tower_features(sight: Sight, side: Side, advance: Callable[[], None]) -> Features:
    """The mean of what a frozen tower sees, ``(I, D)``."""
    return torch.cat([sight.patches(images).mean((2, 3)) for _, images in _batches(side.pictures, advance)]).numpy()


def pixel_features(side: Side, across: int) -> Features:
    """The photographs shrunk to so many pixels a side, ``(I, 3 across²)``."""
    rows = [
        F.interpolate(images, (across, across), mode="bicubic", antialias=True).flatten(1)
        for _, images in _batches(side.pictures, lambda: None)
    ]
    return torch.cat(rows).numpy()


def fit_probe(train: Features, labels: Labels, held_out: Features) -> tuple[Labels, float]:
    """Logistic regression on standardised features, C by cross-validation on the training photographs.

    Args:
        train: ``(I, F)`` of the training photographs.
        labels: ``(I,)`` their classes, at least FOLDS of each.
        held_out: ``(J, F)``.

    Returns:
        The classes ``(J,)`` that it takes the others for, and C.
    """
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)),
        {"logisticregression__C": CS},
        cv=StratifiedKFold(FOLDS, shuffle=True, random_state=0),
    )
    search.fit(train, labels)
    return search.predict(held_out), float(search.best_params_["logisticregression__C"])


def probe_record(
    tokenizers: Mapping[str, Tokenizer],
    train: Side,
    held_out: Side,
    budgets: Sequence[int | None],
    sight: Sight,
    advance: Callable[[], None],
) -> dict[str, Any]:
    """Probe tokenizers, the tower and pixels.

    Args:
        tokenizers: By name, of one image size; the first is compared in pairs with all others.
        train: What the probes are fitted on.
        held_out: What they are judged by.
        budgets: Bytes of a file, of which each tokenizer uses the longest row that fits; None: the whole row.
        sight: The ceiling.
        advance: Called for each photograph that was read.

    Returns:
        `chance`: the accuracy of always naming the commonest class. `rows`: `{probe, reads, tokens, bytes, numbers,
        c, accuracy, ci}`, accuracies in [0, 1] with their 95 % bootstrap interval over the held-out photographs.
        `paired`: `{probe, rival, reads, bytes, difference, ci}`, of the first tokenizer and each other reading.

    Raises:
        PruneZooError: A tokenizer has no file so small as one of the budgets.
    """
    for name, tokenizer in tokenizers.items():
        for size in budgets:
            if size is not None and not tokenizer.length_within(size):
                raise PruneZooError(f"--bytes {size}: {name}: its smallest file has {tokenizer.file_size(1)} bytes")
    features: dict[Reading, tuple[Features, Features]] = {}
    for name, tokenizer in tokenizers.items():
        first, second = (code_features(name, tokenizer, side, budgets, advance) for side in (train, held_out))
        features |= {reading: (first[reading], second[reading]) for reading in first}
    across = {reading: max(math.isqrt(fitted.shape[1] // 3), 1) for reading, (fitted, _) in features.items()}
    floors = {side: Reading(f"{PIXELS} {side}x{side}", ALL) for side in sorted(set(across.values()))}
    ceiling = Reading(TOWER, MEAN)
    for side, floor in floors.items():
        features[floor] = (pixel_features(train, side), pixel_features(held_out, side))
    features[ceiling] = (tower_features(sight, train, advance), tower_features(sight, held_out, advance))
    rows, right = [], {}
    draws = np.random.default_rng(0).integers(len(held_out.labels), size=(2000, len(held_out.labels)))
    for reading, (fitted, judged) in features.items():
        said, c = fit_probe(fitted, train.labels, judged)
        right[reading] = (said == held_out.labels).astype(np.float64)
        facts = {"tokens": reading.tokens, "bytes": reading.budget or reading.bytes, "numbers": fitted.shape[1]}
        accuracy, ci = _with_interval(right[reading], draws)
        rows.append({"probe": reading.name, "reads": reading.reads, **facts, "c": c, "accuracy": accuracy, "ci": ci})
    paired = []
    own = [reading for reading in across if reading.name == next(iter(tokenizers))]
    for one in own:
        others = [
            other
            for other in across
            if other.name != one.name and (other.reads, other.budget) == (one.reads, one.budget)
        ]
        for other in (*others, floors[across[one]], ceiling):
            difference, ci = _with_interval(right[one] - right[other], draws)
            at = {"reads": one.reads, "bytes": one.budget or one.bytes}
            paired.append({"probe": one.name, "rival": other.name, **at, "difference": difference, "ci": ci})
    commonest = np.bincount(train.labels).argmax()
    return {"chance": _rounded((held_out.labels == commonest).mean()), "rows": rows, "paired": paired}


def _batches(pictures: Photographs, advance: Callable[[], None]) -> Iterable[tuple[range, Tensor]]:
    for start in range(0, len(pictures), 32):
        places = range(start, min(start + 32, len(pictures)))
        yield places, torch.stack([pictures[i] for i in places])
        for _ in places:
            advance()


def _with_interval(values: NDArray[np.float64], draws: NDArray[np.int64]) -> tuple[float, list[float]]:
    return _rounded(values.mean()), [_rounded(end) for end in interval(values[draws].mean(1))]


def _rounded(value: float) -> float:
    return round(float(value), 5)
