"""ToP-ViM: patches of weak response leave the tower, and what they held is carried on to the next that stays.

Exploring Token Pruning in Vision State Space Models, Zhan et al., NeurIPS 2024, https://arxiv.org/abs/2409.18962.

**Reconstructed, and not on the tower that it was made for.** The paper prunes state space models (ViM, PlainMamba). No
family here has such a tower, so this is its score and an alignment of hidden states on a plain ViT. The released code
is not complete (it has no alignment) and equations 5 and 6 could not be had: the carrying below is ours altogether.

The score of a patch is the part of its response above 0: the sum over channels of max(0, y), with y what the block's
mixing of tokens gives, here its heads. In the paper a patch that was pruned keeps its slot in the scan, and there the
hidden state of its predecessor is carried on, so that those behind find the neighbourhood that they know. A ViT has no
scan, so the patch that stays next in raster order gets of it: with c the mean of the run of dropped patches in front
of it, which weigh less by a learned factor for each step away, a small head says how far its state goes from itself
towards c. The head is trained so that what the shorter tower puts out is what the whole one does.

| | paper; its code | ours |
|---|---|---|
| tower | ViM, PlainMamba; tuned with the pruning | a ViT, frozen |
| y | output of the scan; the code scores its backward branch without turning it round | outputs of the heads |
| where | behind layers 5, 10, 15 of 24, 0.8 left by each | as far in; the same share at each, as `keep` asks |
| CLS | forced to stay | always stays |
| alignment | in the scan | the carrying above, and relative squared error of the projected tokens |
| the head reads | – | a few numbers on each patch, see `_patch_facts.py`: so it goes with any width |

Letters: B images, N patches, K kept.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core.checks import require_no_nan
from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.errors import PruneZooError
from ..core.plan import gather_rows
from ..core.registry import register_pruner
from ..core.signals import TOWER_ATTENTION
from ._patch_facts import FactsHead, facts_needed

MOST_HIDDEN = 4096
RESPONSE = "vision_outputs"


@dataclass(frozen=True)
class ToPViMConfig(PrunerConfig):
    """Settings of ToP-ViM."""

    attention: str = "received"  # what the head reads of the attention: "received", or "cls" besides
    hidden: int = 32  # width of the head, from 1
    blocks: tuple[int, ...] | None = None  # behind which blocks patches leave; None: 5/24, 10/24 and 15/24 of the depth

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check_choices("top_vim", attention=TOWER_ATTENTION)
        if not 1 <= self.hidden <= MOST_HIDDEN:
            raise PruneZooError(f"hidden={self.hidden} of top_vim is out of range: 1 to {MOST_HIDDEN}")


@register_pruner("top_vim")
class ToPViM(Pruner):
    """Keeps strong responses, and carries on what the others held."""

    stage = "vision"
    criteria = ("magnitude",)
    after_block = True
    config_class = ToPViMConfig
    config: ToPViMConfig

    def __init__(self, config: ToPViMConfig | None = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        self.head = FactsHead(self.config.attention, self.config.hidden)
        self.fading = nn.Parameter(torch.zeros(()))  # log-odds of the factor for each step away
        nn.init.zeros_(self.head.last.weight)
        nn.init.constant_(self.head.last.bias, -2.0)

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a class attribute where it is not configured
        """The response, and what the head reads."""
        return (RESPONSE, *facts_needed(self.config.attention))

    def stages(self, depth: int) -> tuple[int, ...]:
        """The configured blocks, or those at 5, 10 and 15 of 24."""
        return self.config.blocks or tuple(sorted({max(round(depth * part / 24), 1) - 1 for part in (5, 10, 15)}))

    def score(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)``: the part of the response above 0."""
        return functional.relu(inputs.signal(RESPONSE).float()).flatten(2).sum(-1)

    def beside(self, inputs: PruneInputs, output: PruneOutput) -> PruneOutput:
        """States of those that stay, moved towards what was dropped in front of them."""
        if inputs.drop_only:
            return output
        weights = self.carried(inputs.valid, output)  # (B, K, N)
        share = self.head(inputs).float().sigmoid()
        share = gather_rows(share, output.index)[..., None] * (weights.sum(-1, keepdim=True) > 0)
        states = inputs.features.masked_fill(~inputs.valid[..., None], 0).float()
        own = gather_rows(states, output.index)
        features = (own + share * (weights @ states - own)).to(inputs.features.dtype)
        require_no_nan(features, self.name, "made")
        return replace(output, features=features)

    def carried(self, valid: Tensor, output: PruneOutput) -> Tensor:
        """``(B, K, N)`` float32: the weights of the run of dropped patches in front of each that stays.

        They add up to 1, or are all 0 where its neighbour stays too; of slots, whose order is raster.
        """
        slots = torch.arange(valid.shape[1], device=valid.device)
        before = functional.pad(output.index[:, :-1] + 1, (1, 0))[..., None]  # where the run begins
        steps = output.index[..., None] - slots  # how far in front a patch is
        run = (slots >= before) & (steps > 0) & valid[:, None] & output.valid[..., None]
        fading = functional.logsigmoid(self.fading.float()) * steps
        weights = fading.masked_fill(~run, torch.finfo(torch.float32).min).softmax(-1)
        return weights.masked_fill(~run, 0)
