"""Token correlation: crops of many repeated patches get few tokens, crops of many different ones get many.

Token-level Correlation-guided Compression for Efficient Multimodal Document Understanding, Zhang et al., 2024,
https://arxiv.org/abs/2407.14439. Reconstructed: the repository has no code; the structure is that of its figure and of
reviews, thresholds and blocks are ours.

In an early block of the tower a patch is redundant if its key is like the keys of more than 2 % of its crop, by a
cosine above `similarity`; the density of a crop is the share of those that are not. So many tokens are drawn, with the
probability that CLS attends to them there. Those that stand out of the crop in what CLS attends to in the block whose
output is projected, above Q3 + 1.5 (Q3 - Q1), are taken besides. To each token that stays is added the sum of a x over
the 32 of its crop that go and are nearest by their keys, a what CLS attends to late.

With `keep="auto"` an image keeps as many as its crops say. Another `keep` is dealt out over crops in proportion to
that, outliers first.

| | paper | ours |
|---|---|---|
| early block | not known | the fourth of 24 or as far in; `early` |
| similarity, redundant ones | not known | 0.9, and 0.02 of a crop |
| drawn | at random | by a seed, the same for all pictures of a size; `sample=False` the best |
| merged | by a weighted sum, in front of the projector | sum as PruMerge's, behind it; `merge="mean"`, "none" |
| thumbnail | whole | as a crop |
| no CLS | – | `attention="received"`: what a token receives, mean over heads and rows |
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..core.budgets import Keep
from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.errors import PruneZooError
from ..core.gates import topk_mask
from ..core.merge import kept_groups
from ..core.plan import gather_rows, group_sum, mask_to_index
from ..core.registry import register_pruner
from ..core.select import rank_in_groups
from ..core.signals import TOWER_ATTENTION, parse_signal

MERGES = ("sum", "mean", "none")


@dataclass(frozen=True)
class TokenCorrelationConfig(PrunerConfig):
    """Config of `token_correlation`."""

    early: str | int = "4/24"  # vision block of keys and density: "4/24", the fourth of 24 or as far in; or a number
    similarity: float = 0.9  # cosine of keys above which two patches are alike, in [-1, 1]
    repeats: float = 0.02  # share of its crop that a patch may be like and not be redundant, in [0, 1]
    sample: bool = True  # draw by what CLS attends to; False: take the most attended
    seed: int = 0  # of the draw, at least 0
    merge: str = "sum"  # those that go are added as a "sum"; as a "mean" with the token's own attention; or "none"
    neighbours: int = 32  # tokens that are added to one that stays, at least 0
    attention: str = "cls"  # "cls", or "received" for vision towers without CLS

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check_choices("token_correlation", attention=TOWER_ATTENTION, merge=MERGES)
        try:
            parse_signal(f"vision_keys@{self.early}")
        except PruneZooError:
            raise PruneZooError(
                f"early='{self.early}' of token_correlation is no block: write '4/24', or a number"
            ) from None
        for name, least in (("similarity", -1), ("repeats", 0)):
            if not least <= getattr(self, name) <= 1:
                raise PruneZooError(f"{name}={getattr(self, name)} of token_correlation: must lie in [{least}, 1]")
        for name in ("seed", "neighbours"):
            if getattr(self, name) < 0:
                raise PruneZooError(f"{name}={getattr(self, name)} of token_correlation must be at least 0")


@register_pruner("token_correlation")
class TokenCorrelation(Pruner):
    """Outliers and a draw of each crop, by its density; the others folded into them."""

    criteria = ("similarity", "attention")
    config_class = TokenCorrelationConfig
    config: TokenCorrelationConfig

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a class attribute where it is not configured
        """Attention late and early, and early keys."""
        looked, early = TOWER_ATTENTION[self.config.attention], self.config.early
        return (looked, f"{looked}@{early}", f"vision_keys@{early}")

    def check_keep(self, keep: Keep) -> None:
        """See the base class: "auto" is what the image says, and no mean can be asked for."""
        super().check_keep(keep)
        if isinstance(keep, str) and keep != "auto":
            raise PruneZooError(f"keep='{keep}': '{self.name}' counts what repeats in each image, give 'auto' alone")

    def choose_budget(self, inputs: PruneInputs, mean: float | None) -> Tensor:
        """``(B,)``: the tokens that the crops keep together; at least 1."""
        _, wanted = self._order(inputs)
        return wanted.sum(1).clamp_min(1)

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """Choose and fold, in all images at once."""
        place, wanted = self._order(inputs)
        crop = inputs.cells[..., 0].clamp_min(0)
        # A crop's k-th token bids (k - 1/2) / its wish: the lowest bids are the crops' wishes, or in their proportion.
        bids = (place + 0.5) / wanted.gather(1, crop).clamp_min(0.25)
        chosen = topk_mask(-bids, inputs.valid, keep)
        output = PruneOutput(*mask_to_index(chosen, inputs.most_asked))
        if self.config.merge == "none":
            return output
        groups = kept_groups(output, inputs.valid.shape[1])
        return PruneOutput(output.index, output.valid, self._folded(inputs, output.index, chosen), groups=groups)

    def _order(self, inputs: PruneInputs) -> tuple[Tensor, Tensor]:
        """The place of each token in its crop, ``(B, N)`` long from 0, and what each crop keeps ``(B, M)`` long."""
        valid, crop = inputs.valid, inputs.cells[..., 0].clamp_min(0)
        late, early, keys = (inputs.signal(name).float() for name in self.needs)
        counts = group_sum(valid.long(), crop, inputs.tiles)  # (B, M)
        unit = functional.normalize(keys.flatten(2), dim=-1)
        both = valid[:, None] & valid[..., None] & (crop[:, None] == crop[..., None])
        alike = ((unit @ unit.mT > self.config.similarity) & both).sum(2) - 1  # itself is not counted
        rare = valid & (alike <= self.config.repeats * counts.gather(1, crop))
        drawn = group_sum(rare.long(), crop, inputs.tiles)  # density times tokens

        chance = early.masked_fill(~valid, 0).clamp_min(torch.finfo(torch.float32).tiny).log()
        first = rank_in_groups(chance + self._noise(inputs), crop, valid)
        outliers = self._outliers(late, crop, inputs)
        union = valid & (outliers | (first < drawn.gather(1, crop)))
        best = rank_in_groups(late, crop, valid)
        worth = torch.where(outliers, valid.shape[1] - best, -first).float()  # of an outlier above 0
        return rank_in_groups(worth, crop, valid), group_sum(union.long(), crop, inputs.tiles)

    def _noise(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)``: Gumbel numbers, whose sum with the logarithm of a probability draws by it; 0 without `sample`."""
        noise = np.zeros(inputs.valid.shape, dtype=np.float32)
        if self.config.sample:
            for row, (slots, _) in zip(noise, inputs.host_grids, strict=True):
                drawn = np.random.default_rng(self.config.seed).random(len(slots))
                row[slots] = -np.log(-np.log(drawn.clip(1e-12)))
        return torch.from_numpy(noise).to(inputs.valid.device)

    @staticmethod
    def _outliers(values: Tensor, crop: Tensor, inputs: PruneInputs) -> Tensor:
        """``(B, N)`` bool: above Q3 + 1.5 (Q3 - Q1) of their crop."""
        found = torch.zeros_like(inputs.valid)
        for tile in range(inputs.tiles):
            own = inputs.valid & (crop == tile)
            known = values.masked_fill(~own, torch.nan)
            low, high = known.nanquantile(known.new_tensor([0.25, 0.75]), dim=1, keepdim=True)
            found |= own & (values > high + 1.5 * (high - low))
        return found

    def _folded(self, inputs: PruneInputs, index: Tensor, chosen: Tensor) -> Tensor:
        """``(B, K, D)``: the tokens at ``index (B, K)``, with what is folded into each."""
        late = inputs.signal(self.needs[0]).float().masked_fill(~inputs.valid, 0)
        crop = inputs.cells[..., 0]
        unit = functional.normalize(inputs.signal(self.needs[2]).float().flatten(2), dim=-1)
        able = (inputs.valid & ~chosen)[:, None] & (crop.gather(1, index)[..., None] == crop[:, None])
        alike = (gather_rows(unit, index) @ unit.mT).masked_fill(~able, -torch.inf)
        near = alike.argsort(dim=-1, descending=True, stable=True)[..., : self.config.neighbours]
        weight = torch.zeros_like(alike).scatter(2, near, (late[:, None] * able).gather(2, near))
        given = gather_rows(inputs.features, index)
        folded = weight @ inputs.features.float().masked_fill(~inputs.valid[..., None], 0)
        made = given.float() + folded
        if self.config.merge == "mean":
            own = late.gather(1, index)[..., None]
            made = (own * given.float() + folded) / (own + weight.sum(2, keepdim=True))
        # Where nothing is folded in, or all of it has no weight, the token is as it was.
        return torch.where((weight > 0).any(2, keepdim=True), made.to(given.dtype), given)
