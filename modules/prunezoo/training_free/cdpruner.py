"""CDPruner: tokens that are relevant to the question and unlike each other, by a determinantal point process.

Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs, Zhang et al., NeurIPS 2025,
https://arxiv.org/abs/2506.10967, code https://github.com/Theia-4869/CDPruner. Written from a reading of what the code
computes, and of what OpenVINO GenAI runs under its name.

The kernel of tokens i and j is r_i * cosine(x_i, x_j) * r_j, of projected tokens x and their relevance r, brought to
(0, 1]. Chosen is, token by token, what makes the determinant of the kernel among those chosen largest.

By default relevance is the mean cosine of a token to the embeddings of the question's words, as in OpenVINO: any model
has these. `relevance="clip"` is the authors': **minus** the cosine of CLIP's image and text embeddings (of CLIP patches
those unlike the text are where the object is; authors and others have found it so), for which `attach` is to be given a
`text_encoder` as :class:`prunezoo.ClipText`.

| | authors' code | paper | ours |
|---|---|---|---|
| relevance | minus CLIP cosine, mean over 77-token pieces | CLIP cosine | mean cosine to words; `relevance="clip"` |
| relevance to 0..1 | over all images of a batch | – | of each image; `scaling="batch"` |
| all equally relevant | NaN, and 2 tokens | – | all 1: diversity alone |
| kernel | product | product | product; `kernel="blend"`, `weight=.5` as OpenVINO's |
| parts | whole image (OpenVINO: two halves) | whole image | whole image; `halves=True` |
| more tokens than dimensions | fewer tokens than asked | – | the rest by relevance |
| tiles | the same of each | – | T, over all tiles together |
| positions | numbered anew | – | kept; `positions="compact"` of `attach` |
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.cosines import Cosines
from ..core.errors import PruneZooError
from ..core.plan import mask_to_index, picks_mask
from ..core.registry import register_pruner
from ._question import mean_word

CHOICES = {"relevance": ("words", "clip"), "scaling": ("image", "batch"), "kernel": ("product", "blend")}
ROUNDING = 1e-6
"""Of a token's own kernel: where no more is left of it, it is spanned by those chosen, up to float32."""


@dataclass(frozen=True)
class CDPrunerConfig(PrunerConfig):
    """Settings of CDPruner."""

    relevance: str = "words"  # "words": to the language model's embeddings; "clip": needs a `text_encoder`
    scaling: str = "image"  # relevance to (0, 1] over "image", or over "batch": then what an image keeps depends on it
    kernel: str = "product"  # "product": r S r; "blend": (1 - weight) S + weight r S r
    weight: float = 0.5  # of relevance in a blend, in [0, 1]; 0 is diversity alone
    halves: bool = False  # choose half of the tokens from each half of an image, as OpenVINO does

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check_choices("cdpruner", **CHOICES)
        if not 0 <= self.weight <= 1:
            raise PruneZooError(f"weight={self.weight} of cdpruner is out of range: it must lie in [0, 1]")


@register_pruner("cdpruner")
class CDPruner(Pruner):
    """Greedy choice by a determinantal point process."""

    criteria = ("prompt", "diversity")
    config_class = CDPrunerConfig
    config: CDPrunerConfig

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a class attribute where it is not configured
        """What CLIP says, if it is asked."""
        return ("image_features", "text_features") if self.config.relevance == "clip" else ()

    @property
    def across_batch(self) -> str:  # type: ignore[override]  # a class attribute where it is not configured
        """Relevance may be scaled over all images of a batch."""
        return "scaling='batch'" if self.config.scaling == "batch" else ""

    @property
    def reads_prompt(self) -> bool:
        """The question is what relevance is to."""
        return True

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """Choose in all images at once."""
        valid, most = inputs.valid, inputs.most_asked
        cosines = Cosines(inputs.features, valid, most)
        raw = self._relevance(inputs, cosines.unit)
        first = valid & (valid.cumsum(1) <= valid.sum(1, keepdim=True) // 2)
        parts = [(valid, keep, most)]
        if self.config.halves:
            parts = [(first, keep // 2, most // 2), (valid & ~first, keep - keep // 2, most - most // 2)]
        chosen = torch.zeros_like(valid)
        for part, count, longest in parts:
            picks = self._picks(cosines, self._scaled(raw, part), part, longest)
            chosen |= picks_mask(picks, count, valid.shape[1])
        index, kept = mask_to_index(chosen, most)
        return PruneOutput(index, kept)

    def _relevance(self, inputs: PruneInputs, unit: Tensor) -> Tensor:
        """``(B, N)``, before scaling."""
        if self.config.relevance == "clip":
            images = functional.normalize(inputs.signal("image_features").float(), dim=-1)
            return -(images @ inputs.signal("text_features").float()[..., None])[..., 0]
        return (unit @ mean_word(inputs, self.name)[..., None])[..., 0]

    def _scaled(self, raw: Tensor, part: Tensor) -> Tensor:
        """Relevance ``(B, N)`` in (0, 1] over the tokens ``part (B, N)``; 1 where all are alike."""
        axes = (0, 1) if self.across_batch else (1,)
        low = raw.masked_fill(~part, torch.inf).amin(axes, keepdim=True)
        high = raw.masked_fill(~part, -torch.inf).amax(axes, keepdim=True)
        return ((raw - low + 1e-6) / (high - low).clamp_min(1e-6)).masked_fill(~part, 0.0)

    def _picks(self, cosines: Cosines, relevance: Tensor, part: Tensor, most: int) -> Tensor:
        """The greedy choice, by a Cholesky factor of the kernel that grows by a column each step.

        Args:
            cosines: Of the tokens.
            relevance: ``(B, N)``.
            part: ``(B, N)`` bool, the tokens that may be chosen.
            most: K.

        Returns:
            ``(B, K)`` long in the order of choice.
        """
        share = self.config.weight if self.config.kernel == "blend" else 1.0
        weighed = share * relevance
        own = 1 - share + weighed * relevance  # of a token with itself: its cosine is 1
        bound, left = ROUNDING * own, own.masked_fill(~part, -torch.inf)
        spanned = (relevance - 2).masked_fill(~part, -torch.inf)  # these stand behind all others
        factor = own.new_zeros(len(own), most, own.shape[1])
        picks = part.new_empty(len(own), most, dtype=torch.long)
        for step in range(most):
            best = torch.where(left > bound, left, spanned).argmax(1, keepdim=True)
            picks[:, step : step + 1] = best
            row = cosines.rows(best)  # (B, 1, N)
            row *= (weighed * relevance.gather(1, best)).add_(1 - share)[:, None]
            before = factor[:, :step]
            row.baddbmm_(before.gather(2, best[:, None].expand(-1, step, 1)).mT, before, alpha=-1)
            height = left.gather(1, best)
            row *= torch.where(height > bound.gather(1, best), height.rsqrt(), 0.0)[:, None]  # spanned: adds nothing
            factor[:, step] = row[:, 0]
            left = left.addcmul(row[:, 0], row[:, 0], value=-1)
            for values in (left, spanned):
                values.scatter_(1, best, -torch.inf)
        return picks
