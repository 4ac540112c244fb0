"""Train pruners that decide between decoder layers, and decide how many tokens they keep, after ATP-LLaVA
(arXiv 2412.00447): alone, or behind a trained pruner in front of the language model.

As in `distill` the frozen model reads through gates and should answer as it does with all tokens, after a first stage
in which the scores learn what it finds relevant. New is the budget: a step draws one for its whole batch, and each
stage's mean count over the batch should meet what the stage aims at; which image gets more and which less is the
pruner's own. The paper's two terms, a mean over the pruned layers and a price that grows with depth, are one here.

Letters: B images (one a sample), N image tokens.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modules.core.contract import PruneOutput, Pruner, budget
from modules.core.errors import PruneZooError
from modules.core.registry import load_pruner
from modules.host import Encoded, encode, encode_needs, run_gated
from modules.host.families import find_family

from .data.modules import GROUPS
from .distill import DistillModule
from .losses import answer_slots, distillation_kl


class AdaptiveModule(DistillModule):
    """The stages of distillation with layers, thresholds and combinations.

    Args:
        target_weight: Weight of the relative deviation of each stage's mean token count from what it aims at.
        start: For a combination: folders or Hub ids of trained pruners, by method; these parts stay as they are.
        args: See DistillModule.
        kwargs: Likewise.
    """

    def __init__(
        self, *args: Any, target_weight: float = 0.2, start: dict[str, str] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if target_weight < 0.0:
            raise PruneZooError(f"target_weight must be at least 0, got {target_weight}")
        self.target_weight = target_weight
        parts = {part.name: part for part, _ in self.pruner.parts(1.0)}
        for part in parts.values():
            part.gate_temperature = self.pruner.gate_temperature
        for method, source in (start or {}).items():
            if method not in parts:
                raise PruneZooError(f"start: '{method}' is no part of this pruner; its parts: {', '.join(parts)}")
            adopt(parts[method], load_pruner(source), source)

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """One step of either stage."""
        batch.pop(GROUPS, None)
        with torch.no_grad():
            encoded = encode(self.vlm, batch, encode_needs(self.pruner))
        end_to_end = self.end_to_end
        guide, teacher = self.ask_teacher(encoded, with_guide=not end_to_end or self.guide_weight > 0)
        available = encoded.inputs.valid.sum(1)
        low, high = map(math.log, self.keep)
        share = math.exp(low + (high - low) * torch.rand(()).item())  # one for all: their mean count is what is asked
        keep = budget(share, available)
        terms: dict[str, Tensor] = {}
        if end_to_end:
            student, outputs = run_gated(self.vlm, encoded, self.pruner, keep)
            logits, _, _ = answer_slots(student.logits, student.labels)
            terms["kl"] = self.kl_weight * distillation_kl(logits, teacher)
        else:
            outputs = self.ask_pruner(encoded, keep)
        if guide is not None:
            scored = [out.scores for out in outputs if out.scores is not None and out.scores.requires_grad]
            losses = [self.guide_loss(scores, guide, scores.isfinite()) for scores in scored]
            terms["guide"] = (self.guide_weight if end_to_end else 1.0) * torch.stack(losses).mean()
        aimed = aims(self.pruner, keep, available, find_family(self.vlm).decoder().depth)
        terms["target"] = self.target_weight * deviation(outputs, aimed)
        return self.add_up(terms, len(keep))

    def ask_pruner(self, encoded: Encoded, keep: Tensor) -> list[PruneOutput]:
        """What the pruner says at each of its stages, with gradients to its weights but none through the model.

        The model runs once without gradient, which is far cheaper; then every stage is asked again what it was asked.
        """
        asked: list[tuple[Pruner, tuple[Any, ...], PruneOutput]] = []
        parts = [part for part, _ in self.pruner.parts(keep)]
        handles = [part.register_forward_hook(lambda *call: asked.append(call)) for part in parts]
        try:
            with torch.no_grad():
                run_gated(self.vlm, encoded, self.pruner, keep)
        finally:
            for handle in handles:
                handle.remove()
        learns = {part: any(weight.requires_grad for weight in part.parameters()) for part in parts}
        return [part(*inputs) if learns[part] else output for part, inputs, output in asked]


def aims(pruner: Pruner, keep: Tensor, available: Tensor, depth: int) -> list[Tensor]:
    """What each stage of a pruner, or of its parts, should leave on average: (B,) each, in their order.

    Args:
        pruner: Of the prompt or layer stage, or a combination of both.
        keep: (B,) as it is asked for.
        available: (B,) tokens of each image.
        depth: Number of decoder layers.
    """
    counts: list[Tensor] = []
    for part, asked in pruner.parts(keep):
        asked = budget(asked, available)
        counts += part.schedule(asked, available, depth) if part.stage == "layer" else [asked]
        available = counts[-1]
    return counts


def deviation(outputs: Sequence[PruneOutput], aimed: Sequence[Tensor]) -> Tensor:
    """How far the mean count of each stage is from the mean that it aims at, as a share of it; summed over stages."""
    terms = []
    for output, aim in zip(outputs, aimed, strict=True):
        assert output.gates is not None  # run_gated has refused what gives none
        terms.append((output.gates.sum(1).mean() / aim.float().mean() - 1).abs())
    return torch.stack(terms).sum()


def adopt(part: Pruner, trained: Pruner, source: str) -> None:
    """Give a part the weights of a trained pruner, and keep them from training.

    Raises:
        PruneZooError: It is another method, or built otherwise.
    """
    if trained.name != part.name or trained.config != part.config:
        raise PruneZooError(f"start: {source} is no '{part.name}' with {part.config}, as this recipe has it")
    part.load_state_dict(trained.state_dict())
    part.requires_grad_(False)
