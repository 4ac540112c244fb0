"""PruMerge: the tokens that CLS attends to, enriched by what is like them, and one token of all the rest.

LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models, Shang et al., ICCV 2025,
https://arxiv.org/abs/2403.15388, code https://github.com/42Shawn/LLaVA-PruMerge.

CLS attends in the block behind the projected one, whose heads are taken as one: a = softmax(q k / sqrt(width)), CLS
itself among what it attends to. The most attended tokens are chosen; PruMerge+ chooses others, spread evenly over the
picture, beside them. To each chosen token is added the sum of a x over its 32 nearest, by the cosine of their keys,
chosen or not, as they were. One more token is the sum of a x over all that are not chosen, at the slot of the most
attended of them. With `keep="auto"` an image keeps as many as have an a above Q3 + 1.5 (Q3 - Q1) of its own.

| | authors' code | paper | ours |
|---|---|---|---|
| tokens, for T | T + 1 | adaptive | T, one of them the rest's; `rest="beside"` as the code, `rest="none"` |
| PruMerge+, T fixed | beside T every (N / T)-th, some twice | – | `spread` of T; `grid="fixed"` as the code |
| PruMerge+, adaptive | 3 T beside T | 3 T beside T | `spread` of T; `grid="adaptive"` as the code |
| order | of falling a, the grid, the rest | – | raster; positions are kept |
| merged | in front of the projector | in front | behind it, where the prompt stage stands |
| block | behind the projected one | last but one | as the code; `block="projected"` where there is none |
| no CLS | – | – | `attention="received"`: what a token receives, mean over heads and rows |
| nearest | 32 | k | 32; `neighbours` |
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ..core.budgets import Keep
from ..core.checks import require
from ..core.choosing import Criterion
from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.errors import PruneZooError
from ..core.gates import topk_mask
from ..core.plan import gather_rows, mask_to_index
from ..core.registry import register_pruner

ATTENTION = {"cls": "cls_joint_attention", "received": "received_attention"}
BLOCKS = {"next": "@next", "projected": ""}
GRIDS = ("none", "even", "fixed", "adaptive")
RESTS = ("within", "beside", "none")
CHOICES = {"attention": ATTENTION, "block": BLOCKS, "grid": GRIDS, "rest": RESTS}


@dataclass(frozen=True)
class PruMergeConfig(PrunerConfig):
    """Settings of PruMerge."""

    grid: str = "none"  # tokens that are chosen for their place: "none", "even"; "fixed", "adaptive" as the code has it
    spread: float = 0.5  # share of the chosen tokens that an even grid has, in [0, 1)
    rest: str = "within"  # the token of all others: "within" the budget, "beside" it as in the code, "none"
    neighbours: int = 32  # tokens that are added to a chosen one, at least 0
    attention: str = "cls"  # "cls", or "received" for vision towers without CLS
    block: str = "next"  # where attention and keys are from: "next", behind the projected one, or "projected"

    def __post_init__(self) -> None:
        """Check names and ranges."""
        self.check_choices("prumerge", **CHOICES)
        if not 0 <= self.spread < 1:
            raise PruneZooError(f"spread={self.spread} of prumerge is out of range: it is a share in [0, 1)")
        if self.neighbours < 0:
            raise PruneZooError(f"neighbours={self.neighbours} of prumerge is out of range: at least 0")


@register_pruner("prumerge")
class PruMerge(Pruner):
    """The most attended tokens, each with its neighbours' share, and one of the rest."""

    criteria: ClassVar[tuple[Criterion, ...]] = ("attention", "similarity")
    config_class = PruMergeConfig
    config: PruMergeConfig

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a class attribute where it is not configured
        """Attention and keys."""
        return tuple(kind + BLOCKS[self.config.block] for kind in (ATTENTION[self.config.attention], "vision_keys"))

    @property
    def exact(self) -> bool:  # type: ignore[override]  # likewise
        """Unless tokens are counted as in the released code."""
        return self.config.rest != "beside" and self.config.grid in ("none", "even")

    def check_keep(self, keep: Keep) -> None:
        """See the base class: "auto" is what the image says, and no mean can be asked for."""
        super().check_keep(keep)
        if isinstance(keep, str) and keep != "auto":
            raise PruneZooError(f"keep='{keep}': '{self.name}' counts what stands out in each image, give 'auto' alone")

    def choose_budget(self, inputs: PruneInputs, mean: float | None) -> Tensor:
        """``(B,)``: the tokens whose attention stands out, and those that come with them; at least 1."""
        attention = self._attention(inputs)
        known = attention.masked_fill(~inputs.valid, torch.nan)
        low, high = known.nanquantile(known.new_tensor([0.25, 0.75]), dim=1, keepdim=True)
        count = ((attention > high + 1.5 * (high - low)) & inputs.valid).sum(1).clamp_min(1)
        if self.config.grid == "even":
            count = (count.double() / (1 - self.config.spread)).round().long()
        return torch.minimum(count + (self.config.rest == "within"), inputs.valid.sum(1))

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """Choose and merge, in all images at once."""
        valid, attention = inputs.valid, self._attention(inputs)
        whole = keep >= valid.sum(1)
        # A single token is better one of the picture's than the sum of all.
        has_rest = ~whole & {"within": keep > 1, "beside": keep > 0, "none": keep < 0}[self.config.rest]
        chosen = keep - (has_rest & (self.config.rest == "within")).long()
        times = torch.where(whole[:, None], valid.long(), self._choose(attention, valid, chosen))
        left = valid & (times == 0)
        of_rest = topk_mask(attention, left, has_rest.long())
        # Each slot as often as it is taken: side by side, since two is the most.
        taken = times + of_rest.long()
        most = inputs.most_asked if self.exact else None
        index, filled = mask_to_index(torch.stack([taken > 0, taken > 1], -1).flatten(1), most)
        index = index // 2

        # For each token chosen twice the released code loses one of those that are not.
        lost = left & (left.cumsum(1) <= (times - 1).clamp_min(0).sum(1, keepdim=True))
        copies = torch.where(left, (~lost).long(), times)
        weights = self._near(inputs, index, copies, attention)
        is_rest = gather_rows(of_rest, index)[..., None]
        weights = torch.where(is_rest, (attention * (left & ~lost))[:, None], weights)
        given = gather_rows(inputs.features, index)
        merged = given.float().masked_fill(is_rest, 0) + weights @ inputs.features.float()
        features = torch.where(whole[:, None, None], given, merged.to(given.dtype))

        column = taken.cumsum(1) - taken
        rest = (column * of_rest).sum(1, keepdim=True)
        groups = torch.where(times > 0, column, torch.where(left & has_rest[:, None], rest, -1))
        return PruneOutput(index, filled, features, scores=attention.masked_fill(~valid, -torch.inf), groups=groups)

    def _attention(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)``, 0 on padding."""
        return inputs.signal(self.needs[0]).float().masked_fill(~inputs.valid, 0)

    def _choose(self, attention: Tensor, valid: Tensor, chosen: Tensor) -> Tensor:
        """``(B, N)`` long: how often each token is chosen, ``chosen (B,)`` in all but for the grids of the code."""
        grid, budget = self.config.grid, chosen[:, None]
        place, count = valid.cumsum(1) - 1, valid.sum(1, keepdim=True)
        if grid in ("fixed", "adaptive"):
            top = topk_mask(attention, valid, chosen)
            step, inner = count // budget.clamp_min(1), valid & (place < count - 1)
            if grid == "fixed":
                first = step // 2
                return top.long() + (inner & (place >= first) & ((place - first) % step.clamp_min(1) == 0)).long()
            step = step // 3
            words = "grid='adaptive' of prumerge takes at most a third of the tokens, as the code: lower `keep`"
            require(((step < 1) & (budget < count)).any(), lambda: words)
            return (top | inner & (place % step.clamp_min(1) == 0)).long()
        spread = (chosen.double() * (self.config.spread if grid == "even" else 0)).round().long()
        top = topk_mask(attention, valid, chosen - spread)
        others = valid & ~top
        # The middles of so many equal stretches of the others.
        place, count = others.cumsum(1), others.sum(1, keepdim=True).clamp_min(1)
        ends = -((count - 2 * spread[:, None] * place) // (2 * count))
        begins = -((count - 2 * spread[:, None] * (place - 1)) // (2 * count))
        return (top | others & (ends > begins)).long()

    def _near(self, inputs: PruneInputs, index: Tensor, copies: Tensor, attention: Tensor) -> Tensor:
        """``(B, K, N)``: the attention of the nearest of each token at ``index``, 0 for others.

        ``copies (B, N)`` says how often each token can be found; the one that asks is found once less.
        """
        unit = functional.normalize(inputs.signal(self.needs[1]).float().flatten(2), dim=-1)
        alike = gather_rows(unit, index) @ unit.transpose(1, 2)
        alike = alike.masked_fill((copies == 0)[:, None], -torch.inf)
        near = alike.argsort(dim=-1, descending=True, stable=True)[..., : self.config.neighbours + 1]
        found = copies[:, None].expand_as(alike).gather(2, near) - (near == index[..., None]).long()
        found = torch.minimum(found, (self.config.neighbours - found.cumsum(2) + found)).clamp_min(0)
        weight = attention[:, None].expand_as(alike).gather(2, near) * found
        return torch.zeros_like(alike).scatter(2, near, weight)


@dataclass(frozen=True)
class PruMergePlusConfig(PruMergeConfig):
    """Settings of PruMerge+."""

    grid: str = "even"  # as of prumerge


@register_pruner("prumerge_plus")
class PruMergePlus(PruMerge):
    """PruMerge with tokens spread over the picture beside the most attended ones."""

    criteria = ("attention", "position", "similarity")
    config_class = PruMergePlusConfig
    config: PruMergePlusConfig
