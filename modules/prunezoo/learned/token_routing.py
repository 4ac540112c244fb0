"""Token routing: in each block of the vision tower a gate says whether a patch goes on, joins another, or stops.

DiT: Efficient Vision Transformers with Dynamic Token Routing, Ma et al., 2023, https://arxiv.org/abs/2308.03409.

Learning Dynamic Routing for Semantic Segmentation, Li et al., CVPR 2020, https://arxiv.org/abs/2003.10401, code
https://github.com/Megvii-BaseDetection/DynamicRouting.

Reconstructed: of the first no code is public, and its abstract describes no gate; the second is its ancestor, whose
gates, of a picture each, are described.

A gate is ReLU(tanh(f)), so that it can be exactly 0 without anything being drawn. There are three paths: through the
block; down in scale, here into the patch of the same cell of 2x2 that goes on; and past the block, which here is for
good, since the blocks behind are frozen and know no patch that has missed some of them: the paper's early stop.

| | ancestor's code; paper | ours |
|---|---|---|
| gates | of a picture; of a patch | of a patch |
| f | 1x1 convolution, mean over the picture, 1x1 convolution | two linear maps of a few numbers on each patch |
| first bias | 1.5 | 1.5 to go on, 0.5 to join another |
| learns from | labels, whole network | KL of the frozen model to itself; only the gates |
| budget | 0.8 warm-up (cost / whole cost - target)^2 | the same, of tower and language model |
| a gate that is shut | has no gradient | has that of tanh while it is trained, so that it can open again |
| what a gate weighs | the block's output | the patch in attention: 0 or 1, but what joins another weighs as its gate |
| a tower that joins patches behind it | – | what stops is dropped, by whole cells of it |
| how many go on | whose gates are open | as `keep` asks, the highest f; with `by_gate` all with open gates too |

By default what has stopped is dropped. With `identity` it is put out behind the tower as it was when it stopped, and
the language model reads all tokens, as after the paper's third path.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.errors import PruneZooError
from ..core.gates import straight_through
from ..core.merge import group_mean
from ..core.plan import group_sum
from ..core.registry import register_pruner
from ..core.signals import TOWER_ATTENTION
from ._patch_facts import FactsHead, facts_needed
from .a_clip import same_cell

MOST_HIDDEN, CELL = 4096, 2
OPEN, JOINING = 1.5, 0.5
"""Biases at the start of the training."""


@dataclass(frozen=True)
class TokenRoutingConfig(PrunerConfig):
    """Settings of token routing."""

    attention: str = "received"  # what the gates read of the attention: "received", or "cls" besides
    hidden: int = 32  # width of each gate's maps, from 1
    first: int = 1  # the first block with gates, at least 0; the last one of towers that have fewer
    by_gate: bool = False  # patches whose gate is open go on even beyond `keep`
    identity: bool = False  # what has stopped is put out as it was, and the language model reads all tokens

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check_choices("token_routing", attention=TOWER_ATTENTION)
        if not 1 <= self.hidden <= MOST_HIDDEN:
            raise PruneZooError(f"hidden={self.hidden} of token_routing is out of range: 1 to {MOST_HIDDEN}")
        if self.first < 0:
            raise PruneZooError(f"first={self.first} of token_routing is out of range: at least 0")


def gate(logits: Tensor) -> Tensor:
    """ReLU(tanh(f)), of any shape: in [0, 1), exactly 0 where f is not above 0."""
    return functional.relu(logits.tanh())


@register_pruner("token_routing")
class TokenRouting(Pruner):
    """Two gates that all blocks share: to go on, and to join another patch."""

    stage = "vision"
    criteria = ("learned score",)
    config_class = TokenRoutingConfig
    config: TokenRoutingConfig

    def __init__(self, config: TokenRoutingConfig | None = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        self.restore = self.config.identity  # type: ignore[misc]  # of an instance: it follows the config
        self.on, self.down = (FactsHead(self.config.attention, self.config.hidden) for _ in range(2))
        nn.init.constant_(self.on.last.bias, OPEN)
        nn.init.constant_(self.down.last.bias, JOINING)

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a class attribute where it is not configured
        """What the gates read."""
        return facts_needed(self.config.attention)

    def stages(self, depth: int) -> tuple[int, ...]:
        """All blocks from the first one with gates."""
        return tuple(range(min(self.config.first, depth - 1), depth))

    def pace(self, inputs: PruneInputs, keep: Tensor, to_go: int) -> Tensor:
        """With `by_gate` as many as have open gates, and never fewer than asked for."""
        if not self.config.by_gate:
            return keep
        open_ = (self.on(inputs) > 0) & inputs.valid
        return torch.maximum(keep.to(open_.device), open_.sum(1))

    def score(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)``: f of the gate to go on."""
        return self.on(inputs)

    def beside(self, inputs: PruneInputs, output: PruneOutput) -> PruneOutput:
        """Patches that do not go on join one of their cell that does, as far as their other gate is open."""
        if inputs.drop_only:
            return output
        assert output.scores is not None  # as of every scorer
        kept = torch.zeros_like(inputs.valid).scatter_reduce(1, output.index, output.valid, "amax")
        target, weights = self.joined(inputs, kept, output.scores.detach(), inputs.sizes)
        column = kept.cumsum(1) - 1
        groups = torch.where(target < 0, -1, column.gather(1, target.clamp_min(0)))
        width = output.index.shape[1]
        features = group_mean(inputs.features, groups, weights, width)
        return replace(output, features=features, groups=groups, sizes=group_sum(weights, groups, width))

    def joined(self, inputs: PruneInputs, kept: Tensor, on: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor]:
        """Who joins whom.

        Args:
            inputs: What is found in a block; only what is valid can join another.
            kept: ``(B, N)`` bool, those that go on.
            on: ``(B, N)``: of several in a cell the highest is joined.
            sizes: ``(B, N)`` patches that each stands for; None: one each.

        Returns:
            ``(B, N)`` long, the slot that each goes into: its own if it goes on, -1 if it just stops; and ``(B, N)``
            float32, what each weighs there, above 0 where it goes anywhere, with the gradient of its gate.
        """
        near = same_cell(inputs, CELL) & kept[:, None]
        mate = on.float()[:, None].expand_as(near).masked_fill(~near, -torch.inf).argmax(2)
        share = gate(self.down(inputs).float())
        joining = inputs.valid & ~kept & near.any(2) & (share > 0)
        own = torch.arange(kept.shape[1], device=kept.device).expand_as(mate)
        target = torch.where(kept, own, torch.where(joining, mate, -1))
        whole = torch.ones_like(share) if sizes is None else sizes.float()
        return target, whole * torch.where(joining, share, 1.0)

    def relax(self, inputs: PruneInputs, gates: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A block in training, in which every token keeps its row, and those go on whose gates are open.

        Args:
            inputs: What is found in the block.
            gates: ``(B, N)`` of value 0 or 1: which tokens the blocks before have left.
            sizes: ``(B, N)``.

        Returns:
            Features ``(B, N, D)``, gates and sizes behind the block; gates have the gradients of the heads. Of each
            picture the highest goes on, whatever its gate.
        """
        assert inputs.layer is not None and inputs.depth is not None
        if inputs.layer not in self.stages(inputs.depth):
            return inputs.features, gates, sizes
        alive = gates.detach() > 0.5
        inputs = replace(inputs, valid=alive)
        on = self.on(inputs).float()
        best = on.detach().masked_fill(~alive, -torch.inf)
        kept = alive & ((best > 0) | (best == best.amax(1, keepdim=True)))
        target, weights = self.joined(inputs, kept, best, sizes)
        count = gates.shape[1]
        made = group_mean(inputs.features, target, weights, count)
        features = torch.where(kept[..., None], made, inputs.features)
        sizes = torch.where(kept, group_sum(weights, target, count), sizes)
        return features, gates * torch.where(alive, straight_through(kept, on.tanh()), 1.0), sizes
