"""SparseVLM: words that the picture is like rate its tokens at three depths; the best of what goes is merged.

SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference, Zhang et al., ICML 2025,
https://arxiv.org/abs/2410.04417, code https://github.com/Gumpest/SparseVLMs.

The raters are chosen once: words behind the image whose share of the softmax over words of the dot product with the
image's tokens, as both enter the language model, is above the mean. Behind layers 2, 6 and 15 of 32 a token's score is
what the raters attend to it in that layer, mean over heads and raters. The best stay. Of the others the better 30 % are
put into clusters by density peaks, one for each ten and one more, and each cluster stays as its mean.

`version="plus"` (SparseVLM+) divides the attention by what the rotary embedding alone would give at that distance,
counts 14 of 32 heads, those that attend to the image most, and merges nothing. `version="v1.0"` is the first release:
the rank of the raters' attention to the image says how many stay, whatever `keep` is.

`keep` is what the last stage leaves, as of all methods between layers, merged tokens among them. The authors give lists
for 576 tokens: 300, 200, 110 for their "192" and so on. In between the stages leave what lies on the straight line
between two lists, as shares of the image's tokens: `keep` = 110 of 576 is the list above.

| | authors' code | paper | ours |
|---|---|---|---|
| T | names a list; layers read about 206, 146, 82 for 192, 128, 64 | mean over layers | what the last stage leaves |
| merged tokens | come on top of the list (`count=lists`) | – | are among those asked for |
| a stage that has fewer tokens | leaves all but one (`count=lists`) | – | leaves all |
| no word above the mean | fails | – | all words behind the image rate |
| merged tokens stand | behind all that stay (`place=behind`) | there | each at its cluster's centre |
| positions | anew; kept (`version=plus`) | – | kept; anew by `attach(..., positions="compact")` |
| equally dense tokens | noise of 1e-6 tells them apart | – | the one with the higher score is the denser |
| mean of a cluster | sum / (count + 1e-6) | – | sum / count |
| heads (`version=plus`) | 14 | – | 14 / 32 of those there are |
| layers | behind 2, 6, 15 of 32 | the same | the same share of the depth; in front of others (`layers=[3,7,16]`) |
| version | v1.5 (USE_VERSION=1_0), plus (2_0) | v1.0, plus | v1.5 (`version=v1.5`) |
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.budgets import upload
from ..core.clusters import density_peaks
from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.errors import PruneZooError
from ..core.gates import topk_mask
from ..core.merge import group_mean
from ..core.plan import gather_rows, mask_to_index
from ..core.registry import register_pruner

TOKENS = 576  # of the lists
LISTS = {
    "v1.5": ((66, 30, 17), (238, 48, 26), (303, 110, 36), (300, 200, 110)),
    "plus": ((66, 34, 20), (246, 54, 28), (238, 108, 60), (300, 200, 118)),
}
"""What the three stages leave, for "64", "96", "128" and "192"."""
BY_RANK = ((13.5, 0), (9, 6), (0.8, 0))  # v1.0: tokens a rank, and more, by stage
PLACES = (3 / 32, 7 / 32, 16 / 32)  # of the depth, in front of which the stages are
HEADS = 14 / 32
CHOICES = {"version": (*LISTS, "v1.0"), "count": ("exact", "lists"), "place": ("centre", "behind")}


@dataclass(frozen=True)
class SparseVLMConfig(PrunerConfig):
    """Config of `sparsevlm`."""

    version: str = "v1.5"  # "v1.5"; "plus", SparseVLM+; "v1.0", which decides alone how many stay
    layers: tuple[int, ...] | None = None  # in front of which three tokens go; None: 3/32, 7/32, 1/2 of the depth
    count: str = "exact"  # "exact": merged tokens are among those asked for; "lists": they come on top
    place: str = "centre"  # where a merged token stands: at its cluster's "centre"; "behind" all others, centres' order

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check_choices("sparsevlm", **CHOICES)
        if self.layers is not None and (len(self.layers) != 3 or self.layers[0] < 1):
            raise PruneZooError(f"layers={list(self.layers)} of sparsevlm: name three layers, from 1 on")


@register_pruner("sparsevlm")
class SparseVLM(Pruner):
    """Top tokens by the attention of words that match the image, at three depths, with recycling."""

    stage = "layer"
    criteria = ("attention", "similarity")
    config_class = SparseVLMConfig
    config: SparseVLMConfig

    @property
    def exact(self) -> bool:  # type: ignore[override]  # a class attribute where it is not configured
        """Whether `keep` tokens stay."""
        return self.config.count == "exact" and self.config.version != "v1.0"

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a class attribute where it is not configured
        """The words' attention in the layer that has run; by heads for SparseVLM+."""
        plus = ("word_head_attention@previous", "word_rotation@previous")
        return ("word_match", "word_behind", *(plus if self.config.version == "plus" else ("word_attention@previous",)))

    def stages(self, depth: int) -> tuple[int, ...]:
        """The configured layers, or those behind 2, 6 and 15 of 32."""
        if self.config.layers is None and depth < 4:
            raise PruneZooError(f"sparsevlm: a decoder of {depth} layers has no room for three stages: set layers")
        return self.config.layers or tuple(max(round(depth * place), i) for i, place in enumerate(PLACES, 1))

    def schedule(self, keep: Tensor, available: Tensor, depth: int) -> list[Tensor]:
        """On the straight lines between the lists, from nothing at all to all tokens."""
        rows = [(0, 0, 0), *LISTS.get(self.config.version, LISTS["v1.5"]), (TOKENS,) * 3]
        first, second, last = torch.tensor(rows, dtype=torch.double).T.contiguous()
        wanted = keep.double() * TOKENS / available.clamp_min(1)
        right = torch.searchsorted(last, wanted).clamp(1, len(rows) - 1)
        part = (wanted - last[right - 1]) / (last[right] - last[right - 1])
        steps = [row[right - 1].lerp(row[right], part) * available / TOKENS for row in (first, second)]
        return [torch.maximum(step.round().long(), keep) for step in steps] + [keep]

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """Rate, choose and recycle, in all images at once."""
        raters = find_raters(inputs)
        scores = self.rate(inputs, raters)
        plan = self.plan(inputs, raters)
        stay, taken, made = (upload(part, keep.device) for part in zip(*plan, strict=True))
        kept = topk_mask(scores, inputs.valid, stay)
        known = tuple(stays + makes for stays, _, makes in plan)
        most = max(makes for *_, makes in plan)
        if not most:
            return PruneOutput(*mask_to_index(kept, max(known)), known=known)
        width = max(count for _, count, _ in plan)
        centres, cluster = recycle(inputs.features, scores, inputs.valid & ~kept, (taken, width), (made, most))
        numbers = torch.arange(most, device=keep.device)
        stands = kept | torch.zeros_like(kept).scatter(1, centres, numbers < made[:, None])
        index, there = mask_to_index(stands, max(known))
        if self.config.place == "centre":
            own = stands.cumsum(1) - 1
            merged = own.gather(1, centres)
        else:  # slots are the same, and what stands at them is in another order
            own, merged = kept.cumsum(1) - 1, stay[:, None] + numbers
        groups = torch.where(cluster < 0, own.masked_fill(~kept, -1), merged.gather(1, cluster.clamp_min(0)))
        features = group_mean(inputs.features, groups, inputs.valid.float(), index.shape[1])
        return PruneOutput(index, there, features, groups=groups, known=known)

    def rate(self, inputs: PruneInputs, raters: Tensor) -> Tensor:
        """``(B, N)``: what the ``raters (B, T)`` attend to each token, mean over them and over heads."""
        counted = raters[:, None] & inputs.valid[..., None]  # (B, N, T)
        if self.config.version == "plus":
            turned = inputs.signal("word_rotation@previous").float()
            attention = inputs.signal("word_head_attention@previous").float().transpose(2, 3)  # (B, N, H, T)
            by_head = (attention / turned.masked_fill(~counted | (turned == 0), 1)[:, :, None]) * counted[:, :, None]
            by_head = by_head.sum(3)
            heads = by_head.shape[2]
            count = torch.full_like(raters[:, 0], max(1, round(heads * HEADS)), dtype=torch.long)
            best = topk_mask(by_head.sum(1), torch.ones_like(by_head[:, 0], dtype=torch.bool), count)
            total = (by_head * best[:, None]).sum(2) / count[:, None]
        else:
            total = (inputs.signal("word_attention@previous").float() * counted).sum(2)
        return total / raters.sum(1, keepdim=True).clamp_min(1)

    def plan(self, inputs: PruneInputs, raters: Tensor) -> list[tuple[int, int, int]]:
        """Of each image, tokens that stay as they are, tokens that are recycled, and clusters that they make."""
        assert inputs.asked is not None  # `forward` has set it
        asked: Sequence[int] = inputs.asked
        if self.config.version == "v1.0":
            slope, more = BY_RANK[inputs.step]
            asked = [int(rank * slope + more) for rank in self.ranks(inputs, raters)]
        merges = self.config.version != "plus"
        return [share(n, k, self.exact, merges) for n, k in zip(inputs.counts, asked, strict=True)]

    def ranks(self, inputs: PruneInputs, raters: Tensor) -> list[int]:
        """The rank of each image's matrix of what raters attend to its tokens. Reads the device."""
        counted = raters[:, None] & inputs.valid[..., None]
        values = torch.linalg.svdvals(inputs.signal("word_attention@previous").float() * counted)  # (B, min(N, T))
        size = torch.maximum(raters.sum(1), inputs.valid.sum(1))[:, None]
        least = size * torch.finfo(values.dtype).eps * values.amax(1, keepdim=True)
        return (values > least).sum(1).tolist()


