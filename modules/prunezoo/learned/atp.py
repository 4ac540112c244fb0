"""ATP: between the layers of the language model, small heads decide which image tokens go on.

ATP-LLaVA: Adaptive Token Pruning for Large Vision Language Models, Ye et al., CVPR 2025,
https://arxiv.org/abs/2412.00447.

From the paper: between decoder layers, small heads decide which visual tokens go on, for each instance and layer anew.
A token's redundancy score is the mean of the attention that it receives from visual tokens (self) and from the prompt
(cross); spatial pruning adds tokens of a uniform grid, which score ``1 - lambda * rate``. A small network reads the
score statistics of the instance and sets a threshold for each of the two; what passes either stays. Training uses soft
masks ``max(sigmoid(redundant - t_r), sigmoid(spatial - t_s))`` and asks for a mean token count; inference drops tokens.

Reconstructed, since neither the paper's code nor its full text could be had: scores are compared as log-odds, after
both attentions are scaled to [0, 1] within the instance (raw means are about 1/N, so that any fixed threshold would
drop everything); the redundancy threshold is a learned displacement from the score that would keep exactly the token
count asked for, so that one checkpoint serves every budget; grids of several rates let the spatial threshold choose a
density; the mean count over all decoder layers is split over the pruned layers by a fixed `taper` instead of a price by
depth; each training batch meets that mean exactly, by a common shift of its thresholds, and a loss of its own makes the
shift nothing; gates are hard in value; the frozen model is distilled instead of fine-tuned. Ours altogether is `hidden`
above 0: a learned correction of the scores, which reads the tokens and the prompt as they stand at the layer.

Letters: B images, N visual tokens alive, T prompt tokens, D width of the language model, E hidden width.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.checks import require_no_nan
from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.errors import PruneZooError
from ..core.gates import budgeted_sigmoid, soft_threshold, straight_through, threshold_mask, topk_mask
from ..core.plan import mask_to_index
from ..core.registry import register_pruner
from ._blocks import Norm, VisualBlock, place_features

QUANTILES = 9  # of each of the two attentions, that the thresholds are made from
FLOOR = 1e-3  # scores in [0, 1] are read as log-odds no further out than this
REACH = 4.0  # log-odds that a unit of its head displaces a threshold by: thresholds have far to go in few steps
OFF = 2.0  # spatial threshold before training, in log-odds: no grid passes it


@dataclass(frozen=True)
class ATPConfig(PrunerConfig):
    """Where an ATP stands and what it may learn."""

    layers: tuple[int, ...] = (4, 14, 24)  # decoder layers in front of which it prunes, ascending
    taper: float = 0.5  # share of the token count before that each further layer aims at
    adaptive: bool = True  # False: no thresholds, each image keeps exactly the count that is aimed at
    spatial_weight: float = 3.0  # lambda: a token on the grid of every s-th row and column scores 1 - lambda / s^2
    strides: tuple[int, ...] = (4, 3, 2)  # s, the grids
    least: int = 1  # tokens that are kept of an image whatever the thresholds say
    hidden: int = 0  # E, width of the learned correction of the scores; 0: none, as in the paper
    heads: int = 2  # attention heads of the correction
    width: int = 4096  # D, width of the language model; unused without correction

    def __post_init__(self) -> None:
        if not self.layers or list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0:
            raise PruneZooError(f"atp: layers must be ascending numbers from 0, got {list(self.layers)}")
        if not 0.0 < self.taper <= 1.0:
            raise PruneZooError(f"atp: taper must lie in (0, 1], got {self.taper}")
        if self.least < 1:
            raise PruneZooError(f"atp: least must be at least 1, got {self.least}")
        if any(stride < 1 for stride in self.strides) or len(set(self.strides)) < len(self.strides):
            raise PruneZooError(f"atp: strides must be different numbers from 1, got {list(self.strides)}")
        if self.hidden < 0 or self.heads < 1 or self.hidden % (2 * self.heads):
            raise PruneZooError(f"atp: hidden={self.hidden} must be 0 or a multiple of 2 * heads={2 * self.heads}")


@register_pruner("atp")
class ATP(Pruner):
    """Keeps as many tokens of each image, in front of each of some decoder layers, as the image and the prompt ask for.

    ``keep`` is the mean aimed at: over images, and over all decoder layers, those in front of the first pruned one
    included. So less than these leave cannot be had. An image that is asked for all its tokens keeps them all.
    """

    stage = "layer"
    criteria = ("learned score",)
    needs = ("self_attention", "prompt_attention")
    exact = False
    config_class = ATPConfig
    config: ATPConfig

    def __init__(self, config: ATPConfig | None = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        c = self.config
        self.thresholds = nn.ModuleList(Thresholds(2 * QUANTILES + 3 + c.hidden) for _ in c.layers)
        self.corrections = nn.ModuleList(Correction(c.width, c.hidden, c.heads) for _ in c.layers if c.hidden)

    @classmethod
    def tiny_config(cls, feature_dim: int, text_dim: int) -> dict[str, Any]:
        """See the base class."""
        return {"layers": (1,), "hidden": 16, "width": feature_dim}

    def stages(self, depth: int) -> tuple[int, ...]:
        """See the base class."""
        if self.config.layers[-1] >= depth:
            raise PruneZooError(f"atp: layer {self.config.layers[-1]} is none of this decoder's, 0 to {depth - 1}")
        return self.config.layers

    def schedule(self, keep: Tensor, available: Tensor, depth: int) -> list[Tensor]:
        """Counts that each layer aims at: falling by `taper`, none above ``available``, ``keep`` in the layers' mean.

        Where a whole number of tokens does not divide evenly, the mean stays below ``keep``.
        """
        layers = self.stages(depth)
        spans = [after - layer for layer, after in zip(layers, (*layers[1:], depth), strict=True)]
        budget = keep * depth - available * layers[0]  # token-layers left to share out
        counts: list[Tensor] = []
        for i, span in enumerate(spans):
            weights = sum(later * self.config.taper**j for j, later in enumerate(spans[i:]))
            count = (budget / weights).round() if i + 1 < len(spans) else budget // span
            count = torch.minimum(count.long().clamp_min(1), counts[-1] if counts else available)
            counts.append(count)
            budget = budget - count * span
        return counts

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """See the base class; scores are margins above the thresholds."""
        valid = inputs.valid
        margins = self.margins(inputs, keep).masked_fill(~valid, -torch.inf)
        require_no_nan(margins, self.name, "scored")
        everything = (keep >= valid.sum(1))[:, None]
        if not self.config.adaptive:
            mask = topk_mask(margins.detach(), valid, keep)
            soft = budgeted_sigmoid(margins, valid, keep, self.gate_temperature)
        else:
            shifted = margins - self.batch_shift(margins, valid & ~everything, keep) if self.training else margins
            mask = threshold_mask(shifted.detach(), valid, self.config.least)
            soft = (shifted / self.gate_temperature).sigmoid()
        mask = mask | everything & valid
        gates = straight_through(mask, soft.masked_fill(everything, 1.0)) if self.training else None
        index, kept = mask_to_index(mask)
        return PruneOutput(index=index, valid=kept, scores=margins, gates=gates)

    def loss_terms(self, output: PruneOutput) -> dict[str, Tensor]:
        """`mean`: how far the count of the batch by its own thresholds is from the one asked for, relative, squared."""
        if not self.config.adaptive or output.gates is None or output.scores is None:
            return {}
        real = output.scores.isfinite()
        real = real & ~(output.gates.detach() > 0).logical_or(~real).all(1, keepdim=True)  # without those that keep all
        own = straight_through(output.scores >= 0, (output.scores / self.gate_temperature).sigmoid())
        asked = output.gates.detach().masked_fill(~real, 0.0).sum().clamp_min(1.0)
        return {"mean": (own.masked_fill(~real, 0.0).sum() / asked - 1).square()}

    def batch_shift(self, margins: Tensor, valid: Tensor, keep: Tensor) -> Tensor:
        """(): what all thresholds of a training batch must rise by for its mean count to be exactly the one asked for.

        So what the model says of a choice teaches which image should get more and which less, never more for all; that
        the shift comes to nothing is left to a loss of its own, see :meth:`loss_terms`.
        """
        if not bool(valid.any()):
            return margins.new_zeros(())
        total = keep.where(valid.any(1), 0).sum()[None]
        return keep_threshold(margins.reshape(1, -1), valid.reshape(1, -1), total, self.gate_temperature)[0, 0]

    def margins(self, inputs: PruneInputs, keep: Tensor) -> Tensor:
        """(B, N) float32: how far each token is above the nearer of its two thresholds, in log-odds."""
        c, valid = self.config, inputs.valid
        own, asked = (rescale(inputs.signal(name).float(), valid) for name in self.needs)
        redundant = log_odds((own + asked) / 2)
        statistics = [quantiles(own, valid), quantiles(asked, valid)]
        if c.hidden:
            correction, prompt = self.corrections[inputs.step](inputs, log_odds(own), log_odds(asked))
            redundant = redundant + correction
            statistics.append(prompt)
        start = keep_threshold(redundant, valid, keep, self.gate_temperature)
        sizes = torch.stack([keep, valid.sum(1)], dim=1).clamp_min(1).log()
        displacement, level = self.ask_head(inputs.step, torch.cat([*statistics, start.detach(), sizes], dim=1))
        spatial = log_odds(spatial_scores(inputs.cells, c.strides, c.spatial_weight))
        return torch.maximum(redundant - start - displacement, spatial - level)

    def ask_head(self, step: int, statistics: Tensor) -> tuple[Tensor, Tensor]:
        """What the :class:`Thresholds` of a pruned layer, from 0, say of statistics (B, S)."""
        displacement, level = self.thresholds[step](statistics)
        return displacement, level


class Thresholds(nn.Module):
    """From the statistics of an instance to its two thresholds."""

    def __init__(self, statistics: int, hidden: int = 64) -> None:
        super().__init__()
        self.enter = nn.Linear(statistics, hidden)
        self.displacement, self.level = nn.Linear(hidden, 1), nn.Linear(hidden, 1)
        for head, bias in ((self.displacement, 0.0), (self.level, OFF)):  # before training: the count asked for
            nn.init.zeros_(head.weight)
            nn.init.constant_(head.bias, bias)

    def forward(self, statistics: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S) to (B, 1) displacement of the redundancy threshold, and (B, 1) spatial threshold, in log-odds."""
        x = F.silu(self.enter(statistics.to(self.enter.weight.dtype)))
        return REACH * self.displacement(x).float(), self.level(x).float()


