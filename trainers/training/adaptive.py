"""Train pruners that act between decoder layers, and that decide how many tokens each image keeps, after ATP-LLaVA
(arXiv 2412.00447): alone, or behind a trained pruner in front of the language model.

As in `distill`, scores first learn what the frozen model finds relevant; then the model reads through the gates of all
stages and should answer as it does with all tokens. New is the budget: a step draws one for its whole batch, whose mean
count it then is. Which image gets more and which less is the pruner's own choice, and is learnt in the second stage.

Letters: B images (one a sample), N image tokens.
"""

import math
from typing import Any

import torch
from torch import Tensor

from prunezoo.core.budgets import budget
from prunezoo.core.contract import PruneOutput, Pruner
from prunezoo.core.errors import PruneZooError
from prunezoo.core.registry import load_pruner
from prunezoo.host import Encoded, encode, encode_needs, run_gated
from prunezoo.host.families import find_family
from trainers.data.modules import GROUPS

from .distill import DistillModule
from .losses import answer_slots, distillation_kl


class AdaptiveModule(DistillModule):
    """The two stages of distillation with layers, thresholds and combinations.

    Args:
        start: For a combination: folders or Hub ids of trained pruners, by method; these parts stay as they are.
        args: See DistillModule.
        kwargs: Likewise; `rank_weight` and `answer_weight` are not used.
    """

    def __init__(self, *args: Any, start: dict[str, str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
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
        low, high = map(math.log, self.keep)
        share = math.exp(low + (high - low) * torch.rand(()).item())
        keep = budget(share, encoded.inputs.valid.sum(1))
        terms: dict[str, Tensor] = {}
        if end_to_end:
            student, outputs = run_gated(self.vlm, encoded, self.pruner, keep)
            logits, _, _ = answer_slots(student.logits, student.labels)
            terms["kl"] = self.kl_weight * distillation_kl(logits, teacher)
        else:
            outputs = self.ask_pruner(encoded, keep)
        if guide is not None:
            scored = [output.scores for output in outputs if output.scores is not None and output.scores.requires_grad]
            losses = [self.guide_loss(scores, guide, scores.isfinite()) for scores in scored]
            terms["guide"] = (self.guide_weight if end_to_end else 1.0) * torch.stack(losses).mean()
        depth = find_family(self.vlm).decoder().depth
        owners = [part for part, _ in self.pruner.parts(keep) for _ in part.stages(depth) or (0,)]
        for part, output in zip(owners, outputs, strict=True):
            for name, term in part.loss_terms(output).items():
                terms[name] = terms.get(name, 0.0) + term
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


def adopt(part: Pruner, trained: Pruner, source: str) -> None:
    """Give a part the weights of a trained pruner, and keep them from training.

    Raises:
        PruneZooError: It is another method, or built otherwise.
    """
    if trained.name != part.name or trained.config != part.config:
        raise PruneZooError(f"start: {source} is no '{part.name}' with {part.config}, as this recipe has it")
    part.load_state_dict(trained.state_dict())
    part.requires_grad_(False)
