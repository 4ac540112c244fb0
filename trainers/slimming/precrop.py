"""PreCrop: widths from the cost of each layer alone, before any training.

Structured Pruning is All You Need for Pruning CNNs at Initialization, Cai et al., 2022, https://arxiv.org/abs/2203.02549
(no code). The densities p of the layers maximise the sum of log p, which is the expected flow through the network over
all initialisations, within a budget of parameters or of operations and at most 1: p = min(1, factor / cost).

Reconstructed: a layer here is an attention or a feed-forward layer, whose inner width alone is cropped; its cost is
linear in that, so that a density is a share of its units. The width of what flows between the layers stays: how the
authors treat widths that residual connections tie together could not be found.
"""

from dataclasses import dataclass
from typing import Any, Literal

from prunezoo.core.errors import PruneZooError
from prunezoo.core.schedule import precrop
from prunezoo.learned.ppm import PPM

from .units import Layer, layers_of, sizes, total


@dataclass(frozen=True)
class Costs:
    """What a layer costs."""

    of: Literal["parameters", "operations"] = "parameters"
    tokens: int = 144  # image tokens, for operations
    words: int = 24  # tokens of the prompt, likewise

    def __post_init__(self) -> None:
        """Check the ranges."""
        if min(self.tokens, self.words) < 1:
            raise PruneZooError(f"precrop.tokens={self.tokens}, precrop.words={self.words}: at least 1")

    def layer(self, layer: Layer, hidden: int) -> float:
        """Of all units of a layer: parameters, or multiplications for one picture with its prompt."""
        if self.of == "parameters":
            return layer.parameters * layer.units
        n, t, inner = self.tokens, self.words, layer.units * layer.channels
        reads = t if layer.name.startswith("text_blocks") else n
        if layer.feed:
            return 3 * reads * hidden * inner
        if layer.name.endswith(".mix") and reads == n:  # linear attention: sums of keys and values, and their reading
            return 4 * n * hidden * inner + 2 * n * layer.channels * inner
        return 2 * (reads + t) * hidden * inner + 2 * reads * t * inner


def precrop_sizes(ppm: PPM, sparsity: float, costs: Costs) -> dict[str, Any]:
    """Config fields of a smaller one.

    Args:
        ppm: Of the sizes to begin with; its weights do not matter.
        sparsity: Share of the cost that goes, in (0, 1): of all parameters, or of the layers' operations.
        costs: What layers cost.

    Raises:
        PruneZooError: What cannot be cropped costs more than is left, or one unit in each layer does.
    """
    layers, hidden = layers_of(ppm), ppm.config.hidden
    cost = [costs.layer(layer, hidden) for layer in layers]
    fixed = total(ppm) - sum(cost) if costs.of == "parameters" else 0.0
    budget = (1 - sparsity) * (sum(cost) + fixed) - fixed
    least = sum(of / layer.units for of, layer in zip(cost, layers, strict=True))
    if budget < least:
        most = 1 - (least + fixed) / (sum(cost) + fixed)
        raise PruneZooError(f"--sparsity {sparsity}: one unit in each layer costs more; at most {most:.3f} here")
    order = sorted(range(len(layers)), key=lambda number: cost[number])  # then no share has to be pooled
    shares = dict(zip(order, precrop([cost[number] for number in order], budget), strict=True))
    units = [max(1, int(shares[number] * layer.units + 1e-6)) for number, layer in enumerate(layers)]
    return sizes(layers, units)
