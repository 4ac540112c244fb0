"""FEATHER against what the authors' own forward kept, tests/golden/feather.json: figures and how to make the inputs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from layer_oracle import Watch
from tiny_llava import LONG, make_image, make_llava, make_processor
from torch import nn

from prunezoo import build_pruner, encode
from prunezoo.host import encode_needs, run_pruned

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "feather.json").read_text(encoding="utf-8"))
PARTS = (  # of a decoder layer, in the order in which the file draws them
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "input_layernorm",
    "post_attention_layernorm",
)


class Given(nn.Module):
    """Stands in the projector's place and gives the image tokens of the file."""

    def __init__(self, features):
        super().__init__()
        self.features = features

    def forward(self, hidden):
        return self.features[None]


def fill(vlm, seed):
    """Weights, word embeddings and image tokens as the file says."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))

    decoder = vlm.get_decoder()
    decoder.embed_tokens.weight.copy_(draw(*decoder.embed_tokens.weight.shape))
    vlm.model.multi_modal_projector = Given(draw(36, 32))
    for layer in decoder.layers:
        for part in PARTS:
            weight = layer.get_submodule(part).weight
            weight.copy_(0.2 * draw(*weight.shape) + (1 if "norm" in part else 0))


def kept(vlm, batch, case, **options):
    """What both stages keep, and the weights that they go by, with as many tokens as the authors' code left."""
    pruner = build_pruner("feather", layers=(2, 4), **options).eval()
    counts = [torch.tensor([len(case[stage])]) for stage in ("first", "second")]
    pruner.schedule = lambda keep, available, depth: counts
    with Watch(pruner) as watch:
        encoded = encode(vlm, batch, encode_needs(pruner))
        run_pruned(vlm, encoded, pruner, counts[1])
    (first, one), (second, two) = watch.calls
    weights = [inputs.signal(*pruner.needs)[0] for inputs in (first, second)]
    return [one.index[0].tolist(), one.index[0][two.index[0]].tolist()], weights


@torch.no_grad()
def test_feather_keeps_what_the_authors_code_keeps():
    vlm, others = make_llava(num_hidden_layers=8), 0
    batch = make_processor()(text=[LONG], images=[make_image(0)], return_tensors="pt")
    assert batch["input_ids"][0].tolist() == GOLDEN["inputs"]["input_ids"]
    for case in GOLDEN["outputs"]:
        fill(vlm, case["seed"])
        ours, weights = kept(vlm, batch, case)
        assert ours == [case["first"], case["second"]], (case["seed"], case["R"])
        for stage, found in zip(("first", "second"), weights, strict=True):
            if f"{stage}_weights" in case:
                torch.testing.assert_close(found, torch.tensor(case[f"{stage}_weights"]), rtol=0, atol=2e-6)
        others += kept(vlm, batch, case, softmax="all")[0] != ours
    assert others > len(GOLDEN["outputs"]) / 3  # the softmax over all keys is another rule


def test_what_the_softmax_runs_over_is_one_of_two():
    with pytest.raises(ValueError, match=r"softmax='rows' of feather is unknown; there are: all, images"):
        build_pruner("feather", softmax="rows")
