"""CATP: pictures of in-context examples and of the question, pruned together: what fits its text, and the question.

CATP: Contextually Adaptive Token Pruning for Efficient and Enhanced Multimodal In-Context Learning, Li et al.,
AAAI 2026, https://arxiv.org/abs/2508.07871. Written from the paper: no code is published.

A picture's own text is what stands behind it up to the next picture. The pictures with the fewest words behind them are
the question's; those before are of examples. Half of what leaves an image leaves in front of the language model: there
stays, greedily, what covers the picture best, by cosines brought to [0, 1], and `own_text` times what is like the mean
of the picture's own text.

The other half leaves in front of two layers. In front of the first, at 3/16 of the depth, tokens of all examples
together are rated by how much more the prompt's last word attends to them than in the layer before, mean over heads,
and `question` times the cosine to the mean state of the question, its pictures among it. In front of the next one those
of the question's pictures are rated by the cosine to the mean state of what is left of the examples.

`keep` is what stays of each image, of the examples in the mean over those of a prompt: some may lose all.

| | paper | ours |
|---|---|---|
| layers | behind 6 for 7B, 10 for 13B, and the next | in front of that at 3/16 of the depth, and the next; `layer` |
| split of what leaves | half for each stage | half of each image in the first; all of the rest in the second |
| no examples | not met | by the cosine to the words behind |
| positions | – | kept |
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..core.budgets import Keep
from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.coverage import cover
from ..core.errors import PruneZooError
from ..core.gates import topk_mask
from ..core.plan import gather_rows, mask_to_index, picks_mask
from ..core.registry import register_pruner

PLACE = 3 / 16  # of the depth


@dataclass(frozen=True)
class CATPConfig(PrunerConfig):
    """Config of `catp`."""

    own_text: float = 0.7  # weight of likeness to the picture's own text against covering the picture, at least 0
    question: float = 0.6  # weight of likeness to the question against attention that grows, at least 0
    layer: int | None = None  # in front of which decoder layer examples are cut, at least 1; None: 3/16 of the depth

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("own_text", "question"):
            if getattr(self, name) < 0:
                raise PruneZooError(f"{name}={getattr(self, name)} of catp is out of range: at least 0")
        if self.layer is not None and self.layer < 1:
            raise PruneZooError(f"layer={self.layer} of catp: there must be a layer before it, at least 1")


class Prompt:
    """Which pictures are of one prompt, and where they stand in its words."""

    def __init__(self, inputs: PruneInputs, pruner: str) -> None:
        """Raise PruneZooError where there is no prompt."""
        if inputs.text is None or inputs.text_valid is None:
            raise PruneZooError(f"pruner '{pruner}' reads the prompt and got none: give text")
        rows = torch.arange(len(inputs.valid), device=inputs.valid.device)
        sample = rows if inputs.sample is None else inputs.sample
        self.same = sample[:, None] == sample  # (B, B)
        self.words = inputs.text_valid  # (B, T)
        self.behind = self.words & (inputs.signal("word_behind") > 0)
        count = self.behind.sum(1)
        fewest = torch.where(self.same, count, count.amax() if len(count) else 0).amin(1)
        self.asks = count == fewest  # (B) pictures of the question
        later = self.same & (count < count[:, None])
        own = self.behind & ~(later.float() @ self.behind.float() > 0)
        for others in (self.behind, self.words):  # where no word is its own
            own = torch.where(own.any(1, keepdim=True), own, others)
        self.own = own  # (B, T)

    def of_samples(self, values: Tensor, chosen: Tensor) -> Tensor:
        """Sums ``(B, ...)`` of ``values (B, ...)`` over the images ``chosen (B,)`` of each one's prompt."""
        return (self.same & chosen).to(values.dtype) @ values


