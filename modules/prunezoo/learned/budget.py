"""A policy that sets the budget: how many tokens of this image does this prompt need?

AVG-LLaVA: A Large Multimodal Model with Adaptive Visual Granularity, Lan et al., 2024,
https://arxiv.org/abs/2410.02745.

A contextual bandit over a few budgets of another pruner, its arms: M3's scales, the prefixes of a tail-drop tokenizer,
PPM's token counts. Nobody has published one for frozen models that we know of; the nearest is the router of
AVG-LLaVA, which learns from the losses of all scales under the frozen model. As there, every arm's reward can be
enumerated and cached, so that the gradient is exact. Ours altogether.

A PPM reads image and prompt; what it finds says how much each arm is worth, and the policy is
``softmax((value - price * share) / temperature)``. Since the price enters so, one checkpoint serves every mean budget:
after training, a table says which price leads to which mean. In use the best arm is taken.

Letters: B images, N image tokens, E hidden width, A arms, M rows of the table.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..core.budgets import setting_for
from ..core.checks import require_no_nan
from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.errors import PruneZooError
from ..core.hub import parts_of
from ..core.prefill import Prefill
from ..core.registry import build_pruner, pruner_class, register_pruner
from ._blocks import Norm
from .ppm import PPM, PPMConfig

ROWS = 129
"""Rows of the table of prices."""


@dataclass(frozen=True)
class BudgetConfig(PrunerConfig):
    """Whose budget is set, among which, and by a reader of which size."""

    inner: str = "m3"  # registry name of the pruner whose budget is set; it is saved in the same folder
    inner_config: dict[str, Any] = field(default_factory=dict)  # its config
    reader_config: dict[str, Any] = field(default_factory=dict)  # of the PPM that reads image and prompt
    arms: tuple[float, ...] = (1 / 64, 1 / 36, 1 / 16, 1 / 9, 1 / 4, 1.0)  # shares of the tokens, ascending
    temperature: float = 0.05  # > 0, of the policy while it learns, in units of the reward

    def __post_init__(self) -> None:
        if len(self.arms) < 2 or list(self.arms) != sorted(set(self.arms)) or not 0 < self.arms[0] < self.arms[-1] <= 1:
            raise PruneZooError(f"budget: arms must be two or more ascending shares in (0, 1], got {list(self.arms)}")
        if self.temperature <= 0:
            raise PruneZooError(f"budget: temperature must be above 0, got {self.temperature}")
        # Before the config of the inner one is read: no budgets inside of budgets, however deep.
        if self.inner == "budget" or pruner_class(self.inner).stage != "prompt":
            raise PruneZooError(f"budget: '{self.inner}' must be another method of the prompt stage")
        # The fields in full: so a saved policy stays the same where a default changes.
        inner = pruner_class(self.inner).config_class.from_dict(self.inner_config, f"budget: {self.inner}: ")
        object.__setattr__(self, "inner_config", inner.to_dict())
        reader = PPMConfig.from_dict(self.reader_config, "budget: reader_config: ")
        object.__setattr__(self, "reader_config", reader.to_dict())

    def for_tokens(self, width: int) -> Self:
        """See the base class."""
        return self._of_both(lambda config: config.for_tokens(width))

    def for_prefill(self, prefill: Prefill) -> Self:
        """See the base class: each of the two by its own `budget_flops`."""
        return self._of_both(lambda config: config.for_prefill(prefill))

    def filled(self) -> Self:
        """See the base class."""
        return self._of_both(lambda config: config.filled())

    def _of_both(self, change: Callable[[PrunerConfig], PrunerConfig]) -> Self:
        inner = change(pruner_class(self.inner).config_class.from_dict(self.inner_config))
        reader = change(PPMConfig.from_dict(self.reader_config))
        return replace(self, inner_config=inner.to_dict(), reader_config=reader.to_dict())


@register_pruner("budget")
class BudgetPolicy(Pruner):
    """Sets the budget of another pruner: ``keep="auto"`` for the mean that it was trained for, ``"auto:64"`` for a mean
    of 64 tokens. Any other ``keep`` is the other pruner's own.
    """

    criteria = ("parts",)
    config_class = BudgetConfig
    config: BudgetConfig

    def __init__(self, config: BudgetConfig | None = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        c = self.config
        self.inner = build_pruner(c.inner, **c.inner_config)
        if parts_of(self.inner):
            raise PruneZooError(f"budget: '{c.inner}' must have no LoRA for its budget to be set")
        self.exact = self.inner.exact  # type: ignore[misc]  # of an instance: it follows the inner pruner
        self.reader = PPM(**c.reader_config)
        width = self.reader.config.hidden
        self.norm = Norm(2 * width)
        self.hidden = nn.Linear(2 * width + 1, width)
        self.head = nn.Linear(width, len(c.arms))
        # Until it has been calibrated every price leads to the mean of the arms; see `calibrate`.
        self.prices: Tensor
        self.means: Tensor
        self.default_mean: Tensor
        self.register_buffer("prices", torch.logspace(-3, 2, ROWS))
        self.register_buffer("means", torch.full((ROWS,), sum(c.arms) / len(c.arms)))
        self.register_buffer("default_mean", torch.tensor(sum(c.arms) / len(c.arms)))

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
        ppm = PPM.tiny_config(feature_dim, text_dim)
        return {"inner": "ppm", "inner_config": ppm, "reader_config": ppm, "arms": [0.1, 0.4]}

    def adapt(self, vlm: nn.Module) -> AbstractContextManager[None]:
        """See the base class: the inner pruner's."""
        return self.inner.adapt(vlm)

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """What the inner pruner makes of it."""
        return self.inner.reduce(inputs, keep)

    def choose_budget(self, inputs: PruneInputs, mean: float | None) -> Tensor:
        """Tokens for each image ``(B,)``, so that they are ``mean`` in the mean over images like those calibrated on.

        Args:
            inputs: The images and their prompts.
            mean: In tokens, bounded by what the arms allow; None: the share that it was trained for.
        """
        available = inputs.valid.sum(1)
        wanted = self.default_mean.expand(len(available)) if mean is None else mean / available
        values = self.values(inputs)
        require_no_nan(values, self.name, "valued")
        arm = self.best_arm(values, self.price_of(wanted))
        # In double precision, as the same share would be counted: an arm is what it was when its rewards were.
        share = torch.tensor(self.config.arms, dtype=torch.double, device=arm.device)[arm]
        return (share * available).round().long().clamp_min(1)

    @property
    def shares(self) -> Tensor:
        """The arms, ``(A,)``."""
        return torch.tensor(self.config.arms, device=self.prices.device)

    def values(self, inputs: PruneInputs) -> Tensor:
        """What each arm is worth, in units of the reward that was trained for: ``(B, A)`` float32."""
        valid = inputs.valid
        x = self.reader.read(inputs)
        log_share = self.reader.rate(x).masked_fill(~valid, torch.finfo(torch.float32).min).log_softmax(-1)
        share = log_share.exp()
        spread = -(share * log_share.masked_fill(~valid, 0.0)).sum(-1, keepdim=True)  # over how many tokens it looks
        looked = (share.to(x.dtype)[..., None] * x).sum(1)
        whole = x.masked_fill(~valid[..., None], 0.0).sum(1) / valid.sum(1, keepdim=True).clamp_min(1)
        seen = torch.cat([self.norm(torch.cat([looked, whole], -1)), spread.to(x.dtype)], dim=-1)
        return self.head(nn.functional.silu(self.hidden(seen))).float()

    def logits(self, values: Tensor, price: Tensor) -> Tensor:
        """Of the policy ``(B, A)``, by :meth:`values` and a price ``(B,)`` of all the image's tokens."""
        return (values - price[:, None] * self.shares) / self.config.temperature

    def best_arm(self, values: Tensor, price: Tensor) -> Tensor:
        """The arm ``(B,)`` long that is worth most at a price ``(B,)``."""
        return self.logits(values, price).argmax(1)

    def price_of(self, mean: Tensor) -> Tensor:
        """The price ``(B,)`` that leads to a mean share ``(B,)``, between the rows of the table; its ends bound it."""
        return setting_for(mean, self.means.flip(0), self.prices.flip(0))

    @torch.no_grad()
    def calibrate(self, values: Tensor, default_mean: float) -> None:
        """Fill the table of prices.

        Args:
            values: ``(items, A)`` of :meth:`values`, of items like those to come; never of the test split.
            default_mean: Share that ``keep="auto"`` stands for.
        """
        for row, price in enumerate(self.prices):
            self.means[row] = self.shares[self.best_arm(values, price.expand(len(values)))].mean()
        self.default_mean.fill_(default_mean)
