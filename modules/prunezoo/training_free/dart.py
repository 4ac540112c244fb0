"""DART: keep a few pivots, and the image tokens that are least like them: what is alike stands for the same.

Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More, Wen et al., EMNLP 2025,
https://arxiv.org/abs/2502.11494, code https://github.com/ZichenWen1/DART.

Between two early layers of the language model the pivots are the image tokens, and the words, whose keys have the
largest L1 norm. Each pivot in turn takes those of the image tokens still free whose states, behind the last norm of the
model, have the lowest cosine with its own. The pivots of the image stay, too; the words only choose.

| | authors' code | paper | ours |
|---|---|---|---|
| count | image pivots + pivots x floor(T / pivots): 68 for 64 (`count=floor`) | T | T: each takes ceil(rest / pivots) |
| order of pivots | that of a CPython set of their numbers (`order=set`) | – | by norm, image then words |
| words that may be pivots | those behind the image | all | those behind the image; any (`words=all`, as AngelSlim) |
| fewer words than pivots | fails | – | the pivots that are there take more |
| T below the number of image pivots | not met | – | T pivots |
| layer | 2 of 32 | 2 of 32 | 2 of 32, at other depths the same share; another (`layer=2`) |
| positions | kept | – | kept |
| images of a batch | one | – | any, each for itself |
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.errors import PruneZooError
from ..core.gates import topk_mask
from ..core.plan import gather_rows, mask_to_index
from ..core.registry import register_pruner

CHOICES = {"count": ("exact", "floor"), "order": ("norm", "set"), "words": ("behind", "all")}


@dataclass(frozen=True)
class DartConfig(PrunerConfig):
    """Config of `dart`."""

    layer: int | None = None  # in front of which decoder layer tokens go, at least 1; None: 1/16 of the depth
    image_pivots: int = 4  # image tokens that choose and stay, at least 1
    text_pivots: int = 4  # words that choose, at least 0
    count: str = (
        "exact"  # "exact": `keep` tokens; "floor": image pivots, and floor(keep / pivots) that each pivot takes
    )
    order: str = "norm"  # in which pivots choose: "norm", image tokens first; "set", as CPython's sets of numbers run
    words: str = "behind"  # that may be pivots: those "behind" the image, or "all" of the prompt

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.layer is not None and self.layer < 1:
            raise PruneZooError(f"layer={self.layer} of dart: there must be a layer before it, at least 1")
        for name, least in (("image_pivots", 1), ("text_pivots", 0)):
            if getattr(self, name) < least:
                raise PruneZooError(f"{name}={getattr(self, name)} of dart must be at least {least}")
        self.check_choices("dart", **CHOICES)


@register_pruner("dart")
class Dart(Pruner):
    """Pivots by the norm of keys, and what is least like each of them."""

    stage = "layer"
    criteria = ("diversity",)
    needs = (
        "layer_keys@previous",
        "normed_states",
        "word_layer_keys@previous",
        "word_normed_states",
        "word_behind",
    )
    config_class = DartConfig
    config: DartConfig

    @property
    def exact(self) -> bool:  # type: ignore[override]  # a class attribute where it is not configured
        """Whether `keep` tokens stay."""
        return self.config.count == "exact"

    def stages(self, depth: int) -> tuple[int, ...]:
        """The configured layer, or that at 1/16 of the depth."""
        return (self.config.layer or max(1, round(depth / 16)),)

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """Choose, in all images at once: one step for each pivot."""
        c, valid, text_valid = self.config, inputs.valid, inputs.text_valid
        assert text_valid is not None  # the layer stage gives words
        behind = text_valid & (inputs.signal("word_behind") > 0)
        most = keep.clamp_max(c.image_pivots) if self.exact else torch.full_like(keep, c.image_pivots)
        tokens, there = largest(inputs.signal("layer_keys@previous"), valid, most, c.image_pivots)
        words, asking = largest(
            inputs.signal("word_layer_keys@previous"),
            behind if c.words == "behind" else text_valid,
            torch.full_like(keep, c.text_pivots),
            c.text_pivots,
        )
        real = torch.cat([there, asking], 1)  # (B, P)
        states = functional.normalize(inputs.signal("normed_states").float(), dim=-1)
        asked = functional.normalize(gather_rows(inputs.signal("word_normed_states"), words).float(), dim=-1)
        pivots = torch.cat([gather_rows(states, tokens), asked], 1)
        if c.order == "set":
            ahead = (text_valid & ~behind).sum(1, keepdim=True)
            numbers = torch.cat([tokens + ahead, words + behind.gather(1, words) * valid.sum(1, keepdim=True)], 1)
            order = set_order(numbers, real)
            pivots, real = gather_rows(pivots, order), real.gather(1, order)

        count = real.sum(1).clamp_min(1)
        chosen = torch.zeros_like(valid).scatter_add(1, tokens, there)
        left = keep - there.sum(1) if self.exact else keep // count * count
        each = -(-left // count)
        alike = pivots @ states.transpose(1, 2)  # (B, P, N)
        for step in range(real.shape[1]):
            free = valid & ~chosen
            takes = each.minimum(left).minimum(free.sum(1)) * real[:, step]
            chosen = chosen | topk_mask(-alike[:, step], free, takes)
            left = left - takes
        index, kept = mask_to_index(chosen, inputs.most_asked if self.exact else None)
        return PruneOutput(index, kept)


def largest(keys: Tensor, valid: Tensor, count: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The tokens or words whose keys have the largest L1 norm, the largest first; of equal ones the first.

    Args:
        keys: ``(B, M, H, d)``.
        valid: ``(B, M)`` bool, which may be taken.
        count: ``(B,)`` long, how many are taken, where there are so many.
        most: The largest of these.

    Returns:
        Their columns ``(B, P)``, P at most ``most``, and which of them are no filler ``(B, P)`` bool.
    """
    norms = keys.float().abs().sum((2, 3)).masked_fill(~valid, -torch.inf)
    order = norms.argsort(dim=1, descending=True, stable=True)[:, :most]
    count = count.minimum(valid.sum(1))
    return order, torch.arange(order.shape[1], device=order.device) < count[:, None]


def set_order(numbers: Tensor, real: Tensor) -> Tensor:
    """The order ``(B, P)`` in which a copy of a CPython set of ``numbers (B, P)``, where ``real``, runs; filler last.

    Reads the device.
    """
    orders = []
    for own, shown in zip(numbers.tolist(), real.tolist(), strict=True):
        pivots = [number for number, is_one in zip(own, shown, strict=True) if is_one]
        run = list(set(pivots).copy())  # a set made from a dict, or of another size, runs otherwise
        orders.append([own.index(number) for number in run] + [at for at, is_one in enumerate(shown) if not is_one])
    return torch.tensor(orders, device=numbers.device)
