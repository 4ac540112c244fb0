"""Consensus: gates that open and close units sample by sample learn to agree, and one static sub-network is left.

A consensus sub-network by straight-through binary gates trained together with the weights (v5 of January 2025; no code,
and its losses could not be found). Known of it: gates are dynamic while training and are polarised, so that samples
agree and no gate is left at inference; 14 to 22 % fewer operations for layers and channels.

Reconstructed, all that is behind that: a unit's gate reads the mean over the tokens of its own absolute activations,
g = step(a * activation + b), with the gradient of the sigmoid; the loss is the recipe's, plus
`agree` * |mean gate - share| for the share of the parameters that is to stay, plus `polarise` * the mean over units of
m (1 - m), m the gate's mean over the samples of a batch, which rises evenly over the first `ramp` steps.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunezoo.core.contract import PruneOutput
from prunezoo.core.errors import PruneZooError
from prunezoo.learned.ppm import PPM, PPMConfig

from .units import Layer, choose, crop, layers_of, total
from .weights import check_sparsity

MEMORY = 0.98
"""What the running mean of a gate keeps a step."""


@dataclass(frozen=True)
class ConsensusConfig(PPMConfig):
    """Sizes of the PPM to begin with, and how its gates learn."""

    sparsity: float = 0.5  # share of all parameters that goes, in (0, 1)
    agree: float = 1.0  # weight of the distance from the share that is to stay
    polarise: float = 1.0  # weight of the disagreement between samples
    ramp: int = 200  # steps over which that weight rises

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sparsity(self.sparsity)
        if min(self.agree, self.polarise) < 0 or self.ramp < 1:
            raise PruneZooError(
                f"consensus: agree={self.agree} and polarise={self.polarise} must be at least 0, ramp={self.ramp} 1"
            )


class Gate(nn.Module):
    """Multiplies the channels of each unit by 0 or 1.

    Args:
        layer: Whose units.
    """

    open_for: Tensor
    drawn: Tensor | None = None  # (B, U) of the last batch, with gradient
    static: Tensor | None = None  # (U,) bool: what every sample gets outside of training

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.channels = layer.channels
        self.scale, self.bias = nn.Parameter(torch.zeros(layer.units)), nn.Parameter(torch.full((layer.units,), 2.0))
        self.register_buffer("open_for", torch.ones(layer.units))  # running share of the samples

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, U * C) to the same."""
        if not self.training:
            assert self.static is not None
            return x * self.static.repeat_interleave(self.channels).to(x)
        units = x.unflatten(-1, (-1, self.channels))
        active = units.detach().abs().mean((1, 3))  # (B, U)
        soft = (self.scale * active.to(self.scale) + self.bias).sigmoid()
        hard = (soft > 0.5).to(soft)
        self.drawn = hard + soft - soft.detach()
        with torch.no_grad():
            self.open_for.lerp_(hard.mean(0), 1 - MEMORY)
        return x * self.drawn[:, None].repeat_interleave(self.channels, -1).to(x)


class ConsensusPPM(PPM):
    """A PPM with gates while it is trained; what it is validated and saved as is the smaller PPM that they agree on.

    For recipes, in place of the PPM that is to be trained.
    """

    config_class = ConsensusConfig
    config: ConsensusConfig
    seen: Tensor

    def __init__(self, config: ConsensusConfig | None = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        self.layers = layers_of(self)
        self.gates = nn.ModuleList(Gate(layer) for layer in self.layers)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))  # steps
        for layer, gate in zip(self.layers, self.gates, strict=True):
            self.get_submodule(layer.behind).register_forward_pre_hook(lambda _, given, gate=gate: (gate(given[0]),))
        self.keeps()  # refuses at once what cannot be reached

    def loss_terms(self, output: PruneOutput) -> dict[str, Tensor]:
        """What draws the gates to the share that is to stay, and to one another."""
        self.seen += 1
        whole, left = total_of(self), torch.zeros((), device=self.head.weight.device)
        apart: list[Tensor] = []
        for layer, gate in zip(self.layers, self.gates, strict=True):
            mean = gate.drawn.mean(0)  # type: ignore[operator]
            left = left + layer.parameters * mean.sum()
            apart.append(mean * (1 - mean))
        inner = sum(layer.parameters * layer.units for layer in self.layers)
        goal = ((1 - self.config.sparsity) * whole - (whole - inner)) / inner
        ramp = (self.seen / self.config.ramp).clamp_max(1)
        return {
            "agree": self.config.agree * (left / inner - goal).abs(),
            "polarise": self.config.polarise * ramp * torch.cat(apart).mean(),
        }

    def agreement(self) -> float:
        """Mean over units of the share of the samples that are on the same side, in [0.5, 1]."""
        share = torch.cat([gate.open_for for gate in self.gates])  # type: ignore[misc]
        return float(torch.maximum(share, 1 - share).mean())

    def keeps(self) -> dict[str, Tensor]:
        """For each layer by name, (U,) bool: the units that are open for most, as many as may stay."""
        worth = {
            layer.name: gate.open_for + 1e-3 * gate.bias.sigmoid()  # type: ignore[operator]
            for layer, gate in zip(self.layers, self.gates, strict=True)
        }
        return choose(self, worth, int((1 - self.config.sparsity) * total_of(self)) + total(self) - total_of(self))

    def train(self, mode: bool = True) -> "ConsensusPPM":
        """Outside of training gates are what they agreed on."""
        if not mode and hasattr(self, "gates"):
            keep = self.keeps()
            for layer, gate in zip(self.layers, self.gates, strict=True):
                gate.static = keep[layer.name].to(self.head.weight.device)
        return super().train(mode)

    def agreed(self) -> PPM:
        """The smaller PPM, without gates."""
        own = {one.name: getattr(self.config, one.name) for one in fields(PPMConfig)}
        plain = PPM(PPMConfig(**own)).to(self.head.weight.dtype)
        state = self.state_dict()
        plain.load_state_dict({name: state[name] for name in plain.state_dict()})
        plain.base_model = self.base_model
        return crop(plain, self.keeps())

    def save_pretrained(self, folder: str | Path) -> Path:
        """Save what the gates agreed on, as a PPM."""
        return self.agreed().save_pretrained(folder)


def total_of(gated: ConsensusPPM) -> int:
    """Parameters without the gates'."""
    return total(gated) - sum(weight.numel() for weight in gated.gates.parameters())
