"""A batch through a tower that is pruned by whole cells: which tokens are whose, and what is left of all kinds.

Letters: R images, n tokens of an image with newlines, D width of the language model.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ...core.budgets import Keep, counts_of
from ...core.contract import PruneInputs, PruneOutput, Pruner
from ...core.errors import PruneZooError
from ...core.plan import gather_rows
from ..encode import encode
from ..encoded import Encoded
from ..families import Family, find_family
from ..families.base import Kind
from ..families.gaps import Gap, NoGap
from ..parts.model import VLM
from .cells import CellStage
from .cut import Timer


@dataclass(frozen=True)
class CellRuns:
    """Of a batch, whose kinds of pictures go through the tower one after the other."""

    family: Family
    encoded: Encoded
    pruner: Pruner
    counts: tuple[int, ...]  # (R) tokens of each image that the last block leaves
    timer: Timer
    stages: dict[Kind, CellStage] = field(default_factory=dict)

    def rows(self, kind: Kind) -> list[int]:
        """The images of a kind."""
        return [row for row, other in enumerate(self.encoded.kinds) if other == kind]

    @contextmanager
    def __call__(self, kind: Kind, batch: Mapping[str, Any]) -> Iterator[Gap]:
        """To be entered around the run of the encoder; signals are not read of it.

        Raises:
            PruneZooError: Tokens share patches.
        """
        self.family.check_gaps(kind, batch)
        rows, inputs, start = self.rows(kind), self.encoded.inputs, self.encoded.start
        cells = self.family.cells(kind, batch)
        firsts = accumulate(map(len, cells), initial=0)
        numbers = [first + _patches(own) for first, own in zip(firsts, cells, strict=False)]
        if start is not None:
            index = start.index.cpu()
            numbers = [own[index[row, : start.counts[row]]] for row, own in zip(rows, numbers, strict=True)]

        def deal(patches: Tensor) -> Tensor:
            return self.family.deal(kind, batch, patches)[..., 0]

        keep = tuple(self.counts[row] for row in rows)
        own = inputs if len(rows) == len(inputs.counts) else _of_rows(inputs, rows)
        self.stages[kind] = CellStage(self.family, numbers, self.pruner, own, keep, self.timer, deal)
        with self.stages[kind]:
            yield NoGap()

    def output(self) -> PruneOutput:
        """What all of them have left."""
        if len(self.stages) == 1:
            (stage,) = self.stages.values()
            return stage.result()
        valid = self.encoded.inputs.valid
        results = {kind: stage.result() for kind, stage in self.stages.items()}
        width = max(result.index.shape[1] for result in results.values())
        index, alive = valid.new_zeros(len(valid), width, dtype=torch.long), valid.new_zeros(len(valid), width)
        counts, blocks = [0] * len(valid), []
        for kind, result in results.items():
            rows = self.rows(kind)
            where = torch.tensor(rows).to(valid.device)
            more = (0, width - result.index.shape[1])
            index = index.index_copy(0, where, pad(result.index, more))
            alive = alive.index_copy(0, where, pad(result.valid, more))
            assert result.blocks is not None
            blocks += list(zip(rows, result.blocks, strict=True))
            for row, count in zip(rows, result.counts, strict=True):
                counts[row] = count
        ran = torch.stack([own for _, own in sorted(blocks, key=lambda entry: entry[0])])
        return PruneOutput(index, alive, known=tuple(counts), blocks=ran)


def choose_by_cells(
    vlm: VLM, encoded: Encoded, pruner: Pruner, keep: Keep, timer: Timer
) -> tuple[Encoded, PruneOutput]:
    """What a pruner inside the tower leaves of the images of a batch, by whole cells.

    Args:
        vlm: The model that made ``encoded``.
        encoded: From :func:`encode`, with at least one image; with or without features, since the tower runs again.
        pruner: Of the vision stage.
        keep: As in :meth:`Pruner.forward`.
        timer: Counts what the pruner takes itself, without the tower.

    Returns:
        The same batch with the features of this run, 0 of what has gone; and what is left.

    Raises:
        PruneZooError: As the pruner and :class:`CellStage` do.
    """
    source, inputs, start = encoded.source, encoded.inputs, encoded.start
    if source is None:
        raise PruneZooError("the vision stage runs the tower anew: give it a batch as `encode` returned it")
    runs = CellRuns(find_family(vlm), encoded, pruner, counts_of(keep, inputs.counts), timer)
    made = encode(vlm, source.batch, gaps=runs)

    def found(values: Tensor) -> Tensor:
        return values if start is None else gather_rows(values, start.index)

    lines = encoded.newlines
    if lines is not None:
        assert made.newlines is not None
        lines = replace(lines, features=made.newlines.features)
    inputs = replace(inputs, features=found(made.inputs.features))
    return replace(encoded, inputs=inputs, deep=tuple(map(found, made.deep)), newlines=lines), runs.output()


def _patches(cells: Tensor) -> Tensor:
    """Which of ``cells (n, 3)``, of the host, are no newlines."""
    return torch.from_numpy((cells[:, 2] >= 0).numpy().nonzero()[0])


def _of_rows(inputs: PruneInputs, rows: list[int]) -> PruneInputs:
    """Some of the images."""
    where = torch.tensor(rows).to(inputs.valid.device)

    def some(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[where]
        if isinstance(value, np.ndarray):
            return value[rows]
        if isinstance(value, tuple):
            return tuple(value[row] for row in rows)
        return {name: own[where] for name, own in value.items()} if isinstance(value, Mapping) else value

    by_image = {part.name: some(getattr(inputs, part.name)) for part in fields(inputs) if part.name != "pixels"}
    return replace(inputs, **by_image)
