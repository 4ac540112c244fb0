"""What the tests of the layer stage on every family share: where it may stand, a pruner whose choice is known."""

import torch
from families import FAMILIES, NEWER

from prunezoo import Pruner
from prunezoo.host.families import find_family
from prunezoo.host.families.base import TAKES_FEATURES

CLOSE = {"rtol": 0, "atol": 1e-5}
PAST = {"qwen3_vl": (2, 3)}  # behind the levels of deepstack
NOW = [name for name in FAMILIES if TAKES_FEATURES or name != "qwen3_vl"]


def stages(name, vlm):
    """Where a pruner may stand: in front of two layers, or the last one where there is no more room."""
    if name not in NEWER:
        return PAST.get(name, (1, 2))
    first, decoder = find_family(vlm).first_layer, find_family(vlm).decoder()
    if first == decoder.depth:  # nowhere
        return (1, 2)
    return tuple(range(first, min(first + 2, decoder.last_to_cut + 1)))


class Scattered(Pruner):
    """Keeps what a hash of the cells says; another one at each stage."""

    name, stage = "scattered", "layer"

    def __init__(self, *layers):
        super().__init__()
        self.layers = layers
        self.eval()

    def stages(self, depth):
        return self.layers

    def score(self, inputs):
        place = inputs.cells.float() @ torch.tensor([12.9898, 78.233, 37.719]) + inputs.step
        return ((place.sin() * 43758.5453) % 1).to(inputs.features.dtype) + 0 * inputs.features[..., 0]


def last_logits(logits, encoded):
    last = encoded.mask.shape[1] - 1 - encoded.mask.flip(1).int().argmax(1)
    return logits[torch.arange(len(last)), last]
