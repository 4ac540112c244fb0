"""MMTok: keep the tokens that cover the question's words and the picture itself.

MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs, Dong et al., ICLR 2026,
https://arxiv.org/abs/2508.18264, code https://github.com/Ironieser/MMTok. Written from a reading of what the code
computes.

What is to be covered are the m words of the question and the n image tokens. How well image token j covers word i is a
softmax over j of their cosine in the language model's input space, over m; how well it covers image token i, alpha
times a softmax of the cosine of their features before the projector, over n. One token a step is chosen: the one that
adds most to what the best of those chosen covers, summed over words and tokens.

| | authors' code | paper | ours |
|---|---|---|---|
| words | question, without suffixes | question | question if `markers` of `attach` tell it, else the prompt |
| stop words | left out by a list | – | stay: a list is of one language |
| text temperature | .02 (Qwen: .01) | – | .02; `text_temperature` |
| patches that make a picture square | not chosen, but covered | – | may be chosen; `padding=False` as the authors |
| tiles | the same of each | – | T, over all tiles together |
| batch | one image | – | any |
| positions | numbered anew | – | kept; `positions="compact"` of `attach` |
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.coverage import cover
from ..core.errors import PruneZooError
from ..core.plan import mask_to_index, picks_mask
from ..core.registry import register_pruner
from ._question import question

MEAN_COLOUR = 0.02
"""Pixels are normalised by the mean colour, and squares are filled up with it, rounded to whole numbers: nearly 0."""


@dataclass(frozen=True)
class MMTokConfig(PrunerConfig):
    """Settings of MMTok."""

    alpha: float = 0.5  # weight of covering the image against covering the words, at least 0
    text_temperature: float = 0.02  # of the softmax for words, above 0; .01 for Qwen
    vision_temperature: float = 0.2  # of the softmax for image tokens, above 0
    padding: bool = True  # False: patches of the mean colour, by which pictures were made square, come last

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.alpha < 0:
            raise PruneZooError(f"alpha={self.alpha} of mmtok is out of range: it must be at least 0")
        for field in ("text_temperature", "vision_temperature"):
            if getattr(self, field) <= 0:
                raise PruneZooError(f"{field}={getattr(self, field)} of mmtok is out of range: it must be above 0")


@register_pruner("mmtok")
class MMTok(Pruner):
    """Greedy coverage of words and picture."""

    criteria = ("prompt", "diversity")
    config_class = MMTokConfig
    config: MMTokConfig

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a class attribute where it is not configured
        """Output of the block that is projected; pixels, to find padding."""
        return ("vision_states",) if self.config.padding else ("vision_states", "pixels")

    @property
    def reads_prompt(self) -> bool:
        """Its words are to be covered."""
        return True

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """Choose in all images at once."""
        valid, states = inputs.valid, inputs.signal("vision_states")
        asked, text = question(inputs, self.name)
        words = _shares(text, asked, inputs.features, valid, self.config.text_temperature)
        picture = _shares(states, valid, states, valid, self.config.vision_temperature)
        values = torch.cat([words, self.config.alpha * picture], 1)  # (B, T + N, N)
        picks = cover(values, valid, inputs.most_asked, None if self.config.padding else self._padding_last(inputs))
        index, kept = mask_to_index(picks_mask(picks, keep, valid.shape[1]), inputs.most_asked)
        return PruneOutput(index, kept)

    def _padding_last(self, inputs: PruneInputs) -> Callable[[Tensor], Tensor]:
        """Puts padding of the picture behind all else; no gain is above 1 + alpha."""
        padding = (inputs.signal("pixels").abs() < MEAN_COLOUR).flatten(2).all(2)
        behind = (2 + self.config.alpha) * padding
        return lambda gains: gains - behind


def _shares(rows: Tensor, real: Tensor, tokens: Tensor, valid: Tensor, temperature: float) -> Tensor:
    """How well each token covers each row: a softmax over tokens of their cosine, over the number of rows.

    Args:
        rows: ``(B, R, C)``.
        real: ``(B, R)`` bool.
        tokens: ``(B, N, C)``.
        valid: ``(B, N)`` bool.
        temperature: Of the softmax.

    Returns:
        ``(B, R, N)`` float32, 0 in rows that are not real.
    """
    cosine = functional.normalize(rows.float(), dim=-1) @ functional.normalize(tokens.float(), dim=-1).mT
    shares = (cosine / temperature).masked_fill(~valid[:, None], -torch.inf).softmax(2)
    return (shares / real.sum(1).clamp_min(1)[:, None, None]).masked_fill(~real[..., None], 0.0)
