"""HoloV: 576 tokens of width 32 in 16 crops, what CLS attends to."""

import numpy as np
import torch

from prunezoo import PruneInputs, build_pruner

INPUTS = ("seed", "T")
CROPS = 16


def answer(case):
    """Theirs stand crop by crop, by attention, but in raster order where a crop is kept whole; -1 for a row of zeros.

    Which they keep is ours, with what they lose; from it follows where they put it.
    """
    random = np.random.default_rng(case["seed"])
    features = random.standard_normal((1, 576, 32)).astype("float32")
    logits = (2 * random.standard_normal((1, 576))).astype("float32")
    if case["seed"] == 1:
        logits[:, :72] += 4
    attention, valid = torch.from_numpy(logits).softmax(-1), torch.ones(1, 576, dtype=torch.bool)
    cells, signals = torch.zeros(1, 576, 3).long(), {"cls_attention": attention}
    inputs = PruneInputs(torch.from_numpy(features), valid, cells, signals=signals)
    output = build_pruner("holov", crops=CROPS, overflow="lose")(inputs, case["T"])
    kept, order = output.index[0, : output.count[0]], []
    for crop in range(CROPS):
        own = kept[kept // (576 // CROPS) == crop]
        by_attention = own[attention[0, own].argsort(descending=True)]
        order += (own if len(own) == 576 // CROPS else by_attention).tolist()
    return {"order": order + [-1] * (case["T"] - len(order))}
