"""Random tokens: the baseline that any importance score has to beat. Seeded, and independent of the batch.

Every image has a generator of its own, seeded by the pruner's seed and by what is in the row: the same question about
the same image always keeps the same tokens, wherever in whatever batch it stands; another question keeps others.
"""

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, Pruner
from ..core.errors import PruneZooError
from ..core.registry import register_pruner


@dataclass(frozen=True)
class RandomConfig(PrunerConfig):
    """Settings of random pruning."""

    seed: int = 0  # >= 0; evaluation averages over several

    def __post_init__(self) -> None:
        """Check the range."""
        if self.seed < 0:
            raise PruneZooError(f"seed={self.seed} of random is out of range: it must be at least 0")


@register_pruner("random")
class RandomPruner(Pruner):
    """Uniform scores from a generator per image."""

    criteria = ("chance",)
    config_class = RandomConfig
    config: RandomConfig

    @property
    def reads_prompt(self) -> bool:
        """Its words are part of the seed."""
        return True

    def score(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)`` float32 in [0, 1)."""
        scores = torch.zeros(inputs.valid.shape)
        for row, (features, valid) in enumerate(zip(inputs.features, inputs.valid, strict=True)):
            content = _digest(features[valid])
            if inputs.text is not None and inputs.text_valid is not None:
                content += _digest(inputs.text[row][inputs.text_valid[row]])
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.config.seed} {content}".encode()))
            drawn = torch.rand(int(valid.sum()), generator=generator)
            scores[row, valid.cpu()] = drawn
        return scores.to(inputs.features.device)


def _digest(tokens: Tensor) -> str:
    """A few digits that tell one set of tokens ``(n, D)`` from another.

    Sums to four digits, not raw bits: the same picture in another batch size differs in its last bits, and should draw
    the same tokens.
    """
    values = tokens.detach().double()
    ramp = torch.arange(1, len(values) + 1, dtype=torch.float64, device=values.device)
    size = values.abs().sum(1)
    return f"{len(values)} {float(size.sum()):.3e} {float(size @ ramp):.3e} {float(values.square().sum()):.3e};"
