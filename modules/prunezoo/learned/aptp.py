"""APTP: a prompt is routed to one of a few budgets, which are learned with the router.

Not All Prompts Are Made Equal: Prompt-based Pruning of Text-to-Image Diffusion Models, Ganjdanesh et al., ICLR 2025,
https://arxiv.org/abs/2406.12042, code https://github.com/rezashkv/diffusion_pruning.

Written from a description of the code. There a hypernet makes gates for the parts of a U-Net of a prompt's embedding,
and the prompt is given the nearest of a few learned codes of gates, an architecture each. That the parts are tokens of
another pruner here, the inner one, in the order of its scores, and that a code is a budget, is ours.

Gates fall in a fixed order, as the paper's gates of depth do: of logits over a ladder of shares of the tokens, the
probabilities are added up from the top, and their log-odds, with 3 added so that gates begin open, over 0.4 through a
sigmoid, are the gates of the rungs; in training with Gumbel noise; hard at 0.5, with the gradient of the sigmoid. The
first rung is always on. A code's budget is the share at its highest open gate.

| | authors' code | ours |
|---|---|---|
| gates | heads, channels, blocks | rungs of a ladder of tokens |
| the router reads | the prompt's embedding by a frozen mpnet | means of the embedded words and of the image's tokens |
| assigned by | cosine of gates; in training Sinkhorn, then the best | the same |
| learns from | diffusion and two distillations | KL of the frozen model to itself |
| budgets | one checkpoint, one mean | `auto:64` stretches all codes by one factor, from how often each is given |
| noise of the codes | drawn anew in training, kept in use | none in use |
| then | an expert is tuned for each code | the model is frozen: one pruner serves all |

See `trainers.training.routed_budgets` for the losses. Letters: B images, R rungs, K codes, D width.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core.checks import require_no_nan
from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.errors import PruneZooError
from ..core.gates import straight_through
from ..core.prefill import Prefill
from ..core.registry import build_pruner, pruner_class, register_pruner

OFFSET, TEMPERATURE = 3.0, 0.4
HALVINGS = 40
MOST_CODES = 256


@dataclass(frozen=True)
class APTPConfig(PrunerConfig):
    """Whose budget is set, among which."""

    width: int = 4096  # D, of the language model's input embeddings
    inner: str = "ppm"  # registry name of the pruner whose budget is set, one that scores tokens; saved with it
    inner_config: dict[str, Any] = field(default_factory=dict)  # its config
    codes: int = 8  # K, budgets at most, from 2
    rungs: tuple[float, ...] = (1 / 36, 1 / 18, 1 / 9, 2 / 9, 1 / 3, 1 / 2, 1.0)  # shares of the tokens, ascending

    def __post_init__(self) -> None:
        """Check the ranges; the inner config is written out, so that it stays the same where a default changes."""
        rungs = list(self.rungs)
        if len(rungs) < 2 or rungs != sorted(set(rungs)) or not 0 < rungs[0] < rungs[-1] <= 1:
            raise PruneZooError(f"aptp: rungs must be two or more ascending shares in (0, 1], got {rungs}")
        if not 2 <= self.codes <= MOST_CODES or self.width < 1:
            raise PruneZooError(f"aptp: codes={self.codes} must be 2 to {MOST_CODES}, width={self.width} at least 1")
        if self.inner in ("aptp", "budget") or pruner_class(self.inner).stage != "prompt":
            raise PruneZooError(f"aptp: '{self.inner}' must be another method of the prompt stage, as ppm")
        if not issubclass(pruner_class(self.inner), Pruner) or pruner_class(self.inner).score is Pruner.score:
            raise PruneZooError(f"aptp: '{self.inner}' makes tokens: the inner method must score them, as ppm does")
        inner = pruner_class(self.inner).config_class.from_dict(self.inner_config, f"aptp: {self.inner}: ")
        object.__setattr__(self, "inner_config", inner.to_dict())

    def for_tokens(self, width: int) -> Self:
        """See the base class."""
        return super().for_tokens(width)._of_inner(lambda config: config.for_tokens(width))

    def for_prefill(self, prefill: Prefill) -> Self:
        """See the base class."""
        return self._of_inner(lambda config: config.for_prefill(prefill))

    def filled(self) -> Self:
        """See the base class."""
        return self._of_inner(lambda config: config.filled())

    def _of_inner(self, change: Callable[[PrunerConfig], PrunerConfig]) -> Self:
        inner = change(pruner_class(self.inner).config_class.from_dict(self.inner_config))
        return replace(self, inner_config=inner.to_dict())


def falling_gates(logits: Tensor, noise: Tensor | None = None) -> Tensor:
    """Gates in (0, 1) of the rungs, which never rise along the ladder where there is no noise.

    Args:
        logits: ``(..., R)``.
        noise: Added to the log-odds, ``(..., R)``.
    """
    above = logits.softmax(-1).flip(-1).cumsum(-1).flip(-1)  # of the first rung 1
    odds = above.clamp(1e-6, 1 - 1e-6).logit()
    gates = ((odds + OFFSET + (0 if noise is None else noise)) / TEMPERATURE).sigmoid()
    return torch.cat([torch.ones_like(gates[..., :1]), gates[..., 1:]], -1)


def opened(gates: Tensor) -> Tensor:
    """``(..., R)`` of value 0 or 1, open up to the first that is shut, with the gradient of ``gates``."""
    return straight_through((gates > 0.5).cumprod(-1), gates)


@register_pruner("aptp")
class APTP(Pruner):
    """Sets the budget of another pruner: ``keep="auto"`` for the budgets that it learned, ``"auto:64"`` for a mean of
    64 tokens. Any other ``keep`` is the other pruner's own.
    """

    criteria = ("parts",)
    config_class = APTPConfig
    config: APTPConfig

    def __init__(self, config: APTPConfig | None = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        c = self.config
        self.inner = build_pruner(c.inner, **c.inner_config)
        self.exact = self.inner.exact  # type: ignore[misc]  # of an instance: it follows the inner pruner
        self.route = nn.Linear(2 * c.width, len(c.rungs))
        nn.init.orthogonal_(self.route.weight)
        nn.init.zeros_(self.route.bias)
        self.codes = nn.Parameter(torch.randn(c.codes, len(c.rungs)))
        self.given: Tensor  # (K,) share of the prompts that each code was given; see `calibrate`
        self.register_buffer("given", torch.full((c.codes,), 1 / c.codes))

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # follows the inner pruner
        """What the inner pruner needs."""
        return tuple(self.inner.needs)

    @property
    def reads_prompt(self) -> bool:
        """The inner pruner does; `choose_budget` always."""
        return self.inner.reads_prompt

    @classmethod
    def tiny_config(cls, feature_dim: int, text_dim: int) -> dict[str, Any]:
        """See the base class."""
        inner = pruner_class("ppm").tiny_config(feature_dim, text_dim)
        return {"width": feature_dim, "inner": "ppm", "inner_config": inner, "codes": 3, "rungs": [0.1, 0.3, 0.6]}

    def adapt(self, vlm: nn.Module) -> AbstractContextManager[None]:
        """See the base class: the inner pruner's."""
        return self.inner.adapt(vlm)

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """What the inner pruner makes of it."""
        return self.inner.reduce(inputs, keep)

    def read(self, inputs: PruneInputs) -> Tensor:
        """``(B, 2 D)``: the mean word and the mean token, each of unit norm."""
        if inputs.text is None or inputs.text_valid is None:
            raise PruneZooError("aptp reads the prompt and got none: give text")
        if (width := inputs.features.shape[-1]) != self.config.width:
            raise PruneZooError(f"this aptp was built for tokens of width {self.config.width}, not {width}: build anew")
        pairs = ((inputs.text, inputs.text_valid), (inputs.features, inputs.valid))
        sums = [x.float().masked_fill(~real[..., None], 0).sum(1) for x, real in pairs]  # of the direction of the means
        return torch.cat([functional.normalize(one, dim=-1) for one in sums], -1)

    def values(self, inputs: PruneInputs) -> Tensor:
        """``(B, K)`` float32 in [0, 1]: the cosine of the gates that each prompt asks for to those of each code."""
        asked = falling_gates(self.route(self.read(inputs).to(self.route.weight.dtype)).float())
        return nearness(asked, falling_gates(self.codes.float()))

    @property
    def shares(self) -> Tensor:
        """``(K,)`` float: the budget of each code, as a share of the tokens, with its gradient."""
        return self.shares_of(opened(falling_gates(self.codes.float())))

    def shares_of(self, gates: Tensor) -> Tensor:
        """``(...)`` float: the share up to the highest open of ``gates (..., R)``."""
        rungs = torch.tensor(self.config.rungs, device=gates.device)
        steps = rungs.diff(prepend=rungs.new_zeros(1))
        return (gates * steps).sum(-1)

    def choose_budget(self, inputs: PruneInputs, mean: float | None) -> Tensor:
        """Tokens for each image ``(B,)`` long, by the nearest code.

        Args:
            inputs: The images and their prompts.
            mean: Tokens wanted in the mean over prompts like those calibrated on; bounded by 1 token and by all. None:
                what the codes learned.
        """
        values = self.values(inputs)
        require_no_nan(values, self.name, "valued")
        available = inputs.valid.sum(1)
        share = self.shares.detach().expand(len(values), -1)
        if mean is not None:
            share = self.stretched(share, mean / available)
        chosen = share.gather(1, values.argmax(1, keepdim=True))[:, 0]
        return (chosen.double() * available).round().long().clamp_min(1)

    def stretched(self, shares: Tensor, mean: Tensor) -> Tensor:
        """``(B, K)``: shares by one factor an image, at most 1, whose mean over what is given is ``mean (B,)``."""
        low, high = torch.zeros_like(mean), torch.full_like(mean, 1 / min(self.config.rungs))
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            over = ((shares * middle[:, None]).clamp_max(1) * self.given).sum(1) > mean
            low, high = torch.where(over, low, middle), torch.where(over, middle, high)
        return (shares * high[:, None]).clamp_max(1)

    @torch.no_grad()
    def calibrate(self, values: Tensor) -> None:
        """Note how often each code is given, from ``values (I, K)`` of items like those to come, none of the test."""
        self.given.copy_(functional.one_hot(values.argmax(1), self.config.codes).float().mean(0))


def nearness(asked: Tensor, codes: Tensor) -> Tensor:
    """``(B, K)``: cosine of gates ``(B, R)`` to gates ``(K, R)``."""
    return functional.normalize(asked, dim=-1) @ functional.normalize(codes, dim=-1).mT
