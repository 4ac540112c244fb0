"""What can be measured: pruners, and diagnostics that know more than a pruner may.

Letters: B items of a batch, N image tokens of an image (padded), L tokens of the prompt with its answer, H heads.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prunezoo.core.budgets import Keep, auto_mean
from prunezoo.core.contract import PruneInputs, Pruner
from prunezoo.core.errors import PruneZooError
from prunezoo.core.registry import build_pruner, load_pruner
from prunezoo.host import Encoded
from prunezoo.host.signals.language import encode_needs
from prunezoo.host.signals.relevance import eager_attention, relevance_map
from trainers.cli.names import BY_FRAME, BY_STEP, FIXED, RANDOM_AT
from trainers.data.conversation import IGNORED
from trainers.data.suite import Item
from trainers.training.guide_names import find_guide, fixed

from .budgets import keep_for_mean
from .random_order import RandomOrder
from .scores import ATTENTION, GUIDE, ORACLE, RELEVANCE, is_diagnostic

RANDOM = "random"
RIVALS = ("random", "uniform", "pool", "resize", "fastervlm", "divprune")
"""The training-free methods that every table shows beside a learned one."""
RANDOM_SEEDS = 5
ORDER_SEEDS = 2  # of `random@`, since the tower runs anew for each


@dataclass(frozen=True)
class View:
    """One encoded batch as the methods see it.

    Attributes:
        inputs: what a pruner may look at.
        items: the items.
        attention: (layers, 2, B, N) the full model's attention to image tokens, from the last prompt token and as the
            mean over all prompt tokens; None unless a method asks for it.
        relevance: (B, N) of the image tokens for the reference answer; None unless a method asks for it.
    """

    inputs: PruneInputs
    items: Sequence[Item]
    attention: Tensor | None = None
    relevance: Tensor | None = None
    guides: Mapping[str, Tensor] = field(default_factory=dict)  # (B, N) each, by the name of the guide: those asked for
    rows: tuple[int, ...] | None = None  # (B) number of the item that each row of the inputs is of; None: one each

    @property
    def pictures(self) -> list[tuple[int, int]]:
        """Of each row of the inputs: number of its item, and of the picture (or clip) in that, from 0."""
        rows = tuple(range(len(self.items))) if self.rows is None else self.rows
        return [(row, rows[:place].count(row)) for place, row in enumerate(rows)]


class Method(ABC):
    """One line of the table.

    Attributes:
        name: as on the command line.
        needs: signals that `encode` must bring.
        replicas: how many seeds it has; their results are averaged.
        wants_attention: whether it reads `View.attention`.
        wants_relevance: whether it reads `View.relevance`.
        wants_guide: which of `View.guides` it reads; None: none.
        by_frame: whether it sees the frames of a clip one by one, where others see the clip.
        remembers: whether it holds something of the steps of a stream before.
        fixed: whether at `auto:64` it keeps 64 tokens of every image although it could set budgets.
    """

    needs: tuple[str, ...] = ()
    replicas: int = 1
    wants_attention: bool = False
    wants_relevance: bool = False
    wants_guide: str | None = None
    by_frame: bool = False
    remembers: bool = False
    fixed: bool = False

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def pruner(self, view: View, replica: int = 0) -> Pruner:
        """The pruner to run on a batch."""

    def amount(self, view: View, keep: int | float | str) -> Keep:
        """What it is told to keep at a budget; where that is `auto:64` and it sets none here, 64 of every image."""
        if isinstance(keep, str):
            mean = auto_mean(keep)
            if mean is None:
                raise PruneZooError(
                    f"--keep {keep}: '{self.name}' sets no budgets; auto:64 gives it the same mean as those who do"
                )
            return int(mean)
        return keep


class PrunerMethod(Method):
    """A pruner, or the same pruner with several seeds.

    Args:
        name: as on the command line.
        pruners: one for each seed.
        depth: decoder layers over which a budget is meant as the mean; None: it is what the last stage leaves.
    """

    def __init__(self, name: str, pruners: Sequence[Pruner], depth: int | None = None) -> None:
        super().__init__(name)
        self.depth = depth
        self.pruners = [pruner.eval() for pruner in pruners]
        self.needs = encode_needs(pruners[0])
        self.replicas = len(pruners)
        self.remembers = any(part.remembers for part, _ in pruners[0].parts(1.0))

    def pruner(self, view: View, replica: int = 0) -> Pruner:
        """The one with this seed."""
        return self.pruners[replica]

    def amount(self, view: View, keep: int | float | str) -> Keep:
        """The budget, or what makes it the mean over the layers."""
        if isinstance(keep, str) and self.pruners[0].sets_budgets and not self.fixed:
            return keep
        amount = super().amount(view, keep)
        if self.depth is None:
            return amount
        return keep_for_mean(self.pruners[0], amount, view.inputs.valid.sum(1), self.depth)


class GivenScores(Pruner):
    """Keeps the best tokens of one batch, by scores (B, N) that are known; it is no method of the zoo."""

    name = "given"

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = scores

    def score(self, inputs: PruneInputs) -> Tensor:
        """The scores that it was given."""
        return self.scores


class ScoredMethod(Method):
    """A diagnostic that only rates the tokens."""

    @abstractmethod
    def rate(self, view: View) -> Tensor:
        """Scores (B, N), higher is kept first."""

    def pruner(self, view: View, replica: int = 0) -> Pruner:
        """One that keeps the best."""
        return GivenScores(self.rate(view)).eval()


class Oracle(ScoredMethod):
    """Keeps the tokens that lie on what the question is about, as the suite knows and no pruner can.

    A token is worth the highest relevance among its pixels; among equals, the one that is covered more. The token grid
    is taken to cover the whole picture, as it does wherever the processor does not crop.
    """

    def __init__(self) -> None:
        super().__init__(ORACLE)

    def rate(self, view: View) -> Tensor:
        """Relevance of each token, (B, N)."""
        shown = zip(view.pictures, view.inputs.cells.cpu(), strict=True)
        rows = [self._rate_picture(view.items[item], number, cells) for (item, number), cells in shown]
        return torch.stack(rows).to(view.inputs.features.device)

    @staticmethod
    def _rate_picture(item: Item, number: int, cells: Tensor) -> Tensor:
        """Relevance (N,) of one picture's tokens, or of a clip's; cells (N, 3) are tile, row and column."""
        if item.relevant is None:
            raise PruneZooError(
                f"{item.id}: the suite does not say which pixels matter, so `{ORACLE}` has nothing to keep"
            )
        tile, row, column = cells.unbind(1)
        pixels = torch.as_tensor(item.relevant, dtype=torch.float64).view(-1, *item.relevant.shape[-2:])[number:]
        tiles, grid = int(tile.max()) + 1, (int(row.max()) + 1, int(column.max()) + 1)
        if tiles not in (1, len(pixels)):
            raise PruneZooError(f"`{ORACLE}` knows images of one tile only; this model cuts them into several")
        pixels = pixels[:tiles]
        peak, cover = F.adaptive_max_pool2d(pixels, grid), F.adaptive_avg_pool2d(pixels, grid)
        # where all else is equal (the background), a fixed shuffle: row-major order would favour the top of the picture
        shuffle = torch.as_tensor(np.random.default_rng(0).permutation(peak.numel())).view(peak.shape)
        value = peak + 1e-3 * cover + 1e-9 * shuffle
        on_grid = (row >= 0) & (column >= 0)  # a newline or separator is not a patch
        return torch.where(on_grid, value[tile.clamp_min(0), row.clamp_min(0), column.clamp_min(0)], -1.0)


class LayerAttention(ScoredMethod):
    """Keeps what the full language model itself attends to at one layer; needs a whole forward pass first."""

    wants_attention = True

    def __init__(self, layer: int, mean: bool) -> None:
        super().__init__(f"{ATTENTION}-mean@{layer}" if mean else f"{ATTENTION}@{layer}")
        self.layer, self.mean = layer, mean

    def rate(self, view: View) -> Tensor:
        """Attention to each token, (B, N), mean over heads."""
        assert view.attention is not None  # wants_attention
        if self.layer >= len(view.attention):
            raise PruneZooError(f"{self.name}: the language model has layers 0 to {len(view.attention) - 1}")
        return view.attention[self.layer, int(self.mean)]


class Relevance(ScoredMethod):
    """Keeps what mattered to the reference answer, by the frozen model's own gradients; a teacher's map."""

    wants_relevance = True

    def __init__(self) -> None:
        super().__init__(RELEVANCE)

    def rate(self, view: View) -> Tensor:
        """The relevance map, (B, N)."""
        assert view.relevance is not None  # wants_relevance
        return view.relevance


class Guided(ScoredMethod):
    """Keeps what a guide of training says matters: how good a teacher it is, before anything is trained by it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.wants_guide = name.removeprefix(GUIDE)
        find_guide(self.wants_guide)

    def rate(self, view: View) -> Tensor:
        """Its map, (B, N)."""
        assert self.wants_guide is not None
        return view.guides[self.wants_guide]


