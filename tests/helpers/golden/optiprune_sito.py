"""OptiPrune: 16 x 16 tokens of which half stay, a base for each 2 x 2 of them."""

import numpy as np
import torch

from prunezoo import PruneInputs, build_pruner
from prunezoo.host.families.cells import grid
from prunezoo.training_free.optiprune import fill_back

INPUTS = ("seed",)


def answer(case):
    """Bases are those that stay even where a quarter does; the others stand by how little they are like any of them.

    The authors' bases are in no order, so ours are put into theirs.
    """
    random = np.random.default_rng(case["seed"])
    x = random.standard_normal((1, 256, 16)).astype("float32")
    x[:, :, 0] += 1
    tokens, valid = torch.from_numpy(x), torch.ones(1, 256, dtype=torch.bool)
    inputs = PruneInputs(tokens, valid, grid(16, 16).flatten(0, 1)[None])
    output, fewer = (build_pruner("optiprune")(inputs, keep) for keep in (128, 64))
    bases, kept = fewer.index[0].tolist(), output.index[0].tolist()
    alike = torch.cosine_similarity(tokens[0, :, None], tokens[0, bases][None], dim=-1).amax(1)
    others = sorted(set(kept) - set(bases), key=lambda slot: -alike[slot])
    return {
        "bases": sorted(bases, key=case["bases"].index),
        "kept_others_order": others,
        "filled_from": fill_back(output.index, output)[0].tolist(),
    }
