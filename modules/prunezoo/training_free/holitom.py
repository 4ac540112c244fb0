"""HoliTom: what stands still in a clip is kept once, and folded into clusters; what moves is kept by attention.

HoliTom: Holistic Token Merging for Fast Video Large Language Models, Shao et al., NeurIPS 2025,
https://arxiv.org/abs/2505.21334, code https://github.com/cokeshao/HoliTom.

A place of the picture stands still between two frames if its two tokens have a cosine above `still`. The clip is cut
into windows so that as many tokens as can be are saved by keeping once, as the mean over its frames at the first of
them, what stands still throughout a window. The budget is dealt out in proportion over what stands still in each
window, and what moves in each frame. Of the former the centres of clusters by density peaks stay, 0.6 of each centre
and 0.4 of the mean of its other members; of the latter the tokens that receive most attention in the block whose output
is projected, mean over heads and rows. A still picture is one frame in which all moves.

Inside, in front of the layer at 18/28 of the depth, the tokens stay that the prompt's last word attends to most in the
layer before. Each that goes is folded into the most similar one that stays, one after the other: both are halved and
added.

`keep` = T is what the layers read **in the mean**: 28/23 T enter, and half of them are left inside at that layer.

| | authors' code | ours |
|---|---|---|
| count | about T, by rounding in each window | T |
| saved more than is to go | fewer tokens than asked for | windows that save least are given up |
| attention among what moves | all, `D` = 0 (else it fails) | all |
| equal densities | noise of 1e-6 tells them apart | the first is the denser |
| layer | 18 of 28 | 18/28 of the depth; `layer` |
| positions | kept | kept |
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..core.budgets import Keep
from ..core.clusters import density_peaks
from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.errors import PruneZooError
from ..core.gates import topk_mask
from ..core.plan import gather_rows, group_sum, mask_to_index
from ..core.registry import register_pruner
from ._grid import share
from .vscan import left_for_mean

PLACE = 18 / 28  # of the depth
Window = tuple[int, int]
"""The first and the last of its frames."""


@dataclass(frozen=True)
class HoliTomConfig(PrunerConfig):
    """Config of `holitom`."""

    still: float = 0.8  # cosine of two frames' tokens above which a place stands still, in [-1, 1]
    window: int = 1024  # frames of the longest window, at least 1
    centre: float = 0.6  # of a cluster's centre in its token, the others' mean has the rest; in [0, 1]
    neighbours: int = 7  # tokens by which density is measured, itself among them, at least 1
    enter: float = 28 / 23  # tokens that enter the language model, for each of `keep`, at least 1
    layer: int | None = None  # in front of which decoder layer tokens are folded, at least 1; None: 18/28 of the depth

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, least, most in (("still", -1, 1), ("centre", 0, 1)):
            if not least <= getattr(self, name) <= most:
                raise PruneZooError(f"{name}={getattr(self, name)} of holitom must lie in [{least}, {most}]")
        for name in ("window", "neighbours", "enter"):
            if getattr(self, name) < 1:
                raise PruneZooError(f"{name}={getattr(self, name)} of holitom must be at least 1")
        if self.layer is not None and self.layer < 1:
            raise PruneZooError(f"layer={self.layer} of holitom: there must be a layer before it, at least 1")


def cut_windows(still: np.ndarray, longest: int) -> list[Window]:
    """Cut a clip so that most is saved: for each window the places that stand still in it, for each frame but one.

    Args:
        still: ``(F - 1, P)`` bool, the places that stand still from each frame to the next.
        longest: Frames of a window at most.

    Returns:
        The windows, in order; of equally good cuts the one whose last windows are shortest.
    """
    frames = len(still) + 1
    best, begin = [0] * (frames + 1), [0] * (frames + 1)
    for end in range(1, frames + 1):
        starts = range(end - 1, max(0, end - longest) - 1, -1)
        gains = [saved(still, (start, end - 1)) + best[start] for start in starts]
        best[end] = max(gains)
        begin[end] = starts[gains.index(best[end])]
    windows, end = [], frames
    while end:
        windows.append((begin[end], end - 1))
        end = begin[end]
    return windows[::-1]


def saved(still: np.ndarray, window: Window) -> int:
    """Tokens that a window saves."""
    start, end = window
    return int(still[start:end].all(0).sum()) * (end - start) if end > start else 0


def cluster(tokens: Tensor, count: int, neighbours: int, centre: float) -> tuple[Tensor, Tensor, Tensor]:
    """Clusters of tokens, as a token each.

    Args:
        tokens: ``(n, D)`` float32.
        count: K, at most n.
        neighbours: By which density is measured.
        centre: What a centre has of its cluster's token.

    Returns:
        The centres ``(K,)`` long, the cluster of each token ``(n,)`` long, and the clusters' tokens ``(K, D)``.
    """
    some = torch.ones(1, len(tokens), dtype=torch.bool, device=tokens.device)
    counts = torch.full((1,), count, device=tokens.device)
    (centres,), (owner,) = density_peaks(tokens[None], some, counts, count, neighbours)
    middle = tokens[centres]
    sizes = torch.zeros(count, device=tokens.device).index_add(0, owner, torch.ones_like(tokens[:, 0]))[:, None]
    others = torch.zeros_like(middle).index_add(0, owner, tokens) - middle
    mean = others / (sizes - 1).clamp_min(1)
    return centres, owner, torch.where(sizes > 1, centre * middle + (1 - centre) * mean, middle)


class Merge(Pruner):
    """The first stage: windows, clusters of what stands still, attention; in front of the language model."""

    name = "holitom"
    needs = ("frame", "received_attention")
    config_class = HoliTomConfig
    config: HoliTomConfig

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """Clip after clip; what windows there are is read from the device."""
        assert inputs.asked is not None  # `forward` has set it
        features, kept = inputs.features.clone(), inputs.valid.clone()
        slots = torch.arange(inputs.valid.shape[1], device=inputs.valid.device)
        owner = slots.masked_fill(~inputs.valid, -1)
        for row, ((places, cells), asked) in enumerate(zip(inputs.host_grids, inputs.asked, strict=True)):
            if asked < len(places):
                kept[row], owner[row] = False, -1
                frames = inputs.signal("frame")[row].long().cpu().numpy()[places]
                self.merge_clip(inputs, row, table_of(places, cells, frames), asked, (features, kept, owner))
        index, valid = mask_to_index(kept, inputs.most_asked)
        column = kept.cumsum(1) - 1
        groups = torch.where(owner < 0, -1, column.gather(1, owner.clamp_min(0)))
        return PruneOutput(index, valid, gather_rows(features, index), groups=groups)

    def merge_clip(
        self, inputs: PruneInputs, row: int, table: np.ndarray, asked: int, made: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        """Write one clip's tokens, which slots stay, and into which slot each goes, into ``made``.

        Args:
            inputs: The clips.
            row: Which.
            table: ``(F, P)`` the slot of each place in each frame, -1 for none.
            asked: How many tokens are to stay.
            made: ``(B, N, D)``, ``(B, N)`` bool and ``(B, N)`` long.
        """
        features, kept, owner = (part[row] for part in made)
        device, there = features.device, table >= 0
        tokens = inputs.features[row].float()[torch.from_numpy(table.clip(0)).to(device)]  # (F, P, D)
        alike = torch.cosine_similarity(tokens[1:], tokens[:-1], dim=-1).cpu().numpy()
        still = (alike > self.config.still) & there[1:] & there[:-1]
        windows = cut_windows(still, self.config.window)
        excess = asked - int(there.sum()) + sum(saved(still, window) for window in windows)
        for window in sorted(windows, key=lambda window: saved(still, window)):
            if excess > 0 and saved(still, window):  # all of its frames alone
                windows.remove(window)
                windows += [(frame, frame) for frame in range(window[0], window[1] + 1)]
                excess -= saved(still, window)
        parts: list[tuple[Window | None, np.ndarray]] = []  # a window and places; or no window and slots
        for start, end in windows:
            stays = np.asarray(still[start:end].all(0) & (end > start))
            parts.append(((start, end), stays.nonzero()[0]))
            parts += [(None, table[f][there[f] & ~stays]) for f in range(start, end + 1)]
        attention = inputs.signal("received_attention")[row].float()
        quotas = share(asked, [len(places) for _, places in parts])
        for (where, numbers), count in zip(parts, quotas, strict=True):
            own = torch.from_numpy(numbers).to(device)
            if not count:
                continue
            if where is None:
                own = own[attention[own].argsort(descending=True, stable=True)[:count]]
                kept[own], owner[own] = True, own
                continue
            through = torch.from_numpy(table[where[0] : where[1] + 1][:, numbers]).to(device)  # (frames, places)
            mean = tokens[where[0] : where[1] + 1][:, own].mean(0)
            centres, belongs, merged = cluster(mean, count, self.config.neighbours, self.config.centre)
            chiefs = through[0, centres]
            kept[chiefs], features[chiefs] = True, merged.to(features.dtype)
            owner[through.flatten()] = chiefs[belongs].expand(len(through), -1).flatten()


def table_of(slots: np.ndarray, cells: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """``(F, P)``: the slot of each place in each frame, -1 for none; all places in one frame where they are no clip.

    Args:
        slots: ``(n,)`` of the image.
        cells: ``(n, 3)``.
        frames: ``(n,)`` whole numbers.
    """
    _, frame = np.unique(frames, return_inverse=True)
    _, place = np.unique(cells[:, 1:], axis=0, return_inverse=True)
    frame, place = frame.reshape(-1), place.reshape(-1)
    if len({*zip(frame.tolist(), place.tolist(), strict=True)}) < len(slots):  # crops of a still picture
        return slots[None]
    table = np.full((int(frame.max()) + 1, int(place.max()) + 1), -1)
    table[frame, place] = slots
    return table


class Fold(Pruner):
    """The second stage: what goes is folded into what stays; `keep` is the mean over the layers that it brings."""

    name = "holitom"
    stage = "layer"
    needs = ("last_attention@previous",)
    config_class = HoliTomConfig
    config: HoliTomConfig

    def stages(self, depth: int) -> tuple[int, ...]:
        """The configured layer, or that at 18/28 of the depth."""
        if self.config.layer is None and depth < 2:
            raise PruneZooError(f"holitom: a decoder of {depth} layer has none behind its first: set layer")
        return (self.config.layer or max(round(depth * PLACE), 1),)

    def schedule(self, keep: Tensor, available: Tensor, depth: int) -> list[Tensor]:
        """As many as make the mean over the layers ``keep``, where ``available`` are read up to this one."""
        (layer,) = self.stages(depth)
        return [left_for_mean(keep, available, layer, depth)]

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """Choose and fold, in all images at once."""
        kept = topk_mask(inputs.signal(self.needs[0]).float(), inputs.valid, keep)
        index, valid = mask_to_index(kept, inputs.most_asked)
        states = inputs.features.float().masked_fill(~inputs.valid[..., None], 0)
        unit = functional.normalize(states, dim=-1)
        alike = (gather_rows(unit, index) @ unit.mT).masked_fill(~valid[..., None], -torch.inf)
        groups = torch.where(kept, kept.cumsum(1) - 1, alike.argmax(1)).masked_fill(~inputs.valid, -1)
        # Of m that are folded into a token one after the other, the last weighs 1/2, the first and the token 1/2^m.
        gone = (inputs.valid & ~kept).float()
        together = (groups[:, :, None] == groups[:, None]).float()
        later = (together.triu(1) @ gone[..., None])[..., 0]
        all_ = (together @ gone[..., None])[..., 0]
        weight = torch.where(kept, 2**-all_, 2 ** -(later + 1)).masked_fill(~inputs.valid, 0)
        made = group_sum(states * weight[..., None], groups, index.shape[1])
        alone = gather_rows(all_ == 0, index)[..., None]
        features = torch.where(alone, gather_rows(inputs.features, index), made.to(inputs.features.dtype))
        return PruneOutput(index, valid, features, groups=groups)


@register_pruner("holitom")
class HoliTom(Pruner):
    """Windows and clusters in front of the language model, folding inside; `keep` is the mean."""

    stage = "layer"
    criteria = ("similarity", "attention")
    exact = False
    config_class = HoliTomConfig
    config: HoliTomConfig

    def __init__(self, config: HoliTomConfig | None = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        self.merge, self.fold = Merge(self.config), Fold(self.config)

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a class attribute where it is not configured
        """Those of both stages."""
        return (*self.merge.needs, *self.fold.needs)

    def stages(self, depth: int) -> tuple[int, ...]:
        """That of the second one."""
        return self.fold.stages(depth)

    def parts(self, keep: Keep) -> list[tuple[Pruner, Keep]]:
        """Both stages: the first with its share, the second with the mean, as a share of what the first one left."""
        self.check_keep(keep)
        assert not isinstance(keep, str)  # it sets no budgets
        if isinstance(keep, Tensor):
            return [(self.merge, (keep * self.config.enter).round().long()), (self.fold, keep)]
        if isinstance(keep, int):
            return [(self.merge, round(keep * self.config.enter)), (self.fold, keep)]
        enter = min(1.0, keep * self.config.enter)
        return [(self.merge, enter), (self.fold, min(1.0, keep / enter))]

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """Both stages on the same inputs, as if they stood at one place; in a host each acts at its own."""
        assert inputs.asked is not None  # `forward` has set it
        (_, enter), _ = self.parts(torch.tensor(inputs.asked))
        first = self.merge(inputs, enter)
        found = inputs.after(first)
        left = left_for_mean(torch.tensor(inputs.asked), torch.tensor(first.counts), 1, 2)
        second = self.fold(found, left)
        index = gather_rows(first.index, second.index).masked_fill(~second.valid, 0)
        return PruneOutput(index, second.valid, second.kept_features(found))