def build_method(name: str, seed: int = 0, depth: int | None = None) -> Method:
    """The method of a name: a diagnostic, such as `oracle`, or what `load_pruner` takes.

    Diagnostics: `oracle`, `relevance`, `attention@L`, `attention-mean@L`, and `guide@NAME` of `guide_names.GUIDES`.

    Args:
        name: as on the command line; with `frames:` in front it sees the frames of a clip one by one, with `steps:` the
            steps of a stream, with `fixed:` it sets no budgets, and with `random@` it is a
            :class:`random_order.RandomOrder`.
        seed: where the seeds of `random` begin.
        depth: as :class:`PrunerMethod` takes it.

    Raises:
        PruneZooError: an unknown name, or a method that needs training.
    """
    if name.startswith(BY_FRAME):
        method = build_method(name.removeprefix(BY_FRAME), seed, depth)
        method.name, method.by_frame = name, True
        return method
    if name.startswith(BY_STEP):
        method = build_method(name.removeprefix(BY_STEP), seed, depth)
        method.name, method.remembers = name, False
        return method
    if name.startswith(FIXED):
        method = build_method(name.removeprefix(FIXED), seed, depth)
        method.name, method.fixed = name, True
        return method
    if name.startswith(RANDOM_AT):
        like = load_pruner(name.removeprefix(RANDOM_AT))
        return PrunerMethod(name, [RandomOrder(like, seed + replica) for replica in range(ORDER_SEEDS)])
    if name == ORACLE:
        return Oracle()
    if name == RELEVANCE:
        return Relevance()
    if name.startswith(GUIDE):
        return Guided(name)
    if is_diagnostic(name):
        kind, _, layer = name.partition("@")
        if not layer.isdigit():
            raise PruneZooError(f"--pruner {name}: write the layer as a number from 0, e.g. {kind}@2")
        return LayerAttention(int(layer), mean=kind != ATTENTION)
    if name == RANDOM:
        return PrunerMethod(name, [build_pruner(name, seed=seed + replica) for replica in range(RANDOM_SEEDS)])
    return PrunerMethod(name, [load_pruner(name)], depth)


