"""MMTok: 576 tokens and twelve words, none of them a stop word."""

import numpy as np
import torch

from prunezoo import PruneInputs, build_pruner

INPUTS = ("seed", "T", "tau_text", "tau_vision", "alpha", "padding")


def answer(case):
    """Clustered tokens for seed 1. Padding, as "0..95", is what has the mean colour."""
    random = np.random.default_rng(case["seed"])
    z = random.standard_normal((12, 32)).astype("float32")
    x = random.standard_normal((576, 32)).astype("float32")
    u = random.standard_normal((576, 24)).astype("float32")
    if case["seed"] == 1:
        group = np.arange(576) % 20
        x = (random.standard_normal((20, 32)).astype("float32")[group] + 0.3 * x).astype("float32")
        u = (random.standard_normal((20, 24)).astype("float32")[group] + 0.3 * u).astype("float32")
    pixels = torch.ones(1, 576, 3, 2, 2)
    if case["padding"] is not None:
        first, last = map(int, case["padding"].split(".."))
        pixels[:, first : last + 1] = 0
    pruner = build_pruner(
        "mmtok",
        alpha=float(case["alpha"]),
        text_temperature=float(case["tau_text"]),
        vision_temperature=float(case["tau_vision"]),
        padding=case["padding"] is None,
    )
    valid, text_valid = torch.ones(1, 576, dtype=torch.bool), torch.ones(1, 12, dtype=torch.bool)
    tokens, words, states = (torch.from_numpy(own)[None] for own in (x, z, u))
    signals = {"vision_states": states, "pixels": pixels}
    inputs = PruneInputs(tokens, valid, torch.zeros(1, 576, 3).long(), words, text_valid, signals)
    return {"kept": pruner(inputs, case["T"]).index[0].tolist()}
