"""The input stage: cells of the pictures go in front of the vision tower, so that tower, projector and language model
get less.

The prompt is laid out without the tower, with the pixels of each cell where features will be, and the pruner chooses.
Then the family's own encoder runs with hooks on its tower, which leave out the patches of cells that are gone and give
them their places back, as zeros, behind it (:mod:`packed`, :mod:`plain`). So all that follows is as long as ever, and
the prompt is shortened as in the prompt stage: survivors keep their positions, newlines live as long as their row.

A **cell** is the part of a picture that becomes one token: one patch, or those that the model merges. Nothing has been
computed of it, so there are no signals, no layers and no gates; and nothing can be merged yet.
Letters: R images, N tokens of an image, n of all images of a kind with newlines, T frames, C channels, q pixels along
a cell.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...core.budgets import Keep
from ...core.contract import PruneOutput, Pruner
from ...core.errors import PruneZooError
from ..encode import encode, is_late
from ..encoded import Encoded
from ..families import Family, find_family
from ..families.base import Kind
from ..families.gaps import Gap, alive_patches, given_patches, no_gaps
from ..families.spread import spread
from ..parts.model import VLM
from .cut import Timer
from .packed import PackedGap
from .plain import PlainGap


def check_input_stage(family: Family, pruner: Pruner) -> None:
    """Raise PruneZooError on a tower that cannot be given some of its patches, or a pruner that needs signals."""
    family.short()
    if pruner.needs:
        raise PruneZooError(
            f"pruner '{pruner.name}' needs '{pruner.needs[0]}', and in front of the vision tower there are no signals: "
            "the input stage has pixels, cells and the words of the prompt"
        )


@dataclass(frozen=True)
class Gaps:
    """What is left out of the tower, by kind of pictures."""

    family: Family
    kept: Mapping[Kind, Tensor]  # (n,) bool, on the host, by token in the order of placeholders, with newlines

    def __call__(self, kind: Kind, batch: Mapping[str, Any]) -> AbstractContextManager[Gap]:
        """To be entered around the run of the encoder; without hooks where everything stays."""
        kept, short = self.kept[kind], self.family.short()
        if kept.numpy().all():
            return no_gaps(kind, batch)

        def find(pictures: int, patches: int) -> Tensor:
            return alive_patches(self.family, kind, batch, kept, (pictures, patches))

        return PackedGap(short, find) if short.packed else PlainGap(short, find)


def choose_by_pixels(
    vlm: VLM, encoded: Encoded, pruner: Pruner, keep: Keep, needs: tuple[str, ...], run_tower: bool, timer: Timer
) -> tuple[Encoded, PruneOutput]:
    """What a pruner of the input stage leaves of the images of a batch, and the batch encoded without the rest.

    Args:
        vlm: The model.
        encoded: From :func:`encode`, with or without the tower, which runs again; with at least one image.
        pruner: The pruner.
        keep: As in :meth:`Pruner.forward`.
        needs: As of :func:`leave_out`.
        run_tower: Likewise.
        timer: Counts the pruner and what it is given, not the tower.

    Returns:
        As :func:`leave_out`, with ``start`` set; and what is left of each image.

    Raises:
        PruneZooError: As the pruner and :func:`check_input_stage` do; the pruner merges; cells are mixed behind the
            tower.
    """
    family = find_family(vlm)
    check_input_stage(family, pruner)
    seen = with_host_ids(encoded)
    with timer.running():
        output = pruner(see_pixels(family, seen, encoded).inputs, keep)
    if output.features is not None or output.groups is not None:
        raise PruneZooError(
            f"pruner '{pruner.name}' makes or merges tokens, and in front of the vision tower there are none yet: use "
            "one that only drops"
        )
    return replace(leave_out(vlm, seen, encoded, output, needs, run_tower), start=output), output


def leave_out(
    vlm: VLM,
    batch: Mapping[str, Any],
    encoded: Encoded,
    output: PruneOutput,
    needs: tuple[str, ...] = (),
    run_tower: bool = True,
) -> Encoded:
    """The batch encoded anew, the tower being given only what ``output`` leaves of each image.

    Args:
        vlm: The model.
        batch: As of :func:`see_pixels`.
        encoded: From :func:`encode`, with or without the tower; with at least one image.
        output: What is left.
        needs: Signals that pruners behind it want; those of the language model are made later, of what is left.
        run_tower: False leaves the tower to a pruner of the vision stage.

    Returns:
        The batch of full length, features (and signals) of what is gone 0.
    """
    family, source = find_family(vlm), encoded.source
    if source is None:
        raise PruneZooError("the input stage runs the tower anew: give it a batch as `encode` returned it")
    early = tuple(name for name in needs if not is_late(name))
    gaps = Gaps(family, kept_tokens(family, batch, encoded, output))
    again = partial(encode, vlm, source.batch, markers=source.markers, text_encoder=source.text_encoder)
    return again(early, gaps=gaps) if run_tower or early else again(run_tower=False)


def with_host_ids(encoded: Encoded) -> dict[str, Any]:
    """What the encoder reads of a batch, ``input_ids`` on the host: one read for all that is laid out from them."""
    return {**encoded.batch, **encoded.pixels, "input_ids": encoded.batch["input_ids"].cpu()}


def see_pixels(family: Family, batch: Mapping[str, Any], encoded: Encoded) -> Encoded:
    """The same with the pixels of each cell as features, ``(R, N, T * C * q * q)`` float32, as the processor made them.

    A still picture has one frame, though a tower may be given it twice; beside clips, as many as they have.

    Args:
        family: The model's.
        batch: From :func:`with_host_ids`.
        encoded: The batch, laid out.
    """
    tower = family.short().tower
    found: dict[Kind, list[Tensor]] = {}
    for kind in family.kinds(batch):
        family.check_gaps(kind, batch)
        cells = family.cells(kind, batch)
        patches, frames = given_patches(tower, family.pictures(kind, batch))
        squares = spread(family, kind, batch, "pixels", patches, [len(own) for own in cells])  # (n, T * C, q, q) each
        found[kind] = [
            _patches(own, where).float().unflatten(1, (frames, -1)) for own, where in zip(squares, cells, strict=True)
        ]
    if "video" not in found:
        found = {kind: [own[:, :1] for own in squares] for kind, squares in found.items()}
    elif "image" in found:
        found["image"] = [own[:, :1].expand_as(own) for own in found["image"]]
    shape = next(iter(found.values()))[0].shape[1:]
    rows = {kind: iter(squares) for kind, squares in found.items()}  # of a kind, in reading order
    features = pad_sequence([next(rows[kind]).flatten(1) for kind in encoded.kinds], batch_first=True)
    frames, channels, high, wide = shape
    return replace(encoded, inputs=replace(encoded.inputs, features=features, pixels=(frames, channels, high, wide)))


def _patches(values: Tensor, cells: Tensor) -> Tensor:
    """Of ``values (n, ...)`` those that are no newlines, by ``cells (n, 3)`` of the host."""
    patches = (cells[:, 2] >= 0).numpy()
    return values if patches.all() else values[torch.from_numpy(patches.nonzero()[0]).to(values.device)]


def kept_tokens(family: Family, batch: Mapping[str, Any], encoded: Encoded, output: PruneOutput) -> dict[Kind, Tensor]:
    """What ``output`` leaves, by kind, ``(n,)`` bool on the host; newlines count as kept.

    Args:
        family: The model's.
        batch: As of :func:`see_pixels`.
        encoded: The batch.
        output: What is left of its images.
    """
    left = [own[:count] for own, count in zip(output.index.cpu(), output.counts, strict=True)]
    kept: dict[Kind, Tensor] = {}
    for kind in family.kinds(batch):
        parts = []
        rows = [own for own, other in zip(left, encoded.kinds, strict=True) if other == kind]
        for own, cells in zip(rows, family.cells(kind, batch), strict=True):
            alive = cells[:, 2] < 0
            alive[torch.from_numpy((~alive).numpy().nonzero()[0])[own]] = True
            parts.append(alive)
        kept[kind] = torch.cat(parts)
    return kept
