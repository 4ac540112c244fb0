"""FlowCut: drop tokens all along the vision tower, by what has flowed from them to CLS so far.

FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models, Tong et al., NeurIPS 2025,
https://arxiv.org/abs/2505.19536, code https://github.com/TungChintao/FlowCut.

In every block a token is rated by (a / sum a + s / sum s) * |v|: a is what CLS attends to, mean over heads; s the
softmax of the products of CLS's value with the tokens' (unscaled, CLS among them), mean over heads; |v| the sum of
magnitudes of the token's value, mean over heads. The running score, C = (C + score) / 2, goes with the tokens from
block to block, also through those in which none is dropped. In every second block, counted back from the last but one
of those that run, tokens of low C leave, behind the MLP: of n tokens

    (n - T) / sqrt(blocks to go) * (1 - (H / ln n)^2),  H the entropy of a / sum a,

so that more go early where the attention is concentrated; with no block to go, all above T. How many they are is known
when the block has run, and the host waits for it once in each of these blocks but the last.

| | authors' code | paper | ours |
|---|---|---|---|
| count, of a batch | the most that a picture drops | – | of each alone; `count="batch"` as the code |
| no CLS | a mean query, no s (Qwen2-VL) | – | `attention="received"`: the mean of what is received, no s |
| depth | 24 blocks, scored in 22 | – | any; a tower that runs one block drops all behind it |
| patches merged behind the tower | 8 T before, 2 T after (Qwen2-VL) | – | refused |
| crops | T / 2 of each (LLaVA-NeXT) | 2 T after the tower | refused |
| second cut, in layer 1 of the decoder | LLaVA-NeXT, Qwen2-VL | yes | no; a method of the layer stage beside it |
| positions | numbered anew | – | kept |
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.budgets import upload
from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, Pruner
from ..core.registry import register_pruner

NEEDS = {
    "cls": ("cls_attention", "cls_value", "vision_values"),
    "received": ("received_attention", "vision_values"),
}
COUNTS = ("image", "batch")


@dataclass(frozen=True)
class FlowCutConfig(PrunerConfig):
    """Settings of FlowCut."""

    attention: str = "cls"  # "cls", or "received" for vision towers without CLS
    count: str = "image"  # in one block: "image": as many as each wants; "batch": the most that one of them wants

    def __post_init__(self) -> None:
        """Check the names."""
        self.check_choices("flowcut", attention=NEEDS, count=COUNTS)


@register_pruner("flowcut")
class FlowCut(Pruner):
    """A running score in all blocks but the last, and a cut behind every second of them."""

    stage = "vision"
    criteria = ("attention",)
    after_block = True
    config_class = FlowCutConfig
    config: FlowCutConfig

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a class attribute where it is not configured
        """Attention and values of the block."""
        return NEEDS[self.config.attention]

    @property
    def across_batch(self) -> str:  # type: ignore[override]  # a class attribute where it is not configured
        """All images of a batch may drop as many as the one that drops most."""
        return "count='batch'" if self.config.count == "batch" else ""

    def stages(self, depth: int) -> tuple[int, ...]:
        """All blocks but the last, which runs on what is left."""
        return tuple(range(max(depth - 1, 1)))

    def schedule(self, keep: Tensor, available: Tensor, depth: int) -> list[Tensor]:
        """In every second block, counted back from the last, ``keep`` or what :meth:`pace` makes of it; else all."""
        last = self.stages(depth)[-1]
        return [available if (last - block) % 2 else keep for block in range(last + 1)]

    def pace(self, inputs: PruneInputs, keep: Tensor, to_go: int) -> Tensor:
        """More than ``keep`` as long as there are blocks to go: by how even the attention is."""
        least = keep.numpy().tolist()
        if to_go == 0 or all(k >= n for k, n in zip(least, inputs.counts, strict=True)):
            return keep
        share, found = self.attention(inputs).double(), inputs.valid.sum(1)
        above = (found - upload(least, found.device)).clamp_min(0)
        evenness = -torch.special.xlogy(share, share).sum(1) / found.clamp_min(2).log()
        drop = (above / to_go**0.5 * (1 - evenness.square())).round().long()
        if self.across_batch:
            drop = drop.amax(0, keepdim=True)
        return found - torch.minimum(drop, above)

    def score(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)``: the running score, this block's among them."""
        share, values = self.attention(inputs), inputs.signal("vision_values").float()
        if self.config.attention == "cls":
            of_cls = inputs.signal("cls_value").float()
            links = (of_cls * values).sum(-1).masked_fill(~inputs.valid[..., None], -torch.inf)  # (B, N, H)
            own = of_cls[:, :1].square().sum(-1)
            alike = torch.cat([own, links], 1).softmax(1)[:, 1:].mean(2)
            # Where CLS is like nothing but itself there is no sum to speak of.
            share = share + alike / alike.sum(1, keepdim=True).clamp_min(torch.finfo(alike.dtype).tiny)
        score = share * values.mean(2).abs().sum(-1)
        return (inputs.carry["scores"] + score) / 2 if "scores" in inputs.carry else score

    def attention(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)``: what each token has of the attention that the image's tokens have together; 0 on padding."""
        read = inputs.signal(self.needs[0]).float().masked_fill(~inputs.valid, 0)
        return read / read.sum(1, keepdim=True)
