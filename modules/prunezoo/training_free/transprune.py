"""TransPrune: keep the image tokens that layers change most, and that the instruction looks at.

TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model, Li et al., CVPR 2026,
https://arxiv.org/abs/2507.20630, code https://github.com/liaolea/TransPrune.

What attention or MLP of a layer makes of a token is compared with what they take of it, before it is added: how much
longer it is, times the softmax over all tokens of how far it turned, 1 - cosine. Both are added up, over all layers
from the one in front of the first cut. A token's score is its share of this, over the image, and its share of what the
words behind the image attend to in the layer in front of which it stands, mean over heads.

Tokens leave in front of layers 7, 9 and 12 of 32. The authors keep 7/8, 5/8 and 1/8 of all; `keep` is what the last cut
leaves, and of all that leave 1/7 and 3/7 are gone behind the first two, which is the same for `keep` = 1/8.

| | authors' code | paper | ours |
|---|---|---|---|
| how far it turned | 1 - cosine | 1 - abs(cosine) | 1 - cosine; `turn="absolute"` |
| softmax | over the whole batch | over all tokens | over the image and the words of its prompt |
| layers | 7, 9, 12 of 32 | the same | as far in at other depths; `layers` |
| counts | cut off | – | rounded |
| positions | numbered anew | – | kept; anew by `attach(..., positions="compact")` |
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.errors import PruneZooError
from ..core.gates import topk_mask
from ..core.plan import mask_to_index
from ..core.registry import register_pruner

PLACES = (7 / 32, 9 / 32, 12 / 32)  # of the depth
GONE = (1 / 7, 3 / 7, 1.0)  # behind each, of all that leave
PARTS = ("attention_change", "mlp_change")


@dataclass(frozen=True)
class TransPruneConfig(PrunerConfig):
    """Config of `transprune`."""

    layers: tuple[int, ...] | None = None  # in front of which three tokens go, from 1 on; None: 7/32, 9/32, 12/32
    turn: str = "cosine"  # how far a token turned: 1 - "cosine", or the paper's 1 - abs(cosine), "absolute"
    instruction: float = 0.5  # weight of the instruction's attention against what changed, in [0, 1]

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check_choices("transprune", turn=("cosine", "absolute"))
        layers = self.layers
        if layers is not None and (len(layers) != 3 or layers[0] < 1 or list(layers) != sorted(set(layers))):
            raise PruneZooError(f"layers={list(layers)} of transprune: name three layers, ascending, from 1 on")
        if not 0 <= self.instruction <= 1:
            raise PruneZooError(f"instruction={self.instruction} of transprune is out of range: a weight in [0, 1]")


@register_pruner("transprune")
class TransPrune(Pruner):
    """Top tokens by how layers change them and by the instruction's attention, at three depths."""

    stage = "layer"
    criteria = ("change", "attention")
    needs = (*(word + part + "@previous" for part in PARTS for word in ("", "word_")), "prompt_attention")
    config_class = TransPruneConfig
    config: TransPruneConfig

    @classmethod
    def tiny_config(cls, feature_dim: int, text_dim: int) -> dict[str, Any]:
        """In front of layers that small models have."""
        return {"layers": (1, 2, 3)}

    def stages(self, depth: int) -> tuple[int, ...]:
        """Every layer from the first cut to the last: between them nothing leaves, but what changes is added up."""
        first, _, last = self.cuts(depth)
        return tuple(range(first, last + 1))

    def cuts(self, depth: int) -> tuple[int, ...]:
        """The configured layers, or those of the default."""
        if self.config.layers is None and depth < 4:
            raise PruneZooError(f"transprune: a decoder of {depth} layers has no room for three cuts: set layers")
        return self.config.layers or tuple(max(round(depth * place), i) for i, place in enumerate(PLACES, 1))

    def schedule(self, keep: Tensor, available: Tensor, depth: int) -> list[Tensor]:
        """As published, as shares of all that leave."""
        cuts, steps = self.cuts(depth), []
        for stage in self.stages(depth):
            gone = GONE[sum(cut <= stage for cut in cuts) - 1]
            steps.append((available - (available - keep).double() * gone).round().long())
        return steps

    def changed(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)``: how layers have changed each token so far, the one that has just run among them."""
        assert inputs.text_valid is not None  # the layer stage gives words
        total = inputs.carry["changed"] if "changed" in inputs.carry else torch.zeros_like(inputs.valid).float()
        for part in PARTS:
            ratio, _ = inputs.signal(f"{part}@previous").float().unbind(-1)
            turns = [
                self._turn(inputs.signal(f"{word}{part}@previous")).masked_fill(~real, -torch.inf)
                for word, real in (("", inputs.valid), ("word_", inputs.text_valid))
            ]
            total = total + ratio * torch.cat(turns, 1).softmax(1)[:, : ratio.shape[1]]
        return total

    def _turn(self, change: Tensor) -> Tensor:
        """How far tokens turned."""
        cosine = change[..., 1].float()
        return 1 - (cosine.abs() if self.config.turn == "absolute" else cosine)

    @staticmethod
    def _share(values: Tensor, inputs: PruneInputs) -> Tensor:
        """Of the sum over the image; 0 on padding."""
        values = values.masked_fill(~inputs.valid, 0)
        return values / values.sum(1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """The best by both shares; what changed goes on with the tokens."""
        weight, changed = self.config.instruction, self.changed(inputs)
        looked = inputs.signal("prompt_attention").float()
        scores = (1 - weight) * self._share(changed, inputs) + weight * self._share(looked, inputs)
        index, valid = mask_to_index(topk_mask(scores, inputs.valid, keep), inputs.most_asked)
        scores = scores.masked_fill(~inputs.valid, -torch.inf)
        return PruneOutput(index, valid, scores=scores, carry={"changed": changed})
