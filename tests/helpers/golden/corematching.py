"""CoreMatching: 621 tokens of which 5 to 580 are the image's, random neurons."""

import numpy as np
import torch

from prunezoo import PruneInputs, build_pruner

INPUTS = ("seed",)


def answer(case):
    """The authors keep what is strictly above the elbow; its value is the best score that is not kept."""
    random = np.random.default_rng(case["seed"])
    neurons = random.standard_normal((1, 621, 256)).astype("float32")
    bias = random.standard_normal((1, 621, 1)).astype("float32")
    neurons = torch.from_numpy((neurons + 0.7 * bias).astype("float32"))
    image, words = neurons[:, 5:581], torch.cat([neurons[:, :5], neurons[:, 581:]], 1)
    valid = torch.ones(1, 576, dtype=torch.bool)
    text, text_valid = torch.zeros(1, 45, 1), torch.ones(1, 45, dtype=torch.bool)
    signals = {"mlp_activations@previous": image, "word_mlp_activations@previous": words}
    inputs = PruneInputs(torch.zeros(1, 576, 1), valid, torch.zeros(1, 576, 3).long(), text, text_valid, signals)
    pruner = build_pruner("corematching", count="elbow")
    output = pruner(inputs, pruner.pace(inputs, torch.tensor([576]), 0))
    kept, scores = output.index[0], output.scores[0]
    rest = torch.ones(576, dtype=torch.bool).index_fill(0, kept, False)
    return {
        "kept": kept.tolist(),
        "kept_count": int(output.count[0]),
        "score_first20": scores[:20].tolist(),
        "elbow_value": scores[rest].max().item(),
        "elbow_rank": int((scores > scores[rest].max()).sum()),
    }