def find_raters(inputs: PruneInputs) -> Tensor:
    """``(B, T)`` bool: the words that rate; all behind the image where none is above the mean."""
    assert inputs.text_valid is not None  # the layer stage gives words
    behind = inputs.text_valid & (inputs.signal("word_behind") > 0)
    match = inputs.signal("word_match").float().masked_fill(~behind, 0)
    above = behind & (match > match.sum(1, keepdim=True) / behind.sum(1, keepdim=True).clamp_min(1))
    return torch.where(above.any(1, keepdim=True), above, behind)


def recycle(
    features: Tensor, scores: Tensor, rest: Tensor, taken: tuple[Tensor, int], made: tuple[Tensor, int]
) -> tuple[Tensor, Tensor]:
    """Put the best of what is left over into clusters.

    Args:
        features: ``(B, N, D)``, by which tokens are compared.
        scores: ``(B, N)``.
        rest: ``(B, N)`` bool, what is left over.
        taken: ``(B,)`` long, how many of it each image puts there, and the most.
        made: ``(B,)`` long, clusters, and the most, M.

    Returns:
        The slots of their centres ``(B, M)`` long, different ones, arbitrary beyond ``made``; and the cluster of each
        token ``(B, N)`` long, -1 for none.
    """
    count, width = taken
    order = scores.masked_fill(~rest, -torch.inf).argsort(dim=1, descending=True, stable=True)[:, :width]
    pool = torch.arange(width, device=order.device) < count[:, None]
    peaks, own = density_peaks(gather_rows(features, order), pool, *made)
    none = torch.full_like(rest, -1, dtype=torch.long)
    return order.gather(1, peaks), none.scatter(1, order, own.masked_fill(~pool, -1))


def share(available: int, keep: int, exact: bool, merges: bool) -> tuple[int, int, int]:
    """Of ``available`` tokens: how many stay as they are, are recycled, and how many clusters these make.

    Args:
        available: Tokens of the image.
        keep: Tokens asked for.
        exact: Clusters are among those; else they come on top, and a token goes even where all are asked for.
        merges: Whether any are recycled.
    """
    stay = min(keep, available) if exact else max(1, min(keep, available - 1))
    gone = available - stay
    if not merges or not gone:
        return stay, 0, 0
    clusters = recycled(gone)[1]
    while exact and clusters < (more := recycled(gone + clusters)[1]):  # what makes room for them goes, too
        clusters = more
    clusters = min(clusters, stay - 1) if exact else clusters
    gone += clusters if exact else 0
    return available - gone, recycled(gone)[0] if clusters else 0, clusters


def recycled(gone: int) -> tuple[int, int]:
    """How many of the tokens that go are recycled, and the clusters that they make, as the authors count."""
    taken = int(gone * 0.3) + 1
    return taken, taken // 10 + 1
