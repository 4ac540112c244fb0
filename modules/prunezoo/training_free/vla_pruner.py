"""VLA-Pruner: what words attend to, and what past actions attended to; the most unlike tokens of both stay.

VLA-Pruner: Temporal-Aware Dual-Level Visual Token Pruning for Efficient Vision-Language-Action Inference, Liu et al.,
2025, https://arxiv.org/abs/2511.16449, code https://github.com/MINT-SJTU/VLA-Pruner.

For models that are called again and again on nearly the same picture, as a robot's policy is. In front of a shallow
layer the `keep` tokens that the prompt attends to most, and the `keep` tokens that the actions of the last steps of the
episode attended to most in a deeper layer, are put together, and the most unlike of them stay, by DivPrune's rule.
While a step runs its own attention in the deeper layer is noted: what was dropped by then was not looked at, and is
neither held against a token nor in its favour. An episode is a stream of `run.memory`: `run.reset()` begins a new one.
Where steps are pruned from the first on, actions can only tell of what the words let through; `first=all` costs full
steps at the beginning of an episode and lets them tell of everything.

| | authors' code | ours |
|---|---|---|
| layers | 3, and behind 15, of 32 | the same shares of the depth, or `layers` |
| weight of a step | 1 for the oldest, `decay`² for the newest | 1 for the newest |
| a token that was dropped then | counts as 0, so it stays dropped | mean over the steps that had it |
| first steps of an episode | nothing is pruned for three (`first=all`) | pruned, in the first by the words alone |
| action tokens | all seven of OpenVLA, mean | the first: the prompt's last row; others are decode steps |
| rows of the words' attention | all of the prompt, or the last | `rows`; all: those of its image and words behind it |
| fewer candidates than `keep` | fewer stay | cannot be: each list has `keep` |
| tokens that are compared | as they enter the language model | the same |

The authors' figures (LIBERO) were not repeated.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.budgets import upload
from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.errors import PruneZooError
from ..core.gates import topk_mask
from ..core.plan import mask_to_index
from ..core.registry import register_pruner
from .divprune import DivPrune

PLACES = (3 / 32, 16 / 32)
"""Of the depth: in front of which tokens go, and what actions attend to has been seen."""
LAST, PROMPT, MAP = "last_attention@previous", "prompt_attention@previous", "layer_attention@previous"
ENTERED = "hidden_states@0"


@dataclass(frozen=True)
class VLAPrunerConfig(PrunerConfig):
    """Config of `vla_pruner`."""

    layers: tuple[int, ...] | None = None  # two: in front of which tokens go, in front of which actions are noted
    steps: int = 3  # of the episode that are held, at least 1
    decay: float = 0.8  # in (0, 1], what a step weighs less than the one behind it
    first: str = "words"  # while fewer steps than that are held: prune by "words" and what is held, or keep "all"
    rows: str = "all"  # whose attention rates tokens: "all" rows of image and words behind it, or the "last" word's

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.layers is not None and len(self.layers) != 2:
            raise PruneZooError(f"layers={list(self.layers)} of vla_pruner: name two layers, ascending, from 1 on")
        if self.steps < 1:
            raise PruneZooError(f"steps={self.steps} of vla_pruner is out of range: at least 1")
        if not 0 < self.decay <= 1:
            raise PruneZooError(f"decay={self.decay} of vla_pruner is out of range: it is in (0, 1]")
        self.check_choices("vla_pruner", rows=("all", "last"), first=("words", "all"))


@register_pruner("vla_pruner")
class VLAPruner(Pruner):
    """Unlike tokens out of those that words attend to and those that past actions attended to."""

    stage = "layer"
    criteria = ("attention", "diversity")
    remembers = True
    config_class = VLAPrunerConfig
    config: VLAPrunerConfig

    @property
    def exact(self) -> bool:  # type: ignore[override]  # a class attribute where it is not configured
        """Whether `keep` tokens stay in each step."""
        return self.config.first == "words"

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a class attribute where it is not configured
        """Attention in the layer that has run, and the tokens as they entered."""
        return (LAST, ENTERED, *((PROMPT, MAP, "word_behind") if self.config.rows == "all" else ()))

    def stages(self, depth: int) -> tuple[int, ...]:
        """The configured layers, or those in front of which 3/32 and 16/32 of the depth have run."""
        if self.config.layers is None and depth < 3:
            raise PruneZooError(f"vla_pruner: a decoder of {depth} layers has no room for two stages: set layers")
        first = max(1, round(depth * PLACES[0]))
        return self.config.layers or (first, max(first + 1, round(depth * PLACES[1])))

    def schedule(self, keep: Tensor, available: Tensor, depth: int) -> list[Tensor]:
        """All goes at the first; the second only looks."""
        return [keep, keep]

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """Choose at the first stage; the second leaves what it finds, unless a schedule asks it for fewer."""
        if inputs.step and not self.exact:
            return PruneOutput(*mask_to_index(inputs.valid, max(inputs.counts)), known=inputs.counts)
        if inputs.step:
            return PruneOutput(*mask_to_index(topk_mask(inputs.signal(LAST), inputs.valid, keep), inputs.most_asked))
        scores = self.by_words(inputs)
        both, counts = topk_mask(scores, inputs.valid, keep), inputs.asked or ()
        if inputs.memory is not None:
            states = [state or {} for state in inputs.memory]
            guide = torch.stack([self.by_actions(*pair) for pair in zip(inputs.cells, states, strict=True)])
            begun = upload(["guide_0" in state for state in states], keep.device).bool()
            both = both | topk_mask(guide, inputs.valid, keep * begun)  # a first step has no list of its own
            if self.config.first == "all":
                last = f"guide_{self.config.steps - 1}"
                own = zip(inputs.counts, counts, states, strict=True)
                counts = tuple(asked if last in state else there for there, asked, state in own)
                whole = upload([last not in state for state in states], keep.device).bool()
                both = both | (inputs.valid & whole[:, None])
        union = replace(inputs, features=inputs.signal(ENTERED), valid=both, known=None, asked=counts)
        output = DivPrune().reduce(union, upload(counts, keep.device))
        return replace(output, scores=scores.masked_fill(~inputs.valid, -torch.inf), known=counts)

    def by_words(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)`` float32: what a token receives in the layer before, from all rows, or from the last one."""
        if self.config.rows == "last":
            return inputs.signal(LAST).float()
        assert inputs.text_valid is not None  # the layer stage gives words
        words = inputs.signal("word_behind").masked_fill(~inputs.text_valid, 0).sum(1, keepdim=True)
        seen = inputs.signal(MAP).float().masked_fill(~inputs.valid[..., None], 0)
        return (words * inputs.signal(PROMPT).float() + seen.sum(1)) / (words + inputs.valid.sum(1, keepdim=True))

    def by_actions(self, cells: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """``(N,)`` float32: what the actions of past steps attended to tokens in ``cells (N, 3)``; 0 if never seen."""
        total = torch.zeros(len(cells), device=cells.device)
        weights = torch.zeros_like(total)
        for age in range(self.config.steps):
            if f"cells_{age}" not in state:
                break
            same = (cells[:, None] == state[f"cells_{age}"]).all(-1) & (cells[:, :1] >= 0)  # (N, n)
            weight = self.config.decay**age * same.any(1)
            total = total + weight * (same * state[f"guide_{age}"]).sum(1)
            weights = weights + weight
        return total / weights.clamp_min(torch.finfo(total.dtype).tiny)

    def remember(self, inputs: PruneInputs, output: PruneOutput) -> Sequence[Mapping[str, Tensor]]:
        """At the second stage, the newest first: ``cells_0 (n, 3)``, -1 on filler, and ``guide_0 (n,)`` of sum 1."""
        before = [state or {} for state in inputs.memory or (None,) * len(inputs.valid)]
        if not inputs.step:
            return before
        seen = inputs.signal(LAST).float().masked_fill(~inputs.valid, 0).detach()
        guide = seen / seen.sum(1, keepdim=True).clamp_min(torch.finfo(seen.dtype).tiny)
        cells = inputs.cells.masked_fill(~inputs.valid[..., None], -1)
        states = []
        for row, state in enumerate(before):
            held = {"cells_0": cells[row], "guide_0": guide[row]}
            for age in range(1, self.config.steps):
                held |= {
                    f"{name}_{age}": state[old] for name in ("cells", "guide") if (old := f"{name}_{age - 1}") in state
                }
            states.append(held)
        return states
