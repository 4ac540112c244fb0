"""SparseVLM v1.5: random attention of 35 words, 576 image tokens and 40 words; raters by random embeddings."""

import numpy as np
import torch

from prunezoo import PruneInputs, build_pruner
from prunezoo.host.signals.words import match_words
from prunezoo.training_free.sparsevlm import LISTS, find_raters

INPUTS = ("seed", "retain", "layer")
AHEAD, IMAGE, WORDS, WIDTH = 35, 576, 40, 32
LAYERS = (2, 6, 15)
NAMES = (64, 96, 128, 192)  # of the lists


def answer(case):
    """The 40 words behind the image are all the words there are."""
    random = np.random.default_rng(case["seed"])
    tokens = torch.from_numpy(random.standard_normal((IMAGE, WIDTH)).astype("float32"))[None]
    words = torch.from_numpy((0.3 * random.standard_normal((WORDS, WIDTH))).astype("float32"))[None]
    length = AHEAD + IMAGE + WORDS
    logits = random.standard_normal((1, 4, length, length)).astype("float32")
    logits = logits + np.float32(1.5) * random.standard_normal((1, 1, 1, length)).astype("float32")
    attention = torch.from_numpy(logits).softmax(-1).mean(1)[:, AHEAD + IMAGE :, AHEAD : AHEAD + IMAGE]
    valid, behind = torch.ones(1, IMAGE, dtype=torch.bool), torch.ones(1, WORDS, dtype=torch.bool)
    match = match_words(tokens, valid, words, behind)
    signals = {
        "word_match": match,
        "word_behind": behind.float(),
        "word_attention@previous": attention.transpose(1, 2),
    }
    inputs = PruneInputs(tokens, valid, torch.zeros(1, IMAGE, 3).long(), words, behind, signals)
    pruner = build_pruner("sparsevlm", count="lists", place="behind")
    asked = LISTS["v1.5"][NAMES.index(case["retain"])][LAYERS.index(case["layer"])]
    output = pruner(inputs, asked)
    raters = find_raters(inputs)
    scores = pruner.rate(inputs, raters)
    groups, stay = output.groups[0], min(asked, IMAGE - 1)
    kept = [slot for slot in range(IMAGE) if 0 <= int(groups[slot]) < stay]
    recycled = [slot for slot in range(IMAGE) if int(groups[slot]) >= stay]
    means = output.features[0, stay:].double()
    return {
        "raters": raters[0].nonzero()[:, 0].tolist(),
        "kept": kept,
        "recycled_order": sorted(recycled, key=lambda slot: -float(scores[0, slot])),
        "clusters": len(means),
        "cluster_means_first5": [[round(value, 6) for value in row] for row in means[:5].tolist()],
        "cluster_means_sum": round(float(means.sum()), 5),
    }
