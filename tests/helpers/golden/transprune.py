"""TransPrune: 631 tokens of which 35 to 610 are the image's, as two layers take and give them, and attention."""

from dataclasses import replace

import numpy as np
import torch

from prunezoo import PruneInputs, build_pruner
from prunezoo.host.signals.layer_states import change

INPUTS = ("seed",)
IMAGE = slice(35, 611)


def parts(values):
    """Of the image, and of the words around it."""
    return values[:, IMAGE], torch.cat([values[:, : IMAGE.start], values[:, IMAGE.stop :]], 1)


@torch.no_grad()
def answer(case):
    """The authors add the two shares, which is twice our mean of them; of the 504 the first 40 are given."""
    random = np.random.default_rng(case["seed"])
    valid, text_valid = torch.ones(1, 576, dtype=torch.bool), torch.ones(1, 55, dtype=torch.bool)
    features, text = torch.zeros(1, 576, 1), torch.zeros(1, 55, 1)
    inputs = PruneInputs(features, valid, torch.zeros(1, 576, 3).long(), text, text_valid)
    pruner = build_pruner("transprune").eval()
    for _ in range(2):
        signals = {}
        for name, part in (("attention_change", 0.5), ("mlp_change", -0.2)):
            taken = random.standard_normal((1, 631, 32)).astype("float32")
            gave = (part * taken + random.standard_normal((1, 631, 32))).astype("float32")
            image, words = parts(change(torch.from_numpy(taken), torch.from_numpy(gave)))
            signals |= {f"{name}@previous": image, f"word_{name}@previous": words}
        inputs = replace(inputs, signals=signals)
        inputs = replace(inputs, carry={"changed": pruner.changed(inputs)}, signals=signals)
    changed = inputs.carry["changed"]
    logits = (random.standard_normal((4, 20, 631)) * 2).astype("float32")
    looked = torch.from_numpy(logits).softmax(-1)[..., IMAGE].mean((0, 1))[None]
    nothing = {name: torch.zeros_like(values) for name, values in inputs.signals.items()}  # of a third layer
    inputs = replace(inputs, signals={**nothing, "prompt_attention": looked})
    output = pruner(inputs, 504)
    return {
        "ttv_first8": changed[0, :8].tolist(),
        "ttv_sum": changed.sum().item(),
        "score_first8": (2 * output.scores[0, :8]).tolist(),
        "kept_504": output.index[0, :40].tolist(),
        "top72": pruner(inputs, 72).index[0].tolist(),
    }
