"""FlowCut: a CLIP tower of 24 blocks whose queries, keys and values are looked up by the number of the token.

A token's state holds its number, and neither the attention nor the MLP adds to it, so that only the choice is tested:
in the real tower, by the real hooks.
"""

from math import isqrt

import numpy as np
import torch
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from prunezoo import PruneInputs, build_pruner
from prunezoo.host.parts.tower import Tower
from prunezoo.host.stages.cut import Timer
from prunezoo.host.stages.vision import VisionStage

INPUTS = ("seed", "batch", "T")
BLOCKS, WIDTH, HEADS, TOKENS = 24, 16, 2, 577


class Table(nn.Module):
    """In the place of a projection: rows of ``values (B, tokens, width)`` by the number that a state holds first."""

    def __init__(self, values):
        super().__init__()
        self.register_buffer("values", values)

    def forward(self, states):
        return self.values.gather(1, states[..., :1].long().expand(-1, -1, self.values.shape[2]))


class Nothing(nn.Module):
    def forward(self, states):
        return torch.zeros_like(states)


def tower_of(seed, batch, **options):
    """The vision model, with the tables of a case in its blocks."""
    random = np.random.default_rng(seed)
    side = isqrt(TOKENS - 1)
    model = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=WIDTH, intermediate_size=4, num_hidden_layers=BLOCKS, num_attention_heads=HEADS,
            image_size=side, patch_size=1, **options,
        )
    ).eval()  # fmt: skip
    for block in model.encoder.layers:
        made = [random.standard_normal((batch, TOKENS, WIDTH)).astype("float32") for _ in range(3)]
        made[0] = (1.5 * made[0]).astype("float32")
        attention = block.self_attn
        attention.q_proj, attention.k_proj, attention.v_proj = (Table(torch.from_numpy(part)) for part in made)
        attention.out_proj, block.mlp, block.layer_norm1 = Nothing(), Nothing(), nn.Identity()
    return model


def patches(batch):
    side = isqrt(TOKENS - 1)
    axis = torch.arange(side)
    cells = torch.stack([torch.zeros(side, side).long(), *torch.meshgrid(axis, axis, indexing="ij")], -1).flatten(0, 1)
    valid = torch.ones(batch, TOKENS - 1, dtype=torch.bool)
    return PruneInputs(torch.zeros(batch, TOKENS - 1, 0), valid, cells.expand(batch, -1, -1))


@torch.no_grad()
def answer(case):
    """The authors' count of a batch is that of the picture which drops most, and so is ours by an option."""
    batch = case["batch"]
    model, pruner = tower_of(case["seed"], batch), build_pruner("flowcut", count="batch").eval()
    states = torch.zeros(batch, TOKENS, WIDTH)
    states[..., 0] = torch.arange(TOKENS)
    lengths = []
    handles = [
        block.register_forward_hook(lambda _module, _args, output: lengths.append(output.shape[1]))
        for block in model.encoder.layers
    ]
    with VisionStage(Tower(model, -2), pruner, patches(batch), (case["T"],) * batch, Timer(torch.device("cpu"))) as run:
        left = model.encoder(inputs_embeds=states).last_hidden_state
    for handle in handles:
        handle.remove()
    kept = run.output(left[:, 1:]).index
    assert torch.equal(left[:, 1:, 0].long() - 1, kept)
    return {"tokens_with_cls_after_each_block": lengths, "kept": kept.tolist()}
