"""Recoverable Compression: what CLS attends to, what the question names, and tokens made of the rest.

Recoverable Compression: A Multimodal Vision Token Recovery Mechanism Guided by Text Information, Chen et al.,
AAAI 2025, https://arxiv.org/abs/2409.01179, code https://github.com/banjiuyufen/Recoverable-Compression. Written from a
reading of what the code computes.

CLS attends in the block behind the projected one, whose heads are taken as one: a = softmax(q k / sqrt(width)). The
most attended tokens are chosen; then, of the others, those that are nearest to the text. Of what is left the most
attended are centres: to each is added the sum of a x over the 32 others of the rest that are nearest to it, by the
cosine of their keys and `weight` times their own nearness to the text. One more token is the sum of a x over the rest
without its centres, at the slot of the most attended of them. With `keep="auto"` the image says how many of each there
are: as many as are local outliers, of attention, of nearness to the text, of the attention of the rest.

Nearness to the text is the mean cosine of a token to the embeddings of the question's words, which any model has.
`relevance="clip"` is the authors': the cosine of CLIP's image and text embeddings, for which `attach` is to be given a
`text_encoder` as :class:`prunezoo.ClipText`.

| | authors' code | ours |
|---|---|---|
| tokens | as outliers say, of each kind | T; of each kind a share; `split="outliers"` in proportion to outliers |
| centres, by outliers | share times the width of the tower | share of the rest; `centres_of="width"` |
| keys of the rest | of other tokens, by numbers in the rest | its own; `keys="shifted"` as the code |
| text | last padded position of CLIP, first line | all of the question |
| order | raster, centres by falling a, the rest | raster; positions are kept |
| merged | in front of the projector | behind it, where the prompt stage stands |
| no CLS | – | `attention="received"`: what a token receives, mean over heads and rows |
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..core.budgets import Keep
from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.errors import PruneZooError
from ..core.gates import topk_mask
from ..core.outliers import local_outliers
from ..core.plan import gather_rows, mask_to_index
from ..core.registry import register_pruner
from ._question import mean_word

ATTENTION = {"cls": "cls_joint_attention", "received": "received_attention"}
BLOCKS = {"next": "@next", "projected": ""}
CHOICES = {
    "relevance": ("words", "clip"),
    "split": ("shares", "outliers"),
    "centres_of": ("rest", "width"),
    "keys": ("own", "shifted"),
    "attention": ATTENTION,
    "block": BLOCKS,
}
NEAR, NEAR_REST = 20, 10
"""Neighbours of a value among all of them, and among those of the rest, when outliers are looked for."""


@dataclass(frozen=True)
class RecoverableConfig(PrunerConfig):
    """Settings of Recoverable Compression."""

    relevance: str = "words"  # "words": to the language model's embeddings; "clip": needs a `text_encoder`
    split: str = "shares"  # tokens of each kind: by the "shares" below, or in proportion to the "outliers" of the image
    text: float = 0.5  # share of the chosen tokens that the text chooses, in [0, 1]
    centres: float = 0.1  # share of the budget for centres of the rest, in [0, 1)
    neighbours: int = 32  # tokens of the rest that are added to a centre, at least 0
    weight: float = 50 * 768**-0.5  # of a cosine to the text against one of keys, when they are ranked
    centres_of: str = "rest"  # what the share of outliers in the rest is a share of: the "rest", or the tower's "width"
    keys: str = "own"  # of the rest: their "own", or "shifted": those that stand at their numbers in the rest
    attention: str = "cls"  # "cls", or "received" for vision towers without CLS
    block: str = "next"  # where attention and keys are from: "next", behind the projected one, or "projected"

    def __post_init__(self) -> None:
        """Check names and ranges."""
        self.check_choices("recoverable", **CHOICES)
        if not 0 <= self.text <= 1:
            raise PruneZooError(f"text={self.text} of recoverable is out of range: it is a share in [0, 1]")
        if not 0 <= self.centres < 1:
            raise PruneZooError(f"centres={self.centres} of recoverable is out of range: it is a share in [0, 1)")
        if self.neighbours < 0:
            raise PruneZooError(f"neighbours={self.neighbours} of recoverable is out of range: at least 0")


@register_pruner("recoverable")
class Recoverable(Pruner):
    """By attention, by text, and the rest folded into centres and one token more."""

    criteria = ("attention", "prompt", "similarity")
    config_class = RecoverableConfig
    config: RecoverableConfig

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a class attribute where it is not configured
        """Attention and keys, and what CLIP says, if it is asked."""
        clip = ("image_features", "text_features") if self.config.relevance == "clip" else ()
        block = BLOCKS[self.config.block]
        return (ATTENTION[self.config.attention] + block, "vision_keys" + block, *clip)

    @property
    def reads_prompt(self) -> bool:
        """The text chooses."""
        return True

    def check_keep(self, keep: Keep) -> None:
        """See the base class: "auto" is what the image says, and no mean can be asked for."""
        super().check_keep(keep)
        if isinstance(keep, str) and keep != "auto":
            raise PruneZooError(f"keep='{keep}': '{self.name}' counts what stands out in each image, give 'auto' alone")

    def choose_budget(self, inputs: PruneInputs, mean: float | None) -> Tensor:
        """``(B,)``: all that stand out, and one token of the rest if it has a centre; at least 1."""
        counts = torch.stack(self._outliers(inputs, self._attention(inputs), self.near_text(inputs)))
        return (counts.sum(0) + (counts[2] > 0)).clamp_min(1).minimum(inputs.valid.sum(1))

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """Choose and merge, in all images at once."""
        valid, attention, near = inputs.valid, self._attention(inputs), self.near_text(inputs)
        whole = keep >= valid.sum(1)
        by_attention, by_text, centred, rested = self._counts(inputs, attention, near, keep)
        looked = topk_mask(attention, valid, by_attention)
        chosen = torch.where(whole[:, None], valid, looked | topk_mask(near, valid & ~looked, by_text))
        rest = valid & ~chosen
        centres = topk_mask(attention, rest, centred * ~whole)
        others = rest & ~centres
        of_rest = topk_mask(attention, others, rested * ~whole)
        taken = chosen | centres | of_rest
        index, filled = mask_to_index(taken, inputs.most_asked)

        weights = self._near_centres(inputs, index, rest, near, attention)
        weights = weights * gather_rows(centres, index)[..., None]
        is_rest = gather_rows(of_rest, index)[..., None]
        weights = torch.where(is_rest, (attention * others)[:, None], weights)
        given = gather_rows(inputs.features, index)
        tokens = inputs.features.float().masked_fill(~valid[..., None], 0)
        merged = given.float().masked_fill(is_rest, 0) + weights @ tokens
        features = torch.where(gather_rows(centres | of_rest, index)[..., None], merged.to(given.dtype), given)

        column = taken.cumsum(1) - 1
        last = (column * of_rest).sum(1, keepdim=True).expand_as(column)
        groups = torch.where(taken, column, torch.where(rest & of_rest.any(1, keepdim=True), last, -1))
        return PruneOutput(index, filled, features, groups=groups)

    def near_text(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)``: how near each token is to the text."""
        if self.config.relevance == "clip":
            images = functional.normalize(inputs.signal("image_features").float(), dim=-1)
            return (images @ inputs.signal("text_features").float()[..., None])[..., 0]
        unit = functional.normalize(inputs.features.float(), dim=-1)
        return (unit @ mean_word(inputs, self.name)[..., None])[..., 0]

    def _attention(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)``, 0 on padding."""
        return inputs.signal(self.needs[0]).float().masked_fill(~inputs.valid, 0)

    def _counts(self, inputs: PruneInputs, attention: Tensor, near: Tensor, keep: Tensor) -> tuple[Tensor, ...]:
        """Tokens by attention, by text, centres, and of the rest, ``(B,)`` long each; ``keep`` together."""
        rested = (keep > 1).long()  # a single token is better one of the picture's than the sum of all
        left = keep - rested
        centred = (left.double() * self.config.centres).long()
        by_text = ((left - centred).double() * self.config.text).long()
        if self.config.split == "outliers":
            own = self._outliers(inputs, attention, near)
            total = own[0] + own[1] + own[2]
            some = total > 0
            rested = torch.where(some, rested * (own[2] > 0), rested)
            left, total = keep - rested, total.clamp_min(1)
            centred = torch.where(some, left * own[2] // total, centred)
            by_text = torch.where(some, left - centred - left * own[0] // total, by_text)
        return left - centred - by_text, by_text, centred, rested

    def _outliers(self, inputs: PruneInputs, attention: Tensor, near: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How many an image has by attention, by text and as centres: ``(B,)`` long each."""
        valid = inputs.valid
        count = valid.sum(1)
        looked = local_outliers(attention, valid, NEAR).sum(1)
        first = topk_mask(attention, valid, looked)
        lowest = near.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
        share = local_outliers(torch.where(first, lowest, near), valid, NEAR).sum(1) / count.clamp_min(1).double()
        read = ((count - looked) * share).long()
        rest = valid & ~first & ~topk_mask(near, valid & ~first, read)
        left = rest.sum(1)
        outliers = local_outliers(attention, rest, NEAR_REST).sum(1)
        if self.config.centres_of == "rest":
            return looked, read, outliers
        width = inputs.signal(self.needs[1]).flatten(2).shape[2]
        return looked, read, (width * (outliers / left.clamp_min(1).double())).long().minimum(left)

    def _near_centres(
        self, inputs: PruneInputs, index: Tensor, rest: Tensor, near: Tensor, attention: Tensor
    ) -> Tensor:
        """``(B, K, N)``: the attention of those of the rest that are nearest to the token at ``index``; else 0."""
        unit = functional.normalize(inputs.signal(self.needs[1]).float().flatten(2), dim=-1)
        if self.config.keys == "shifted":
            unit = gather_rows(unit, (rest.cumsum(1) - 1).clamp_min(0))
        alike = gather_rows(unit, index) @ unit.transpose(1, 2) + self.config.weight * near[:, None]
        slots = torch.arange(rest.shape[1], device=rest.device)
        able = rest[:, None] & (slots != index[..., None])
        order = alike.masked_fill(~able, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        nearest = order[..., : self.config.neighbours]
        weight = (attention[:, None] * able).gather(2, nearest)
        return torch.zeros_like(alike).scatter(2, nearest, weight)
