"""What can be taken out of a PPM: heads of its attentions and inner units of its feed-forward layers.

A unit goes with its rows in the matrices before it and its columns in the one behind it; what is left is an ordinary
PPM whose config says `feed_widths` and `attention_heads`. Each layer keeps at least one.

Letters: U units of a layer, C channels of a unit (1 of a feed-forward layer, E / H of a head).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prunezoo.core.contract import Pruner
from prunezoo.core.errors import PruneZooError
from prunezoo.learned._blocks import CrossAttention, LinearAttention, SwiGLU
from prunezoo.learned.ppm import PPM


@dataclass(frozen=True)
class Layer:
    """A layer with units."""

    name: str  # of the module in the pruner
    units: int  # U
    channels: int  # C
    parameters: int  # of one unit
    feed: bool  # feed-forward, or attention

    @property
    def behind(self) -> str:
        """The name of the module that reads the units' channels."""
        return f"{self.name}.down" if self.feed else f"{self.name}.out"


def as_ppm(pruner: Pruner, method: str) -> PPM:
    """The same, if it is a PPM or a policy.

    Raises:
        PruneZooError: It is not.
    """
    if not isinstance(pruner, PPM):
        raise PruneZooError(f"--method {method} knows the layers of 'ppm' and 'policy', not of '{pruner.name}'")
    return pruner


def layers_of(ppm: PPM) -> list[Layer]:
    """Its layers in the order of its config: feed-forward layers, then attentions."""
    feeds, attentions = [], []
    for name, module in ppm.named_modules():
        if isinstance(module, SwiGLU):
            units = module.down.in_features
            feeds.append(Layer(name, units, 1, own(module.up, module.down) // units, True))
        elif isinstance(module, LinearAttention):
            inner, units = module.out.in_features, module.heads
            attentions.append(Layer(name, units, inner // units, own(module.qkv, module.out) // units, False))
        elif isinstance(module, CrossAttention):
            inner, units = module.out.in_features, module.heads
            parts = own(module.query, module.key, module.value, module.out) + 2 * inner
            attentions.append(Layer(name, units, inner // units, parts // units, False))
    return [*feeds, *attentions]


def own(*modules: nn.Module) -> int:
    """Parameters of some modules."""
    return sum(weight.numel() for module in modules for weight in module.parameters())


def total(ppm: PPM) -> int:
    """Parameters of the whole pruner."""
    return own(ppm)


def most_that_goes(ppm: PPM) -> float:
    """The share of its parameters, in [0, 1), that can go: one unit in each layer stays."""
    return sum(layer.parameters * (layer.units - 1) for layer in layers_of(ppm)) / total(ppm)


def sizes(layers: list[Layer], units: list[int]) -> dict[str, Any]:
    """Config fields of a PPM whose layers have so many units."""
    found = list(zip(layers, units, strict=True))
    return {
        "feed_widths": tuple(number for layer, number in found if layer.feed),
        "attention_heads": tuple(number for layer, number in found if not layer.feed),
    }


def crop(ppm: PPM, keep: Mapping[str, Tensor]) -> PPM:
    """A smaller pruner.

    Args:
        ppm: It; not changed.
        keep: For each layer by name, (U,) bool: which units stay.

    Returns:
        Another one, with the same weights as far as they stayed, and without a calibration, which was of the old one.
    """
    layers, state = layers_of(ppm), dict(ppm.state_dict())
    for layer in layers:
        channels = keep[layer.name].cpu().repeat_interleave(layer.channels)
        if layer.feed:
            rows = {f"{layer.name}.up.weight": 2}  # value and gate of each unit
        elif f"{layer.name}.qkv.weight" in state:
            rows = {f"{layer.name}.qkv.weight": 3}
        else:
            names = ("query.weight", "key.weight", "value.weight", "none_key", "none_value")
            rows = {f"{layer.name}.{name}": 1 for name in names}
        for name, times in rows.items():
            state[name] = state[name][channels.repeat(times)]
        column = f"{layer.behind}.weight"
        state[column] = state[column][:, channels]
    config = replace(ppm.config, **sizes(layers, [int(keep[layer.name].sum()) for layer in layers]))
    smaller = type(ppm)(config).to(ppm.head.weight.dtype)
    smaller.load_state_dict(state)
    smaller.base_model = ppm.base_model
    return smaller.train(ppm.training)


def choose(ppm: PPM, worth: Mapping[str, Tensor], left: int) -> dict[str, Tensor]:
    """Which units stay where those worth least go until the pruner has at most so many parameters.

    Args:
        ppm: It.
        worth: For each layer by name, (U,): compared over all layers.
        left: Parameters.

    Returns:
        For each layer by name, (U,) bool, each with at least one unit.

    Raises:
        PruneZooError: Even one unit in each layer is more.
    """
    layers, now = layers_of(ppm), total(ppm)
    keep = {layer.name: torch.ones(layer.units, dtype=torch.bool) for layer in layers}
    ranked = sorted(
        (float(value), number, unit)
        for number, layer in enumerate(layers)
        for unit, value in enumerate(worth[layer.name].tolist())
    )
    for _, number, unit in ranked:
        if now <= left:
            break
        layer = layers[number]
        if keep[layer.name].sum() > 1:
            keep[layer.name][unit] = False
            now -= layer.parameters
    if now > left:
        raise PruneZooError(
            f"--sparsity: one unit in each layer leaves {now:,} parameters, more than the {left:,} asked"
        )
    return keep