class Correction(nn.Module):
    """What the redundancy scores miss; zero before training."""

    OCTAVES = 4

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.width = width
        self.project = nn.Linear(width, hidden, bias=False)  # one map for both, so that likeness survives it
        nn.init.orthogonal_(self.project.weight)
        self.place = nn.Linear(4 * self.OCTAVES + 2 + 2, hidden)
        self.block = VisualBlock(hidden, heads, query_aware=True)
        self.norm = Norm(hidden)
        self.head = nn.Linear(hidden + 2, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, inputs: PruneInputs, own: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
        """Log-odds of both attentions (B, N): the correction (B, N), and the prompt in short (B, E)."""
        if inputs.text is None or inputs.text_valid is None:
            raise PruneZooError("this ATP reads the prompt and got none: give text, or build it with hidden=0")
        if inputs.features.shape[-1] != self.width:
            raise PruneZooError(
                f"this ATP was built for tokens of width {self.width}, the model's have {inputs.features.shape[-1]}: "
                f"build it with width={inputs.features.shape[-1]}"
            )
        dtype = self.head.weight.dtype
        attention = torch.stack([own, asked], dim=-1).to(dtype)
        place = place_features(inputs, self.OCTAVES).to(dtype)
        x = self._enter(inputs.features) + self.place(torch.cat([place, attention], dim=-1))
        words = self._enter(inputs.text)
        x = self.norm(self.block(x, inputs.valid, words, inputs.text_valid))
        real = inputs.text_valid[..., None]
        prompt = words.masked_fill(~real, 0.0).sum(1) / real.sum(1).clamp_min(1)
        return self.head(torch.cat([x, attention], dim=-1)).squeeze(-1).float(), prompt.float()

    def _enter(self, tokens: Tensor) -> Tensor:
        """Tokens (B, ·, D) as (B, ·, E), from unit RMS."""
        tokens = tokens.to(self.head.weight.dtype)
        return self.project(F.rms_norm(tokens, tokens.shape[-1:]))


def rescale(attention: Tensor, valid: Tensor) -> Tensor:
    """Attention (B, N) from 0, the least token of its image, to 1, the greatest; 0 on padding."""
    low = attention.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
    high = attention.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    return ((attention - low) / (high - low).clamp_min(torch.finfo(attention.dtype).tiny)).masked_fill(~valid, 0.0)


def log_odds(share: Tensor) -> Tensor:
    """``log(p / (1 - p))``, with p held within [FLOOR, 1 - FLOOR]."""
    return share.clamp(FLOOR, 1 - FLOOR).logit()


def quantiles(values: Tensor, valid: Tensor) -> Tensor:
    """Evenly spaced quantiles of the valid values (B, N) of each row, least and greatest included: (B, QUANTILES)."""
    levels = torch.linspace(0, 1, QUANTILES, device=values.device)
    return values.masked_fill(~valid, torch.nan).nanquantile(levels, dim=1).T


def keep_threshold(scores: Tensor, valid: Tensor, keep: Tensor, temperature: float) -> Tensor:
    """(B, 1): the ``keep``-th best score of each row, with the gradient of the soft threshold for so many tokens."""
    soft = soft_threshold(scores, valid, keep, temperature)
    ranked = scores.detach().masked_fill(~valid, -torch.inf).sort(dim=1, descending=True).values
    return ranked.gather(1, (keep - 1).clamp_min(0)[:, None]) + (soft - soft.detach())


def spatial_scores(cells: Tensor, strides: tuple[int, ...], weight: float) -> Tensor:
    """What a token's place is worth: ``1 - weight / stride^2`` on the coarsest grid that it lies on, else 0.

    Args:
        cells: (B, N, 3) tile, row, column; -1 for what is no patch.
        strides: Of the grids; each has the middle of its first rows and columns, in every tile.
        weight: lambda.

    Returns:
        (B, N) float32 in [0, 1].
    """
    place = cells[..., 1:]
    scores = place.new_zeros(place.shape[:2], dtype=torch.float32)
    for stride in strides:
        on_grid = (place >= 0).all(-1) & (place % stride == stride // 2).all(-1)
        scores = torch.where(on_grid, scores.clamp_min(1 - weight / stride**2), scores)
    return scores
