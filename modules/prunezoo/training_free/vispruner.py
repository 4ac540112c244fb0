"""VisPruner: the tokens that CLS attends to, and of the rest what is left when duplicates go, a few at a time.

Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs, Zhang et al., ICCV 2025,
https://arxiv.org/abs/2412.01818, code https://github.com/Theia-4869/VisPruner.

floor(`important` * T) tokens are the most attended to. The others are listed by falling attention. Then, round by
round, each token at an even place of the list is compared with all at odd places, by the cosine of what the vision
tower puts out in front of the projector. Of the even ones the `at_once` most alike to an odd one go, or as many as are
too many; the new list is the even ones that are left, the most alike first, then the odd ones.

A near tie in one round changes all that follow. So cosines are computed in double precision and rounded to 12 digits:
what is equal is equal on every machine, and the list's order decides. Even tokens meet all odd ones, so there is no way
around the cosines of all tokens of an image; they are computed once, and looked up in the rounds.

| | authors' code | paper | ours |
|---|---|---|---|
| important ones | 0.5 of T, where the command says nothing else | – | `important=0.5` |
| duplicates that go in a round | 8 | – | `at_once=8` |
| precision | the model's | – | double, rounded to 12 digits |
| an odd number of others | an error | – | the last even token has none behind it |
| towers without CLS | – | – | `attention="received"`: mean over heads and rows |
| T of a picture in tiles | T for each | – | T for the picture |
| order | raster | – | raster |
| positions | renumbered | – | kept |
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..core.budgets import upload
from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.errors import PruneZooError
from ..core.gates import topk_mask
from ..core.plan import mask_to_index
from ..core.registry import register_pruner
from ..core.signals import TOWER_ATTENTION


@dataclass(frozen=True)
class VisPrunerConfig(PrunerConfig):
    """Settings of VisPruner."""

    important: float = 0.5  # share of the tokens kept that are chosen by attention, in [0, 1]
    attention: str = "cls"  # "cls", or "received" for vision towers without CLS
    at_once: int = 8  # duplicates that go in a round, at least 1

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 <= self.important <= 1:
            raise PruneZooError(f"important={self.important} of vispruner is out of range: it is a share in [0, 1]")
        self.check_choices("vispruner", attention=TOWER_ATTENTION)
        if self.at_once < 1:
            raise PruneZooError(f"at_once={self.at_once} of vispruner is out of range: at least 1")


@register_pruner("vispruner")
class VisPruner(Pruner):
    """Important tokens by attention, the others by taking duplicates away."""

    criteria = ("attention", "diversity")
    config_class = VisPrunerConfig
    config: VisPrunerConfig

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a class attribute where it is not configured
        """Attention and output of the block whose output is projected."""
        return (TOWER_ATTENTION[self.config.attention], "vision_states")

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """Choose in all images at once."""
        attention = inputs.signal(self.needs[0]).double().masked_fill(~inputs.valid, -torch.inf)
        important = (keep.double() * self.config.important).long()
        chosen = topk_mask(attention, inputs.valid, important)
        others = inputs.valid & ~chosen
        listed = attention.masked_fill(~others, -torch.inf).argsort(dim=1, descending=True, stable=True)

        states = inputs.signal("vision_states").double().masked_fill(~inputs.valid[..., None], 0.0)
        unit = functional.normalize(states, dim=-1)
        likeness = (unit @ unit.transpose(1, 2)).round(decimals=12)
        different = self.thin_out(likeness, listed, inputs, keep - important)
        return PruneOutput(*mask_to_index(chosen | different, inputs.most_asked))

    def thin_out(self, likeness: Tensor, listed: Tensor, inputs: PruneInputs, wanted: Tensor) -> Tensor:
        """Take the most alike away, round by round.

        Args:
            likeness: ``(B, N, N)`` cosines.
            listed: ``(B, N)`` long, slots: first those that there is a choice among, in order.
            inputs: The images.
            wanted: ``(B,)`` long, how many stay.

        Returns:
            ``(B, N)`` bool, as many as wanted.
        """
        assert inputs.asked is not None  # `forward` has set it
        shares = [(k, int(k * self.config.important)) for k in inputs.asked]
        # On the host, so that each round is as small as it can be; lists of which nothing stays are empty at once.
        goals = np.array([k - own for k, own in shares])
        lengths = np.array([n - own for n, (_, own) in zip(inputs.counts, shares, strict=True)]) * (goals > 0)
        slots = inputs.valid.shape[1]
        cosines = likeness.flatten(1)
        while (lengths > goals).any():
            gone = np.minimum(np.minimum(lengths - goals, self.config.at_once), (lengths + 1) // 2)
            length, leave = (upload(values.tolist(), listed.device)[:, None] for values in (lengths, gone))
            places = torch.arange(int(lengths.max()), device=listed.device)
            real = places < length
            even, odd = listed[:, : len(places) : 2], listed[:, 1 : len(places) : 2]
            odd = torch.where(real[:, 1::2], odd, odd[:, :1])  # met twice, instead of what is behind a shorter list
            pairs = even[:, :, None] * slots + odd[:, None]
            nearest = cosines.gather(1, pairs.flatten(1)).view(pairs.shape).amax(2)
            nearest = nearest.masked_fill(~real[:, ::2], -torch.inf)
            even = even.gather(1, nearest.argsort(dim=1, descending=True, stable=True))
            stay = (length + 1) // 2 - leave
            source = torch.where(places < stay, places + leave, even.shape[1] + places - stay)
            listed = torch.cat([even, odd], 1).gather(1, source.clamp_max(len(places) - 1))
            lengths = lengths - gone
        real = torch.arange(listed.shape[1], device=listed.device) < wanted[:, None]
        kept = inputs.valid.new_zeros(len(listed), slots + 1)  # the last takes what is too much
        return kept.scatter(1, listed.masked_fill(~real, slots), True)[:, :-1]
