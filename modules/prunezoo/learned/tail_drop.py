"""Tail-drop latents: the rule of One-D-Piece for the tokens of a frozen vision-language model.

One-D-Piece: Image Tokenizer Meets Quality-Controllable Compression, Miwa et al., 2025,
https://arxiv.org/abs/2501.10064.

From the paper, where it is about coding pictures: learned queries make an ordered row of tokens, and in training the
row is cut at a random length, so that its head carries most. Here the row is what the language model reads in place of
its visual tokens, without quantisation, and ``keep`` is the length of the prefix: one checkpoint, every budget.

All of the architecture is ours. The visual tokens are read as PPM reads them (with the prompt, unless told not to), and
PPM's scores order them: latent j stands on the token that comes j-th, in that token's slot. It starts as that token,
asks all visual tokens twice, and those before it in the row, for what the row still lacks, then leans towards a mean of
the visual tokens, weighed by how well each answers the latent's own query and by its score, and adds a correction. So
untrained latents are the best tokens by the reader's scores, and trained ones lie among the tokens that the language
model knows. In training a small decoder rebuilds all visual tokens from the prefix.

Ours too is the stop rule, which `trainers.stop_rule` adds: what the last latent of a prefix knows tells how much is
lost by reading no more, and an image keeps the shortest prefix for which that is within a tolerance. A latent knows
only of those before it in the row, so the choice does not depend on how far the row was made.

A prefix longer than the row has, after all latents, the image's own tokens that come next; all tokens of an image are
its own.

Letters: B images, N image tokens, K kept, J latents of the whole row, S prefixes among which a stop rule chooses, I
images that it is calibrated on, D width of the language model, E hidden width.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.budgets import setting_for
from ..core.checks import require_no_nan
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.errors import PruneZooError
from ..core.plan import gather_rows, mask_to_index
from ..core.prefill import Prefill
from ..core.registry import register_pruner
from ._blocks import CrossAttention, Norm, SwiGLU, place_features
from ._sizes import attention_flops, feed_flops
from .ppm import PPM, PPMConfig


@dataclass(frozen=True)
class TailDropConfig(PPMConfig):
    """Sizes of the latents and, inherited, of the PPM that reads for them."""

    latents: int = 256  # J, length of the whole row; tokens beyond it are the image's own
    asks: int = 2  # blocks in which the latents ask the visual tokens and one another
    rebuild: float = 0.1  # weight of the rebuilt visual tokens in training
    stops: tuple[int, ...] = ()  # lengths among which a trained stop rule chooses, ascending; none: it has no rule
    tolerance: float = 0.05  # loss in nats that keep="auto" accepts

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("latents", "asks"):
            if getattr(self, name) < 1:
                raise PruneZooError(f"tail_drop: {name} must be at least 1, got {getattr(self, name)}")
        if self.rebuild < 0:
            raise PruneZooError(f"tail_drop: rebuild must be at least 0, got {self.rebuild}")
        stops = list(self.stops)
        if stops != sorted(set(stops)) or len(stops) == 1 or not all(1 <= stop <= self.latents for stop in stops):
            raise PruneZooError(
                f"tail_drop: stops must be two or more ascending lengths from 1 to latents={self.latents}, got {stops}"
            )
        if self.tolerance <= 0:
            raise PruneZooError(f"tail_drop: tolerance must be above 0, got {self.tolerance}")

    def flops(self, prefill: Prefill) -> int:
        """See the base class; with as many latents as are kept."""
        n, e, k = prefill.tokens, self.hidden, min(prefill.kept, self.latents)
        ask = attention_flops(k, n, e) + 8 * k * e**2 + 4 * k * k * e + feed_flops(k, e)
        weighing = 2 * (k + n) * e**2 + 2 * k * n * e + 2 * k * n * self.width
        return super().flops(prefill) + self.asks * ask + weighing + 2 * k * e * (1 + self.width)


@dataclass(frozen=True)
class TailDropOutput(PruneOutput):
    """A prefix, and in training how badly the visual tokens are rebuilt from it."""

    error: Tensor | None = None  # scalar: mean squared error, 1 where nothing but the mean token is known


@register_pruner("tail_drop")
class TailDrop(Pruner):
    """An ordered row of latents, of which the language model reads a prefix."""

    stage = "prompt"
    criteria = ("learned tokens",)
    config_class = TailDropConfig
    config: TailDropConfig

    def __init__(self, config: TailDropConfig | None = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        c = self.config
        shared = {name: getattr(c, name) for name in PPMConfig.__dataclass_fields__}
        self.reader = PPM(PPMConfig(**shared))
        self.queries = nn.Parameter(0.02 * torch.randn(c.latents, c.hidden))
        self.asks = nn.ModuleList(Ask(c.hidden, c.heads) for _ in range(c.asks))
        self.norm_query, self.norm_key = Norm(c.hidden), Norm(c.hidden)
        self.query, self.key = (nn.Linear(c.hidden, c.hidden, bias=False) for _ in range(2))
        nn.init.orthogonal_(self.query.weight)
        with torch.no_grad():
            self.key.weight.copy_(self.query.weight)
        self.lean, self.correct = nn.Linear(c.hidden, 1), nn.Linear(c.hidden, c.width)
        for layer in (self.lean, self.correct):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.lean.bias, -3.0)
        self.rebuilder = Rebuilder(c) if c.rebuild else None
        self.stop = StopRule(c.hidden, c.stops) if c.stops else None

    @classmethod
    def tiny_config(cls, feature_dim: int, text_dim: int) -> dict[str, Any]:
        """See the base class."""
        return {**PPM.tiny_config(feature_dim, text_dim), "latents": 20}

    @property
    def reads_prompt(self) -> bool:
        """As configured."""
        return self.config.query_aware

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """A prefix of ``keep`` latents of each image, in the order of their slots."""
        features, valid = inputs.features, inputs.valid
        # a latent sees none that comes after it, so those beyond the longest prefix need not be made
        latents, _, rank = self.latents(inputs, min(inputs.most_asked, self.config.latents))
        require_no_nan(latents, self.name, "made")
        index, kept = mask_to_index(rank < keep[:, None], inputs.most_asked)
        number = gather_rows(rank, index)
        own = (number >= latents.shape[1]) | (keep == valid.sum(1))[:, None]
        made = gather_rows(latents, number.clamp_max(latents.shape[1] - 1))
        made = torch.where(own[..., None], gather_rows(features, index), made)
        error = None
        if self.training and self.rebuilder is not None:
            error = self.rebuilder(inputs, made, index, kept)
        return TailDropOutput(index=index, valid=kept, features=made, error=error)

    @property
    def sets_budgets(self) -> bool:
        """Whether it has a stop rule."""
        return self.stop is not None

    def choose_budget(self, inputs: PruneInputs, mean: float | None) -> Tensor:
        """The shortest prefix of each image that is expected to be good enough, ``(B,)``."""
        assert self.stop is not None  # sets_budgets
        tolerance = self.config.tolerance if mean is None else self.stop.tolerance_of(mean)
        lengths = self.stop.lengths(self.stop(self.known(inputs)), tolerance)
        return lengths.minimum(inputs.valid.sum(1))

    def known(self, inputs: PruneInputs) -> Tensor:
        """What the last latents of the prefixes know among which the stop rule chooses, ``(B, S, E)``."""
        stops = torch.tensor(self.config.stops, device=inputs.valid.device)
        known = self.latents(inputs, min(max(self.config.stops), inputs.valid.shape[1]))[1]
        return known[:, (stops - 1).clamp_max(known.shape[1] - 1)]

    def loss_terms(self, output: PruneOutput) -> dict[str, Tensor]:
        """The error of rebuilding."""
        assert isinstance(output, TailDropOutput)
        return {} if output.error is None else {"rebuild": self.config.rebuild * output.error}

    def latents(self, inputs: PruneInputs, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The first ``count`` of the row, at most J and at most N.

        Returns:
            The latents ``(B, count, D)`` as the language model reads them; what they know ``(B, count, E)``; the place
            ``(B, N)`` long of each slot in the row, from 0, padding last.
        """
        valid = inputs.valid
        x = self.reader.read(inputs)
        scores = self.reader.rate(x)
        order = scores.detach().masked_fill(~valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
        anchors = order[:, :count]
        query = self.queries[:count] + gather_rows(x, anchors)
        for ask in self.asks:
            query = ask(query, x, valid)
        known = self.norm_query(query)
        weight = self.query(known) @ self.key(self.norm_key(x)).transpose(1, 2)  # (B, J, N)
        weight = weight.float() * self.config.hidden**-0.5 + scores[:, None]
        weight = weight.masked_fill(~valid[:, None], torch.finfo(torch.float32).min).softmax(-1)
        tokens = inputs.features.masked_fill(~valid[..., None], 0).float()
        own = gather_rows(tokens, anchors)
        mean = torch.einsum("bjn,bnd->bjd", weight, tokens)
        made = own + self.lean(known).sigmoid().float() * (mean - own) + self.correct(known).float()
        return made.to(inputs.features.dtype), known, order.argsort(1)


class Ask(nn.Module):
    """The latents attend to the visual tokens and each to those before it, then SwiGLU; all residual."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ask = CrossAttention(hidden, heads)
        self.norm = Norm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.feed = SwiGLU(hidden)

    def forward(self, query: Tensor, x: Tensor, valid: Tensor) -> Tensor:
        """Latents (B, J, E), tokens (B, N, E) and their validity: latents (B, J, E)."""
        query = query + self.ask(query, x, valid)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm(query)).chunk(3, -1))
        before = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        query = query + self.out(before.transpose(1, 2).flatten(2))
        return query + self.feed(query)


class Rebuilder(nn.Module):
    """Rebuilds all visual tokens from a prefix, by what stands where; used in training only."""

    def __init__(self, config: TailDropConfig) -> None:
        super().__init__()
        c = config
        self.octaves, self.width = c.octaves, c.width
        self.enter = nn.Linear(c.width, c.hidden, bias=False)
        self.place = nn.Linear(4 * c.octaves + 2, c.hidden)
        self.look = CrossAttention(c.hidden, c.heads)
        self.feed = SwiGLU(c.hidden)
        self.out = nn.Linear(c.hidden, c.width)

    def forward(self, inputs: PruneInputs, made: Tensor, index: Tensor, kept: Tensor) -> Tensor:
        """The error, a scalar, of a prefix (B, K, D) in the slots (B, K), where ``kept`` (B, K)."""
        target = F.rms_norm(inputs.features.detach().float(), (self.width,))
        places = self.place(place_features(inputs, self.octaves).to(self.out.weight.dtype))
        known = self.enter(F.rms_norm(made.to(places.dtype), (self.width,))) + gather_rows(places, index)
        x = places + self.look(places, known, kept)
        rebuilt = self.out(x + self.feed(x)).float()
        real = inputs.valid[..., None].float()
        mean = (target * real).sum((0, 1)) / real.sum()
        error, spread = ((value - target).square() * real for value in (rebuilt, mean.expand_as(target)))
        return error.sum() / spread.sum()


class StopRule(nn.Module):
    """Tells from what the last latent of a prefix knows how much the language model loses by reading no more.

    Args:
        hidden: E.
        stops: Lengths of the S prefixes among which it chooses, ascending.
    """

    def __init__(self, hidden: int, stops: tuple[int, ...]) -> None:
        super().__init__()
        self.see, self.tell = nn.Linear(hidden, hidden), nn.Linear(hidden, 1)
        self.stops = stops
        self.tolerances: Tensor
        self.means: Tensor
        # the mean length to which each tolerance leads; until it is calibrated, the longest
        self.register_buffer("tolerances", torch.logspace(-4, 1, 256))
        self.register_buffer("means", torch.full((256,), float(stops[-1])))

    def forward(self, known: Tensor) -> Tensor:
        """Expected losses (B, S) in nats, float32, above 0, from what the S latents know (B, S, E)."""
        return self.tell(F.silu(self.see(known)))[..., 0].float().exp()

    def choose(self, losses: Tensor, tolerance: float) -> Tensor:
        """Which prefix ``(B,)`` long is the shortest whose loss, of (B, S), is within the tolerance, else the last."""
        enough = losses <= tolerance
        enough[:, -1] = True
        return enough.int().argmax(1)  # the first of those that are equal

    def lengths(self, losses: Tensor, tolerance: float) -> Tensor:
        """The length ``(B,)`` long of the prefix that is chosen."""
        return torch.tensor(self.stops, device=losses.device)[self.choose(losses, tolerance)]

    def tolerance_of(self, mean: float) -> float:
        """The tolerance that leads to a mean length in tokens, between the rows of the table; its ends bound it."""
        return float(setting_for(torch.tensor(mean), self.means.float().flip(0), self.tolerances.float().flip(0)))

    @torch.no_grad()
    def calibrate(self, losses: Tensor) -> None:
        """Fill the table.

        Args:
            losses: (I, S) expected for images like those to come; not those that it has learned from.
        """
        for row, tolerance in enumerate(self.tolerances.float().tolist()):
            self.means[row] = self.lengths(losses, tolerance).double().mean()
