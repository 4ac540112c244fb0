"""What the tests of the layer stage share: pruners that keep what a table says, a model that gives its maps away."""

import torch
from tiny_llava import make_llava

from prunezoo import Pruner

RAGGED = torch.tensor([3, 20, 1, 36])  # tokens that the last stage leaves of the four images of `mixed`


class Scripted(Pruner):
    """Keeps what a fixed table of random numbers says; another table at each stage."""

    name, stage = "scripted", "layer"
    layers: tuple[int, ...] = (2,)

    def stages(self, depth):
        return self.layers

    def score(self, inputs):
        table = torch.rand(6, 6, generator=torch.Generator().manual_seed(inputs.step))
        return table[inputs.cells[..., 1], inputs.cells[..., 2]] + 0 * inputs.features[..., 0]


def scripted(*layers):
    pruner = Scripted().eval()
    pruner.layers = layers
    return pruner


class Ranked(Pruner):
    """Keeps the tokens with the largest norm."""

    name = "ranked"

    def score(self, inputs):
        return inputs.features.norm(dim=-1)


class Together(Pruner):
    """A prompt-stage and a layer-stage pruner in one."""

    name = "together"

    def __init__(self, *parts):
        super().__init__()
        self.members = torch.nn.ModuleList(parts)

    def parts(self, keep):
        return tuple(zip(self.members, (18, keep), strict=True))


def eager_copy(vlm):
    """`deep_llava` with the attention that returns its maps."""
    eager = make_llava(num_hidden_layers=4)
    eager.load_state_dict(vlm.state_dict())
    eager.set_attn_implementation({"text_config": "eager"})
    return eager


def no_rotation(_, args, kwargs):
    """A hook in front of a decoder layer: its queries and keys are rotated by nothing."""
    cos, sin = kwargs["position_embeddings"]
    return args, {**kwargs, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}


def close(one, two):
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)
