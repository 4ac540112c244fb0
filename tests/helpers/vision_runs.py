"""What the tests of the vision stage share: small towers, how they are run, pruners that drop in or behind blocks."""

import torch

from prunezoo import PruneInputs
from prunezoo.core.contract import Pruner
from prunezoo.host.stages.cut import Timer
from prunezoo.host.stages.vision import VisionStage

SIDE = 5  # of the grid of patches
N = SIDE * SIDE


def patches(rows):
    """What the stage is given of ``rows`` pictures."""
    axis = torch.arange(SIDE)
    cells = torch.stack([torch.zeros(SIDE, SIDE, dtype=torch.long), *torch.meshgrid(axis, axis, indexing="ij")], -1)
    return PruneInputs(
        torch.zeros(rows, N, 0), torch.ones(rows, N, dtype=torch.bool), cells.flatten(0, 1).expand(rows, -1, -1)
    )


def run(model, tower, pruner, pixels, keep):
    """The features of the projected state, and what is left."""
    counts, timer = tuple(torch.as_tensor(keep).tolist()), Timer(pixels.device)
    with torch.no_grad(), VisionStage(tower, pruner.eval(), patches(len(pixels)), counts, timer) as stage:
        states = model(pixels, output_hidden_states=True).hidden_states[tower.layers[-1]]
    return stage.output(states[:, tower.prefix :])


TOWERS = [("clip", -2), ("siglip", -1)]


class Attended(Pruner):
    """Keeps what receives most attention in one block and then, of that, in another: nothing is merged."""

    stage = "vision"
    needs = ("received_attention",)
    places: tuple[int, ...] = (0, 2)

    def stages(self, depth):
        return self.places

    def score(self, inputs):
        assert inputs.layer in self.places
        return inputs.signal("received_attention")


class AttendedLater(Attended):
    after_block = True
