"""SpAtten: drop the patches that have received least attention so far, block by block, and heads by option.

SpAtten: Efficient Sparse Attention Architecture with Cascade Token and Head Pruning, Wang et al., HPCA 2021,
https://arxiv.org/abs/2012.09852. Written from a description of the authors' simulation in software.

A token's importance is what it has received in all blocks so far: the probabilities in its column, summed over heads
and over the tokens that look. Those that go never come back (a cascade). The first max(3, 15 %) of the blocks drop
nothing, though they count; from there on the number of tokens falls linearly to the one asked for.

A head's importance is the sum of the magnitudes of what it has given so far. With `heads` below 1 the least important
ones give nothing in the blocks to come; the first 30 % of the blocks keep all, the number falls linearly to the last.

| | paper | ours |
|---|---|---|
| made for | language models; causal in part | a vision tower, in which all patches see all |
| tokens that look | all | all, CLS among them: the mean of what is received, times the patches that are left |
| magnitudes of a head | all tokens | patches |
| heads that go | are not computed | their output is 0, which saves no time here |
| the 30 % of the blocks that keep all heads | – | reconstructed |
| values of low probability are skipped, numbers in few bits first | yes | no: both are for a chip of its own |
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.budgets import upload
from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.errors import PruneZooError
from ..core.gates import topk_mask
from ..core.registry import register_pruner

FIRST, FIRST_SHARE = 3, 0.15
"""Blocks in front that drop no tokens: the larger of a number and a share of all."""
FIRST_HEADS = 0.3
"""Share of the blocks, in front, that keep all heads."""


@dataclass(frozen=True)
class SpAttenConfig(PrunerConfig):
    """Settings of SpAtten."""

    heads: float = 1.0  # share of the heads that is left in the end, in (0, 1]

    def __post_init__(self) -> None:
        """Check the range."""
        if not 0 < self.heads <= 1:
            raise PruneZooError(f"heads={self.heads} of spatten is out of range: it is a share in (0, 1]")


def without(depth: int) -> int:
    """How many blocks in front drop no tokens: never all of them."""
    return min(max(FIRST, round(depth * FIRST_SHARE)), depth - 1)


@register_pruner("spatten")
class SpAtten(Pruner):
    """Received attention, added up over the blocks; top tokens, and top heads by option."""

    stage = "vision"
    criteria = ("attention",)
    config_class = SpAttenConfig
    config: SpAttenConfig

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a class attribute where it is not configured
        """Attention of the block, and what its heads give where some of them go."""
        return ("received_attention", *(("vision_outputs",) if self.config.heads < 1 else ()))

    def stages(self, depth: int) -> tuple[int, ...]:
        """All blocks."""
        return tuple(range(depth))

    def schedule(self, keep: Tensor, available: Tensor, depth: int) -> list[Tensor]:
        """All tokens in front, then as many fewer in each block."""
        first = without(depth)
        steps = []
        for block in range(depth - 1):
            part = max(block + 1 - first, 0) / (depth - first)
            steps.append((available - (available - keep).double() * part).round().long())
        return [*steps, keep]

    def score(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)`` float32: what each token has received in all blocks so far."""
        rows = upload(inputs.counts, inputs.valid.device)
        received = inputs.signal("received_attention").float() * rows[:, None]
        return received + inputs.carry["scores"] if "scores" in inputs.carry else received

    def beside(self, inputs: PruneInputs, output: PruneOutput) -> PruneOutput:
        """The heads that give something from here on."""
        if self.config.heads == 1:
            return output
        given = inputs.signal("vision_outputs").float().abs().sum(-1).masked_fill(~inputs.valid[..., None], 0)
        given = given.sum(1)  # (B, H): the sum of a head that is out does not grow, since it gives nothing
        if "given" in inputs.carry:
            given = given + inputs.carry["given"][:, 0]
        left = torch.full_like(inputs.valid[:, 0], self.heads_left(inputs, given.shape[1]), dtype=torch.long)
        heads = topk_mask(given, torch.ones_like(given, dtype=torch.bool), left)
        if "heads" in inputs.carry:  # a head that is out stays out
            heads &= inputs.carry["heads"][:, 0]
        tokens = (-1, inputs.valid.shape[1], -1)
        carry = {"given": given[:, None].expand(tokens), "heads": heads[:, None].expand(tokens)}
        return replace(output, carry={**output.carry, **carry}, heads=heads)

    def heads_left(self, inputs: PruneInputs, count: int) -> int:
        """How many of the heads give something behind this block."""
        depth, block = inputs.depth or 1, inputs.layer or 0
        first = min(round(depth * FIRST_HEADS), depth - 1)
        part = max(block + 1 - first, 0) / (depth - first)
        return max(round(count * (1 - (1 - self.config.heads) * min(part, 1))), 1)
