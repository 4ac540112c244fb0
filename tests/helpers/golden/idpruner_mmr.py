"""MMR: 144 tokens, scored by what is given; the choice is that of `select="mmr"`."""

import numpy as np
import torch

from prunezoo import PruneInputs
from prunezoo.core.contract import Pruner

INPUTS = ("seed", "T", "lam", "parallel_k")


class Scored(Pruner):
    """Scores as it is told."""

    name = "scored"

    def score(self, inputs):
        return self.scores


def answer(case):
    """Clustered tokens for the seeds 3 and 4."""
    random = np.random.default_rng(case["seed"])
    x = random.standard_normal((144, 32)).astype("float32")
    if case["seed"] in (3, 4):
        centres = random.standard_normal((20, 32)).astype("float32")
        x = (centres[np.arange(144) % 20] + np.float32(0.4) * x).astype("float32")
    pruner = Scored().eval()
    pruner.scores = torch.from_numpy(random.standard_normal(144).astype("float32"))[None]
    pruner.select = f"mmr:{case['lam']}:{case['parallel_k']}"
    valid = torch.ones(1, 144, dtype=torch.bool)
    output = pruner(PruneInputs(torch.from_numpy(x)[None], valid, torch.zeros(1, 144, 3).long()), case["T"])
    return {"kept": output.index[0].tolist()}
