"""Patch classifier: tell the cells of a page that something is printed on from bare paper, before the vision tower.

Index-Preserving Lightweight Token Pruning for Efficient Document Understanding in Vision-Language Models, Son et al.,
2025, https://arxiv.org/abs/2509.06415, code https://github.com/jaeminSon/index-preserving-lightweight-token-pruning.

Written from a description of the code; how its crops are drawn is not known to us, so the pages it is trained on are
ours.

Each cell, the part of a picture that becomes one visual token, is judged by itself: layer norm over its pixels, a
linear map (a convolution whose kernel is its stride), GELU, a linear map to one logit. Cells of a logit above 0 stay,
and with them their eight neighbours; what stays keeps its position.

| | authors' code | ours |
|---|---|---|
| cells | 28×28 pixels, 3 channels (Qwen2.5-VL) | `side`; cells of other sizes are scaled to it |
| how many stay | what is chosen, and neighbours | `keep="auto"`: the same; a number: these first, by logit |
| neighbours | 3×3 maximum of the mask | `grow`; tiles and crops each by itself |
| clips | not taken | the mean of a cell's frames is judged |
| contrast, neighbours | layer norm takes the one away, no cell knows the other | `facts`: ten numbers tell of both |

It knows nothing of the question, and of photographs nothing either: it is for documents, and what is printed on a
photograph's sky is all that it looks for there.

The same network, with `facts`, also ranks the cells of any picture by how much a frozen model misses them: it is
trained through the real drop, by policy gradient (`configs/patch_gaps_tiny.yaml`, ours), and
`patch-gaps-tiny` is such a one for the embedded model, level with `energy` as far as was measured.
[In front of the tower](../input.md) has its figures.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, Pruner
from ..core.errors import PruneZooError
from ..core.registry import register_pruner

CHANNELS = 3
FACTS = 2 * CHANNELS + 4
BESIDE = ((0, -1), (0, 1), (-1, 0), (1, 0))
"""Rows and columns to the four neighbours."""


@dataclass(frozen=True)
class PatchClassifierConfig(PrunerConfig):
    """Sizes; the defaults are the authors'."""

    side: int = 28  # pixels along a cell that the network reads, at least 1
    hidden: int = 256  # width of the layer between
    grow: bool = True  # keep="auto" keeps the eight neighbours of each chosen cell too
    least: float = 0.5  # probability, in (0, 1), above which a cell is chosen
    facts: bool = False  # it is told the contrast of a cell too, and how unlike its four neighbours it is

    def __post_init__(self) -> None:
        for name in ("side", "hidden"):
            if getattr(self, name) < 1:
                raise PruneZooError(f"patch_classifier: {name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.least < 1:
            raise PruneZooError(f"patch_classifier: least must lie between 0 and 1, got {self.least}")


@register_pruner("patch_classifier")
class PatchClassifier(Pruner):
    """Printed or bare, cell by cell."""

    stage = "input"
    criteria = ("learned score",)
    threshold = 1.0  # what is kept has 1 more, and no probability alone is above it
    config_class = PatchClassifierConfig
    config: PatchClassifierConfig

    def __init__(self, config: PatchClassifierConfig | None = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        pixels = CHANNELS * self.config.side**2
        self.norm = nn.LayerNorm(pixels)
        self.look = nn.Linear(pixels, self.config.hidden)
        self.told = nn.Linear(FACTS, self.config.hidden, bias=False) if self.config.facts else None
        self.head = nn.Linear(self.config.hidden, 1)

    @classmethod
    def tiny_config(cls, feature_dim: int, text_dim: int) -> dict[str, Any]:
        """See the base class."""
        return {"side": 4, "hidden": 8}

    def logits(self, cells: Tensor, facts: Tensor | None = None) -> Tensor:
        """``(..., N)`` float32, above 0 where something is printed.

        Args:
            cells: ``(..., N, 3 * side * side)`` normalised pixels, channels first.
            facts: ``(..., N, FACTS)``, from :func:`facts_of`, where the config asks for them.
        """
        x = self.look(self.norm(cells.to(self.look.weight.dtype)))
        if self.told is not None:
            if facts is None:
                raise PruneZooError("patch_classifier: with facts=true it needs to know the cells around: call `rate`")
            x = x + self.told(facts.to(x.dtype))
        return self.head(F.gelu(x)).squeeze(-1).float()

    def rate(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)`` float32: the logit of each cell."""
        cells = scaled(inputs.features, inputs.pixels, self.config.side)
        return self.logits(cells, facts_of(cells, inputs) if self.config.facts else None)

    def score(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)`` float32: the probability that a cell is printed on, 1 more where `keep="auto"` keeps it."""
        printed = self.rate(inputs).sigmoid()
        chosen = (printed.detach() > self.config.least) & inputs.valid
        return printed + (grown(chosen, inputs) if self.config.grow else chosen)


def facts_of(cells: Tensor, inputs: PruneInputs) -> Tensor:
    """What layer norm and a look at one cell alone leave out.

    Args:
        cells: ``(B, N, 3 * side * side)`` float32.
        inputs: Say where each of them is.

    Returns:
        ``(B, N, FACTS)`` float32: the mean of each channel, the logarithm of its variance, and that of the mean
        distance to the cell on the left, right, above and below; where there is none, to a cell of zeros.
    """
    channels = cells.unflatten(-1, (CHANNELS, -1))
    far = cells.new_zeros(*cells.shape[:2], len(BESIDE))
    for row, (places, own) in enumerate(inputs.host_grids):
        if not len(places):
            continue
        slots = torch.from_numpy(places).to(cells.device)
        tile, down, right = (axis.to(cells.device) for axis in torch.from_numpy(own).unbind(-1))
        tiles, rows, columns = (own.max(0) + 1).tolist()  # of NumPy: the device is not asked
        framed = cells.new_zeros(tiles, rows + 2, columns + 2, cells.shape[-1])
        framed[tile, down + 1, right + 1] = cells[row, slots]
        apart = [(cells[row, slots] - framed[tile, down + 1 + y, right + 1 + x]).abs().mean(-1) for y, x in BESIDE]
        far[row, slots] = torch.stack(apart, -1)
    variance = channels.var(-1, correction=0)
    return torch.cat([channels.mean(-1), (variance + 1e-4).log(), (far + 1e-2).log()], -1)


def scaled(features: Tensor, pixels: tuple[int, int, int, int] | None, side: int) -> Tensor:
    """The cells as the network reads them.

    Args:
        features: ``(B, N, D)``.
        pixels: What D is made of: frames, channels, rows, columns; None: a row of grey pixels.
        side: Pixels along a cell.

    Returns:
        ``(B, N, 3 * side * side)`` float32: mean over frames; grey where there are not three channels.
    """
    frames, channels, high, wide = pixels or (1, 1, 1, features.shape[-1])
    cells = features.float().reshape(-1, frames, channels, high, wide).mean(1)
    if channels != CHANNELS:
        cells = cells.mean(1, keepdim=True).expand(-1, CHANNELS, -1, -1)
    if (high, wide) != (side, side):
        cells = F.interpolate(cells, (side, side), mode="bilinear", antialias=True)
    return cells.reshape(*features.shape[:2], -1)


def grown(chosen: Tensor, inputs: PruneInputs) -> Tensor:
    """``(B, N)`` bool: the ``chosen (B, N)`` tokens and those beside them, in all eight directions of a tile."""
    result = chosen.clone()
    for row, (places, cells) in enumerate(inputs.host_grids):
        if not len(places):
            continue
        slots = torch.from_numpy(places).to(chosen.device)
        at = tuple(axis.to(chosen.device) for axis in torch.from_numpy(cells).unbind(-1))
        grid = torch.zeros((cells.max(0) + 1).tolist(), device=chosen.device)  # (tiles, rows, columns)
        grid[at] = chosen[row, slots].float()
        result[row, slots] = F.max_pool2d(grid[:, None], 3, stride=1, padding=1)[:, 0][at] > 0
    return result & inputs.valid
