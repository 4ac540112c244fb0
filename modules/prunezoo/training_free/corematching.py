"""CoreMatching: keep the image tokens that light the same neurons of an MLP as the question does, and the neurons too.

CoreMatching: A Co-adaptive Sparse Inference Framework with Token and Neuron Pruning for Comprehensive Acceleration of
Vision-Language Models, Wang et al., ICML 2025, https://arxiv.org/abs/2505.19235,
code https://github.com/wangqinsi1/2025-ICML-CoreMatching.

A neuron of a gated MLP is lit where act(gate) * up is positive. A token's score is how many neurons it shares with the
fifth token from the prompt's end, the last of the question in LLaVA's template (`core="word"`), or with the core of the
prompt (`core="prompt"`): the neurons that are strong in most of its words, strong in a word being the `strong` largest
of those that it lights. `keep` tokens stay, from `layer` on, and layers behind are really shorter. With `count="elbow"`
as many stay as score above the elbow, the point of the sorted scores that is farthest from the line between their ends.

With `neurons` below 1 what `generate` writes behind a prompt with images is computed with the core neurons of each
layer alone, those that are strong in most tokens of the prompt that the layer reads: for one prompt at a time. A caller
who steps through the model with a cache of his own, and may have several, gets all neurons.

| | authors' code | paper | ours |
|---|---|---|---|
| score | neurons shared with one word | with the core of the sentence | one word; `core="prompt"` |
| how many stay | elbow | elbow | `keep`; `count="elbow"` |
| where | keys and values cleared in layers 5 to 18 | from a layer on | from a layer on, and shorter |
| share of strong neurons, of core ones | not known | not known | 0.2, 0.4, reconstructed; `strong`, `core_share` |
| neurons in the decode step | – | core ones | all; `neurons=0.4` core ones |
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, Pruner
from ..core.errors import PruneZooError
from ..core.plan import gather_rows
from ..core.registry import register_pruner
from ..host.parts.core_neurons import CoreNeurons, core_of

CHOICES = {"core": ("word", "prompt"), "count": ("keep", "elbow")}


@dataclass(frozen=True)
class CoreMatchingConfig(PrunerConfig):
    """Config of `corematching`."""

    layer: int = 6  # in front of which decoder layer tokens go; the MLP is that of the one before; at least 1
    word: int = 5  # which of the prompt's last tokens asks, from 1, the last
    core: str = "word"  # with whose neurons tokens share: of that "word", or the core of the whole "prompt"
    strong: float = 0.2  # share of the neurons that a token lights which are strong in it, in (0, 1]
    core_share: float = 0.4  # share of an MLP's neurons that are the core of a prompt, in (0, 1]
    count: str = "keep"  # tokens that stay: as many as asked for, "keep"; or those above the "elbow", whatever that is
    neurons: float = 1.0  # share of each MLP's neurons that are used behind the prompt, in (0, 1]; 1: all

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check_choices("corematching", **CHOICES)
        if self.layer < 1:
            raise PruneZooError(f"layer={self.layer}: there must be a layer before the one where tokens go, at least 1")
        if self.word < 1:
            raise PruneZooError(f"word={self.word}: the prompt's last token is 1, the one before it 2")
        for name in ("strong", "core_share", "neurons"):
            if not 0 < getattr(self, name) <= 1:
                raise PruneZooError(f"{name}={getattr(self, name)} of corematching: it is a share in (0, 1]")


@register_pruner("corematching")
class CoreMatching(Pruner):
    """Top tokens by neurons that they share with the question, once, between two layers."""

    stage = "layer"
    criteria = ("prompt",)
    needs = ("mlp_activations@previous", "word_mlp_activations@previous")
    config_class = CoreMatchingConfig
    config: CoreMatchingConfig

    def __init__(self, config: CoreMatchingConfig | None = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        c = self.config
        self.cores = CoreNeurons(c.neurons, c.strong) if c.neurons < 1 else None

    @classmethod
    def tiny_config(cls, feature_dim: int, text_dim: int) -> dict[str, Any]:
        """In front of a layer that small models have."""
        return {"layer": 2}

    @property
    def exact(self) -> bool:  # type: ignore[override]  # a class attribute where it is not configured
        """Whether `keep` tokens stay."""
        return self.config.count == "keep"

    def stages(self, depth: int) -> tuple[int, ...]:
        """The configured layer."""
        return (self.config.layer,)

    def adapt(self, vlm: nn.Module) -> AbstractContextManager[Any]:
        """Note the core neurons of prompts, where they are asked for; :meth:`score` switches them on."""
        return nullcontext() if self.cores is None else self.cores.ready(vlm)

    def go_on(self, pruned: bool) -> None:
        """Core neurons are for what follows on a prompt with images, not for other conversations in between."""
        if self.cores is not None:
            self.cores.switch(pruned)

    def pace(self, inputs: PruneInputs, keep: Tensor, to_go: int) -> Tensor:
        """As asked for, or what is above the elbow."""
        return elbow(self.score(inputs), inputs.valid) if self.config.count == "elbow" else keep

    def score(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)``: how many neurons an image token shares with the word that asks (the first, if there are few)."""
        if self.cores is not None:
            self.cores.switch(True)
        words, real = inputs.signal("word_mlp_activations@previous"), inputs.text_valid
        assert real is not None  # the layer stage gives words
        lit = inputs.signal("mlp_activations@previous") > 0
        if self.config.core == "prompt":
            core = core_of(words.float(), real, self.config.strong, self.config.core_share)  # (B, K)
            return lit.gather(2, core[:, None].expand(-1, lit.shape[1], -1)).sum(-1).float()
        place = (real.sum(1, keepdim=True) - self.config.word).clamp_min(0)
        return (lit & (gather_rows(words, place) > 0)).sum(-1).float()


def elbow(scores: Tensor, valid: Tensor) -> Tensor:
    """How many scores of an image are above their elbow.

    Args:
        scores: ``(B, N)``.
        valid: ``(B, N)`` bool.

    Returns:
        ``(B,)`` long, at least 1.
    """
    count = valid.sum(1, keepdim=True)
    falling = scores.double().masked_fill(~valid, -torch.inf).sort(1, descending=True).values
    first, last = falling[:, :1], falling.gather(1, (count - 1).clamp_min(0))
    place = torch.arange(scores.shape[1], device=scores.device)
    line = first + (last - first) * place / (count - 1).clamp_min(1)
    away = (falling - line).abs().masked_fill(place >= count, -1.0)  # as far as along the normal, but for a factor
    least = falling.gather(1, away.argmax(1, keepdim=True))
    return ((scores > least) & valid).sum(1).clamp_min(1)