class Cover(Pruner):
    """The first stage: half-way to what is asked for; in front of the language model."""

    name = "catp"
    together = True
    exact = False  # it leaves more than it is asked for
    needs = ("word_behind",)
    config_class = CATPConfig
    config: CATPConfig

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """Greedy coverage of each picture."""
        assert inputs.asked is not None and inputs.text is not None  # `forward` has set it, and `Prompt` checks
        prompt, valid = Prompt(inputs, self.name), inputs.valid
        known = tuple((n + k + 1) // 2 for n, k in zip(inputs.counts, inputs.asked, strict=True))
        most = max(known, default=0)
        unit = functional.normalize(inputs.features.float(), dim=-1).masked_fill(~valid[..., None], 0)
        alike = ((unit @ unit.mT + 1) / 2).masked_fill(~(valid[:, None] & valid[..., None]), 0)
        words = prompt.own.float()
        text = (words[:, None] @ inputs.text.float().masked_fill(~prompt.own[..., None], 0))[:, 0]
        fits = (torch.cosine_similarity(inputs.features.float(), text[:, None], dim=-1) + 1) / 2
        picks = cover(alike, valid, most, lambda gains: gains + self.config.own_text * fits)
        half = (valid.sum(1) + keep + 1) // 2
        return PruneOutput(*mask_to_index(picks_mask(picks, half, valid.shape[1]), most), known=known)


class Context(Pruner):
    """The second stage: examples together, then the question's pictures."""

    name = "catp"
    stage = "layer"
    together = True
    exact = False  # of each example
    needs = ("last_attention", "last_attention@previous", "word_behind")
    config_class = CATPConfig
    config: CATPConfig

    def stages(self, depth: int) -> tuple[int, ...]:
        """The configured layer, or that at 3/16 of the depth, and the next."""
        if self.config.layer is None and depth < 3:
            raise PruneZooError(f"catp: a decoder of {depth} layers has no room for two cuts: set layer")
        layer = self.config.layer or max(round(depth * PLACE), 1)
        return (layer, layer + 1)

    def schedule(self, keep: Tensor, available: Tensor, depth: int) -> list[Tensor]:
        """Each of the two brings its own pictures to ``keep``."""
        return [keep, keep]

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """Those of the examples at first, those of the question at last; the others pass."""
        assert inputs.text is not None  # the layer stage gives words
        prompt, valid = Prompt(inputs, self.name), inputs.valid
        states, words = (part.float() for part in (inputs.features, inputs.text))
        tokens = torch.cat([states.masked_fill(~valid[..., None], 0).sum(1), valid.sum(1, keepdim=True)], 1)
        if inputs.step == 0:
            asked = (prompt.of_samples(prompt.behind.float(), prompt.asks) > 0) & prompt.words
            mean = self._mean(prompt.of_samples(tokens, prompt.asks), words, asked)
            grows = (inputs.signal("last_attention") - inputs.signal("last_attention@previous")).float().clamp_min(0)
            scores = grows + self.config.question * torch.cosine_similarity(states, mean[:, None], dim=-1)
            mask = self._best_of_examples(scores, inputs, prompt, keep)
        else:
            left = prompt.of_samples(tokens, ~prompt.asks)
            alone = left[:, -1:] == 0  # no examples, or nothing left of them
            shown = torch.where(alone, prompt.behind, prompt.words & ~prompt.behind)
            mean = self._mean(left, words, shown)
            scores = torch.cosine_similarity(states, mean[:, None], dim=-1)
            mask = torch.where(prompt.asks[:, None], topk_mask(scores, valid, keep.minimum(valid.sum(1))), valid)
        return PruneOutput(*mask_to_index(mask))

    @staticmethod
    def _mean(tokens: Tensor, words: Tensor, shown: Tensor) -> Tensor:
        """``(B, D)``: of tokens, summed and behind that counted ``(B, D + 1)``, and of ``words`` where ``shown``."""
        total = tokens[:, :-1] + words.masked_fill(~shown[..., None], 0).sum(1)
        return total / (tokens[:, -1:] + shown.sum(1, keepdim=True)).clamp_min(1)

    @staticmethod
    def _best_of_examples(scores: Tensor, inputs: PruneInputs, prompt: Prompt, keep: Tensor) -> Tensor:
        """``(B, N)`` bool: the best of all examples of a prompt, as many as they are to keep together; all others."""
        valid, example = inputs.valid, ~prompt.asks
        rated = scores.masked_fill(~(valid & example[:, None]), -torch.inf).flatten()
        mask = valid.clone()
        for rows in {tuple(row.nonzero()[:, 0].tolist()) for row in prompt.same & example & example[:, None]} - {()}:
            own = torch.tensor(rows, device=valid.device)
            flat = (own[:, None] * valid.shape[1] + torch.arange(valid.shape[1], device=valid.device)).flatten()
            best = topk_mask(rated[flat][None], valid[own].flatten()[None], keep[own].sum()[None])
            mask[own] = best.view(len(rows), -1)
        return mask


@register_pruner("catp")
class CATP(Pruner):
    """Coverage of each picture, then examples by the question, then the question's pictures by the examples."""

    stage = "layer"
    criteria = ("diversity", "prompt", "attention")
    together = True
    exact = False
    config_class = CATPConfig
    config: CATPConfig

    def __init__(self, config: CATPConfig | None = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        self.cover, self.context = Cover(self.config), Context(self.config)

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a class attribute where it is not configured
        """Those of both stages."""
        return tuple(dict.fromkeys((*self.cover.needs, *self.context.needs)))

    @property
    def reads_prompt(self) -> bool:
        """All of it."""
        return True

    def stages(self, depth: int) -> tuple[int, ...]:
        """Those of the second one."""
        return self.context.stages(depth)

    def parts(self, keep: Keep) -> list[tuple[Pruner, Keep]]:
        """Both stages: the first leaves half-way to ``keep``, the second that."""
        self.check_keep(keep)
        return [(self.cover, keep), (self.context, 2 * keep / (1 + keep) if isinstance(keep, float) else keep)]

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """All on the same inputs, as if they stood at one place; in a host each acts at its own."""
        output = self.cover(inputs, keep)
        for step in (0, 1):
            inputs = replace(inputs.after(output), step=step) if step == 0 else replace(inputs, step=step)
            later = self.context(inputs, keep)
            output = PruneOutput(gather_rows(output.index, later.index).masked_fill(~later.valid, 0), later.valid)
            inputs = inputs.after(later)
        return output
