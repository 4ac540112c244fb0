"""CoreMatching: keep the image tokens that light the same neurons of an MLP as the question does.

CoreMatching: A Co-adaptive Sparse Inference Framework with Token and Neuron Pruning for Comprehensive Acceleration of
Vision-Language Models, Wang et al., ICML 2025, https://arxiv.org/abs/2505.19235,
code https://github.com/wangqinsi1/2025-ICML-CoreMatching.

A neuron of a gated MLP is lit where act(gate) * up is positive. A token's score is how many neurons it shares with the
fifth token from the prompt's end, the last of the question in LLaVA's template. So does the official code; the paper
counts over all words of the sentence. The official code lets the elbow of the sorted scores decide how many stay, and
clears their keys and values in layers 5 to 18 without making anything shorter: here `keep` tokens stay, once, from
`layer` on, and layers behind are really shorter. Pruning of neurons, its other half, is not here.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, Pruner
from ..core.errors import PruneZooError
from ..core.plan import gather_rows
from ..core.registry import register_pruner


@dataclass(frozen=True)
class CoreMatchingConfig(PrunerConfig):
    """Config of `corematching`."""

    layer: int = 6  # in front of which decoder layer tokens go; the MLP is that of the one before; at least 1
    word: int = 5  # which of the prompt's last tokens asks, from 1, the last

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.layer < 1:
            raise PruneZooError(f"layer={self.layer}: there must be a layer before the one where tokens go, at least 1")
        if self.word < 1:
            raise PruneZooError(f"word={self.word}: the prompt's last token is 1, the one before it 2")


@register_pruner("corematching")
class CoreMatching(Pruner):
    """Top tokens by neurons that they share with the question, once, between two layers."""

    stage = "layer"
    needs = ("mlp_activations@previous", "word_mlp_activations@previous")
    config_class = CoreMatchingConfig
    config: CoreMatchingConfig

    @classmethod
    def tiny_config(cls, feature_dim: int, text_dim: int) -> dict[str, Any]:
        """In front of a layer that small models have."""
        return {"layer": 2}

    def stages(self, depth: int) -> tuple[int, ...]:
        """The configured layer."""
        return (self.config.layer,)

    def score(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)``: how many neurons an image token shares with the word that asks (the first, if there are few)."""
        assert inputs.text_valid is not None  # the layer stage gives words
        place = (inputs.text_valid.sum(1, keepdim=True) - self.config.word).clamp_min(0)
        asks = gather_rows(inputs.signal("word_mlp_activations@previous"), place) > 0  # (B, 1, F)
        return ((inputs.signal("mlp_activations@previous") > 0) & asks).sum(-1).float()
