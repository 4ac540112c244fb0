"""EET: 197 tokens, CLS first, of width 48, through a joint projection to queries, keys and values of three heads."""

import numpy as np
import torch

from prunezoo import PruneInputs, build_pruner
from prunezoo.host.families.cells import grid
from prunezoo.host.signals.vision import attention_map

INPUTS = ("seed",)
HEADS, COUNT = 3, 196


@torch.no_grad()
def answer(case):
    random = np.random.default_rng(case["seed"])
    states = torch.from_numpy(random.standard_normal((2, 197, 48)).astype("float32"))
    weight = torch.from_numpy((random.standard_normal((144, 48)) * 0.3).astype("float32"))
    bias = torch.from_numpy((random.standard_normal(144) * 0.1).astype("float32"))
    made = torch.nn.functional.linear(states, weight, bias).unflatten(-1, (3, HEADS, -1))
    query, key, value = made.unbind(2)
    maps = attention_map(query, key, 1 / 4, None, by_head=True)  # (2, 197, 197, 3)
    outputs = torch.einsum("bqkh,bkhd->bqhd", maps, value)
    signals = {"cls_head_attention": maps[:, 0, 1:], "vision_outputs": outputs[:, 1:]}
    cells, valid = grid(14, 14).flatten(0, 1)[None].expand(2, -1, -1), torch.ones(2, COUNT, dtype=torch.bool)
    inputs, pruner = PruneInputs(states[:, 1:], valid, cells, signals=signals), build_pruner("eet").eval()
    scores = pruner(inputs, 98).scores
    order = scores.argsort(dim=1, descending=True, stable=True)
    for count in (98, 12):
        assert torch.equal(pruner(inputs, count).index, order[:, :count].sort(1).values)
    return {
        "score_image0_first20": scores[0, :20].tolist(),
        "top98": order[:, :98].tolist(),
        "top12": order[:, :12].tolist(),
    }
