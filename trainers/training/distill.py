"""Train a pruner against a frozen vision-language model by distillation, after CoViPAL (arXiv 2508.17243).

First stage ("guide"): the scores learn what the frozen model itself finds relevant. Second stage ("end to end"; what
could be read of the paper does not describe it, so it is ours): the frozen model reads the image through the pruner's
gates, hard in value and soft in gradient, and should answer as it does with all tokens; the guide stays on.

Letters: B images (one a sample), N image tokens, S answer slots of the batch, V vocabulary.
"""

import math
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from prunezoo.core.contract import Pruner
from prunezoo.core.errors import PruneZooError
from prunezoo.host import Encoded, encode, full_forward, gated_forward
from trainers.data.modules import GROUPS, TEACHER

from .frozen import Dtype, FrozenModule, recompute_layers
from .guide_names import GuideName, find_guide
from .guides import Rows
from .losses import (
    answer_slots,
    cross_entropy,
    distillation_kl,
    guide_kl,
    guide_mse,
    hidden_mse,
    slot_states,
    top_kl,
    topk_hinge,
)
from .warm_start import start_from


class DistillModule(FrozenModule):
    """Frozen model, pruner, and the two stages.

    Args:
        vlm: Folder or Hub id of a `transformers` image-text-to-text model. It stays frozen and out of the checkpoints.
        pruner: The pruner to train.
        vlm_dtype: Type that the frozen model is held in: auto (as stored), float32, bfloat16 or float16.
        warm_start: Folder or Hub id of a trained pruner of the same config whose weights it starts from; None: from
            scratch.
        guide: Whose map the scores learn: the frozen model's gradient `relevance`, the `attention` of one layer,
            `grad_attention` rolled out (dear), `lrp` or `provenance`; see `guide_names.GUIDES`.
        guide_layer: Layer of the attention guide, from 0; or several, of which it is the mean; null: all.
        guide_rows: Whose attention that is: of the words of the `prompt`, or with those of the answer of `all`.
        guide_loss: `mse` (the paper's first stage) or `kl` (scores as logits over the tokens).
        guide_cut: Share in [0, 1) of an image's tokens, those with the least of it, whose guide counts as zero in `kl`.
        guide_share: Share in [0, 1] of the training that is the first stage.
        guide_weight: Weight of the guide loss in the second stage; in the first it is 1.
        rank_weight: Weight of the ranking hinge on the guide, in both stages.
        kl_weight: Weight of KL(full model ‖ pruned) at the answer slots, second stage.
        answer_weight: Weight of the cross-entropy on the reference answer, second stage.
        hidden_weight: Weight of the match of hidden states at the answer slots, second stage.
        recompute: Keep only what enters each layer of the model, and compute the rest anew in the backward pass: less
            memory, more time.
        hidden_layers: Which hidden states that is, 0 for the embeddings, i for those behind decoder layer i.
        temperature: Of the soft gates, in units of the score.
        keep: Shares of the tokens, least and most; each sample's budget is drawn between them, even on a log scale.
        lr: Peak learning rate.
        warm_up: Share of the steps in which it rises from 0; from there it falls to 0 by a cosine.
        weight_decay: Of the matrices; vectors have none.
        measure: Shares of the tokens that validation keeps, by hard selection.
    """

    def __init__(
        self,
        vlm: str,
        pruner: Pruner,
        vlm_dtype: Dtype = "auto",
        warm_start: str | None = None,
        guide: GuideName = "relevance",
        guide_layer: int | tuple[int, ...] | None = 16,
        guide_rows: Rows = "prompt",
        guide_loss: Literal["mse", "kl"] = "kl",
        guide_cut: float = 0.5,
        guide_share: float = 0.7,
        guide_weight: float = 1.0,
        rank_weight: float = 0.0,
        kl_weight: float = 1.0,
        answer_weight: float = 0.0,
        hidden_weight: float = 0.0,
        hidden_layers: tuple[int, ...] = (),
        recompute: bool = False,
        temperature: float = 1.0,
        keep: tuple[float, float] = (0.03, 0.35),
        lr: float = 1e-3,
        warm_up: float = 0.05,
        weight_decay: float = 0.01,
        measure: tuple[float, ...] = (1 / 3, 2 / 9, 1 / 9, 1 / 18),
    ) -> None:
        if not 0.0 <= guide_share <= 1.0:
            raise PruneZooError(f"guide_share={guide_share} must lie in [0, 1]")
        if not 0.0 < keep[0] <= keep[1] <= 1.0:
            raise PruneZooError(f"keep must be two shares, 0 < least <= most <= 1, got {list(keep)}")
        if not 0.0 <= guide_cut < 1.0:
            raise PruneZooError(f"guide_cut={guide_cut} must lie in [0, 1)")
        if hidden_weight > 0 and not hidden_layers:
            raise PruneZooError(f"hidden_weight={hidden_weight} needs model.hidden_layers")
        if temperature <= 0.0:
            raise PruneZooError(f"temperature must be above 0, got {temperature}")
        super().__init__(vlm, pruner, vlm_dtype, lr, warm_up, weight_decay, measure)
        if warm_start is not None:
            start_from(self.pruner, warm_start)
        self.pruner.gate_temperature = temperature
        layers = (guide_layer,) if isinstance(guide_layer, int) else guide_layer
        self.guide = guide
        self.ask_guide = find_guide(guide, **({"layers": layers, "rows": guide_rows} if guide == "attention" else {}))
        self.guide_loss = guide_mse if guide_loss == "mse" else partial(guide_kl, cut=guide_cut)
        self.guide_share, self.guide_weight, self.rank_weight = guide_share, guide_weight, rank_weight
        self.kl_weight, self.answer_weight = kl_weight, answer_weight
        if recompute:
            recompute_layers(self.vlm)
        self.hidden_weight, self.hidden_layers = hidden_weight, tuple(hidden_layers) if hidden_weight > 0 else ()
        self.keep = keep

    def setup(self, stage: str) -> None:
        """See FrozenModule; and a cache of the model's answers must hold the hidden states that are matched."""
        cached = getattr(self.trainer.datamodule, "hidden_layers", None)  # type: ignore[attr-defined]
        if cached is not None and self.hidden_layers and tuple(cached) != self.hidden_layers:
            raise PruneZooError(
                f"model.hidden_layers={list(self.hidden_layers)} and data.hidden_layers={list(cached)} must be the same"
            )
        super().setup(stage)

    @property
    def end_to_end(self) -> bool:
        """Whether the second stage has begun."""
        return self.global_step >= self.guide_share * self.total_steps

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """One step of either stage."""
        batch.pop(GROUPS, None)
        teacher: dict[str, Tensor] | None = batch.pop(TEACHER, None)
        with torch.no_grad():
            encoded = encode(self.vlm, batch, self.pruner.needs)
        end_to_end, guide = self.end_to_end, None
        if not end_to_end or self.guide_weight > 0:
            guide, said = self.ask_teacher(encoded, with_guide=True)
            if teacher is None and not self.hidden_layers:
                teacher = {"logits": said}
        if end_to_end and teacher is None:
            teacher = self.ask_answers(encoded)
        valid = encoded.inputs.valid
        keep = draw_budgets(valid.sum(1), *self.keep)
        output = self.pruner(encoded.inputs, keep)
        terms: dict[str, Tensor] = dict(self.pruner.loss_terms(output))
        if guide is not None:
            if output.scores is None:
                raise PruneZooError(
                    f"pruner '{self.pruner.name}' gives no scores: set guide_share=0 and guide_weight=0"
                )
            weight = self.guide_weight if end_to_end else 1.0
            terms["guide"] = weight * self.guide_loss(output.scores, guide, valid)
            if self.rank_weight:
                terms["rank"] = self.rank_weight * topk_hinge(output.scores, guide, valid, keep)
        if end_to_end:
            assert teacher is not None
            student = gated_forward(self.vlm, encoded, output.gates, output_hidden_states=bool(self.hidden_layers))
            logits, tokens, _ = answer_slots(student.logits, student.labels)
            if "logits" in teacher:
                kl = distillation_kl(logits, teacher["logits"])
            else:
                kl = top_kl(logits, teacher["top"], teacher["log_prob"], teacher["tail"])
            terms["kl"] = self.kl_weight * self.evenly(kl, len(tokens))
            if self.hidden_layers:
                match = hidden_mse(slot_states(student, self.hidden_layers), teacher["hidden"])
                terms["hidden"] = self.hidden_weight * self.evenly(match, len(tokens))
            if self.answer_weight:
                terms["answer"] = self.answer_weight * self.evenly(cross_entropy(logits, tokens), len(tokens))
        return self.add_up(terms, len(keep))

    def add_up(self, terms: dict[str, Tensor], samples: int) -> Tensor:
        """The sum of the losses, logged one by one."""
        loss = torch.stack(list(terms.values())).sum()
        self.log_dict({f"train/{name}": term.detach() for name, term in terms.items()}, batch_size=samples)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=samples)
        return loss

    def ask_teacher(self, encoded: Encoded, with_guide: bool) -> tuple[Tensor | None, Tensor]:
        """The guide (B, N) if wanted, and the full model's logits (S, V) at the answer slots."""
        return self.ask_guide(self.vlm, encoded) if with_guide else (None, self.ask_answers(encoded)["logits"])

    @torch.no_grad()
    def ask_answers(self, encoded: Encoded) -> dict[str, Tensor]:
        """The full model's logits (S, V) and hidden states (S, H, D) at the answer slots."""
        full = full_forward(self.vlm, encoded, output_hidden_states=bool(self.hidden_layers))
        return {"logits": answer_slots(full.logits, full.labels)[0], "hidden": slot_states(full, self.hidden_layers)}


def draw_budgets(available: Tensor, least: float, most: float) -> Tensor:
    """A random number of tokens to keep of each image, (B,) long: shares from least to most, even on a log scale."""
    low, high = math.log(least), math.log(most)
    share = (low + (high - low) * torch.rand(available.shape, device=available.device)).exp()
    return (share * available).round().long().clamp_min(1)
