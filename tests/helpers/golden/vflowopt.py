"""VFlowOpt: a map of 27 x 27 patches and its voters; and 27 x 27 and 27 x 54 tokens that are recycled."""

import numpy as np
import torch

from prunezoo import PruneInputs, build_pruner
from prunezoo.host.families.cells import grid

INPUTS = ("seed", "a", "R", "asked")


def plain(features, cells, signals):
    return PruneInputs(features, torch.ones(features.shape[:2], dtype=torch.bool), cells, signals=signals)


def softmax(values):
    return torch.from_numpy(values).softmax(-1)


@torch.no_grad()
def answer(case):
    """The authors' count, which is not the one that is asked for; features to five digits behind the point."""
    random = np.random.default_rng(case["seed"])
    logits = (1.5 * random.standard_normal((2, 729, 729))).astype("float32")
    logits = logits + 2 * random.standard_normal((1, 1, 729)).astype("float32")
    weights = softmax(logits).mean(0)[None]
    importance = softmax((2 * random.standard_normal(2187)).astype("float32"))[None]
    x = torch.from_numpy(random.standard_normal((2187, 8)).astype("float32"))[None]
    base = grid(27, 27).flatten(0, 1)
    if "voters" in case:
        inputs, answers = plain(x[:, :729], base[None], {"vision_attention": weights}), {}
        for threshold in case["voters"]:
            pruner = build_pruner("vflowopt", threshold=float(threshold))
            ours = pruner.importance(inputs)[0]
            voters = pruner.voters(weights, inputs.valid)[0].nonzero()[:, 0].tolist()
            answers.setdefault("voters", {})[threshold] = voters[: len(case["voters"][threshold])]
            answers.setdefault("importance_sum", {})[threshold] = ours.sum().item()
            answers.setdefault("importance_first5", {})[threshold] = ours[:5].tolist()
        return answers
    large = grid(27, 54).flatten(0, 1).clone()
    large[:, 0] = 1
    inputs = plain(x, torch.cat([base, large])[None], {})
    pruner = build_pruner("vflowopt", cell=case["a"], count="code")
    output = pruner.recycle(inputs, importance, torch.tensor([case["asked"]]))
    index = output.index[0].tolist()
    gone = int(2187 - case["asked"] + int(2187 / case["a"] ** 2))
    recycled = set(importance[0].argsort()[:gone].tolist())
    return {
        "count": len(index),
        "kept": index[: len(case["kept"])],
        "merged_slots": [slot for slot in index if slot in recycled],
        "features_sum": output.features.sum().item(),
    }
