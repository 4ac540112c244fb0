"""CDPruner: 144 tokens, their CLIP embeds, and two pieces of text."""

import numpy as np
import torch
from torch.nn import functional

from prunezoo import PruneInputs, build_pruner

INPUTS = ("seed", "T", "image")


def answer(case):
    """Clustered tokens for the seeds 3, 4 and 10; seed 10 is two images, whose relevance is scaled together."""
    seed = case["seed"]
    random, images = np.random.default_rng(seed), 2 if seed == 10 else 1
    x = random.standard_normal((images, 144, 256)).astype("float32")
    if seed in (3, 4, 10):
        centres = random.standard_normal((24, 256)).astype("float32")
        x = (centres[np.arange(144) % 24][None] + np.float32(0.5) * x).astype("float32")
    v = random.standard_normal((images, 144, 24)).astype("float32")
    q = torch.from_numpy(random.standard_normal((2, 24)).astype("float32"))
    if seed == 10:
        v[1] = v[1] + np.float32(1)
    text = functional.normalize(q, dim=-1).mean(0, keepdim=True).expand(images, -1)  # as ClipText gives it
    signals = {"image_features": torch.from_numpy(v), "text_features": text}
    valid = torch.ones(images, 144, dtype=torch.bool)
    inputs = PruneInputs(torch.from_numpy(x), valid, torch.zeros(images, 144, 3).long(), signals=signals)
    output = build_pruner("cdpruner", relevance="clip", scaling="batch")(inputs, case["T"])
    return {"kept": output.index[case.get("image", 0)].tolist()}