def layer_attentions(layers: int) -> list[str]:
    """Names of all attention diagnostics of a language model with so many layers."""
    return [f"{kind}@{layer}" for kind in (ATTENTION, f"{ATTENTION}-mean") for layer in range(layers)]


def view_of(
    vlm: Any, batch: dict[str, Any], encoded: Encoded, items: Sequence[Item], methods: Sequence[Method]
) -> View:
    """All that these methods look at in one batch; what none of them asks for is not computed."""
    attention = relevance = None
    if any(method.wants_attention for method in methods):
        attention = attention_to_image(vlm, batch, encoded.inputs.valid)
    if any(method.wants_relevance for method in methods):
        relevance = relevance_map(vlm, encoded)
    names = {method.wants_guide for method in methods if method.wants_guide is not None}
    guides = {name: fixed(find_guide(name), vlm, encoded) for name in sorted(names)}
    return View(encoded.inputs, items, attention, relevance, guides, encoded.rows)


@torch.no_grad()
def attention_to_image(vlm: Any, batch: dict[str, Any], valid: Tensor) -> Tensor:
    """The full model's attention to its image tokens.

    Args:
        vlm: the model; its language model runs with eager attention for this one pass.
        batch: processor output with labels (B, L); the prompt is what stands before the first label.
        valid: (B, N) bool, which image tokens are there.

    Returns:
        (layers, 2, B, N): from the last prompt token, and mean over the prompt tokens; heads averaged.
    """
    forward = {name: value for name, value in batch.items() if name != "labels"}
    with eager_attention(vlm):
        attentions = vlm(**forward, output_attentions=True, use_cache=False).attentions
    labels = batch["labels"]
    image = batch["input_ids"] == vlm.config.image_token_id
    first = (labels != IGNORED).int().argmax(dim=1)  # (B,) where the answer begins
    place = torch.arange(labels.shape[1], device=labels.device)[None]
    prompt = (place < first[:, None]) & batch["attention_mask"].bool() & ~image  # (B, L)
    rows = torch.arange(len(labels), device=labels.device)
    result = valid.new_zeros((len(attentions), 2, *valid.shape), dtype=torch.float32)
    for layer, weights in enumerate(attentions):
        attention = weights.float().mean(dim=1)  # (B, L, L) mean over heads
        mean = (attention * prompt[:, :, None]).sum(1) / prompt.sum(1, keepdim=True)
        # image tokens stand in the prompt in the order of their slots, so both masks list them alike
        result[layer, 0][valid] = attention[rows, first - 1][image]
        result[layer, 1][valid] = mean[image]
    return result
