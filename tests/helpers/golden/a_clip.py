"""A-CLIP: the attention of 14x14 patches, in cells of 2x2; a scorer stands in its place in ours."""

import numpy as np
import torch

from prunezoo import PruneInputs, build_pruner
from prunezoo.host.families.cells import grid

INPUTS = ("seed", "ratio")
COUNT, CELLS = 196, 49


@torch.no_grad()
def answer(case):
    """The authors keep int(cells * ratio) + 1 cells, so that is how many patches we are asked for."""
    random = np.random.default_rng(case["seed"])
    attention = torch.from_numpy((2 * random.standard_normal((2, COUNT))).astype("float32")).softmax(-1)
    cells, valid = grid(14, 14).flatten(0, 1)[None].expand(2, -1, -1), torch.ones(2, COUNT, dtype=torch.bool)
    pruner = build_pruner("a_clip").eval()
    pruner.head = type("Attention", (torch.nn.Module,), {"forward": lambda self, inputs: attention})()
    output = pruner(PruneInputs(torch.zeros(2, COUNT, 1), valid, cells), 4 * (int(CELLS * case["ratio"]) + 1))
    return {"dropped": [sorted(set(range(COUNT)) - set(index.tolist())) for index in output.index]}
