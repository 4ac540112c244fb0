"""SCOPE: 144 tokens, attention of four heads; `picked` is in the order of choice."""

from dataclasses import replace

import numpy as np
import torch

from prunezoo import PruneInputs, build_pruner

INPUTS = ("seed", "T", "alpha", "combine")
COMBINES = {"multi": "product", "add": "add"}


def answer(case):
    """Clustered tokens for the seeds 3 and 4."""
    random = np.random.default_rng(case["seed"])
    x = random.standard_normal((1, 144, 32)).astype("float32")
    if case["seed"] in (3, 4):
        centres = random.standard_normal((20, 32)).astype("float32")
        x = (centres[np.arange(144) % 20][None] + np.float32(0.4) * x).astype("float32")
    logits = torch.from_numpy((2 * random.standard_normal((1, 4, 144))).astype("float32"))
    signals = {"vision_states": torch.from_numpy(x), "cls_head_attention": logits.softmax(-1).mT}
    valid = torch.ones(1, 144, dtype=torch.bool)
    inputs = PruneInputs(torch.zeros(1, 144, 4), valid, torch.zeros(1, 144, 3).long(), signals=signals)
    pruner = build_pruner("scope", alpha=float(case["alpha"]), combine=COMBINES[case["combine"]])
    picked = pruner.picks(replace(inputs, asked=(case["T"],)))[0].tolist()
    assert pruner(inputs, case["T"]).index[0].tolist() == sorted(picked), "handed on in raster order"
    return {"picked": picked}
