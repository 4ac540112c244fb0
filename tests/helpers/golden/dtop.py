"""DToP: 256 tokens with scores for ten classes: the largest is the confidence, and says the class."""

import numpy as np
import torch

from prunezoo.learned.dtop import spared

INPUTS = ("seed", "threshold")
SPARE = 5


def answer(case):
    random = np.random.default_rng(case["seed"])
    scores = torch.from_numpy((3 * random.standard_normal((2, 256, 10))).astype("float32")).softmax(-1)
    sure, classes = scores.max(-1)
    confident = sure > case["threshold"]
    stopping = confident & ~spared(sure, classes, confident, SPARE)
    return {
        "exit": [row.nonzero()[:, 0].tolist() for row in stopping],
        "confident": confident.sum(1).tolist(),
    }
