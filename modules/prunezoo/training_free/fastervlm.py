"""FasterVLM: keep the tokens that the vision tower's CLS token attends to.

[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster,
Zhang et al., 2024, https://arxiv.org/abs/2412.01818, code https://github.com/Theia-4869/FasterVLM.

The attention is that of the block whose output the projector reads, mean over heads. As in the official code the kept
tokens stay in raster order. Unlike it, they keep their original positions unless `attach` is told "compact".
"""

from torch import Tensor

from ..core.contract import PruneInputs, Pruner
from ..core.registry import register_pruner


@register_pruner("fastervlm")
class FasterVLM(Pruner):
    """Top tokens by CLS attention; needs a vision tower with a CLS token."""

    needs = ("cls_attention",)

    def score(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)``: the attention weight from CLS to each patch."""
        return inputs.signal("cls_attention")
