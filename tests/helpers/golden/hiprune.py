"""HiPrune: attention of two blocks, 2 heads, 577 rows and columns of which the first is CLS."""

import numpy as np
import torch

from prunezoo import PruneInputs, build_pruner
from prunezoo.host.families.cells import grid

INPUTS = ("seed", "T", "alpha")


def answer(case):
    """A token's score is the mean over heads, then over all rows, CLS among them."""
    random = np.random.default_rng(case["seed"])
    names, signals = build_pruner("hiprune").needs, {}
    for name in names:  # block 8, then block 22
        logits = random.standard_normal((1, 2, 577, 577)).astype("float32")
        logits += 2 * random.standard_normal((1, 1, 1, 577)).astype("float32")
        signals[name] = torch.from_numpy(logits).softmax(-1).mean(1).mean(1)[:, 1:]
    cells, valid = grid(24, 24).flatten(0, 1)[None], torch.ones(1, 576, dtype=torch.bool)
    inputs = PruneInputs(torch.zeros(1, 576, 1), valid, cells, signals=signals)
    return {"kept": build_pruner("hiprune", alpha=case["alpha"])(inputs, case["T"]).index[0].tolist()}
