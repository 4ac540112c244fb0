"""Train M3 beside a frozen vision-language model (Matryoshka Multimodal Models, arXiv 2405.17430); or STViT likewise.

The paper averages the cross-entropy of the reference answer over all scales, in every step. Here the model is frozen,
and should answer at every scale as it does with all tokens: the loss is the mean over scales of KL(full model ‖ scale),
and the paper's term besides, if it is given a weight.

Letters: S answer slots of the batch, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from prunezoo.core.errors import PruneZooError
from prunezoo.host import encode, full_forward
from prunezoo.host.run import run_pruned
from prunezoo.learned.m3 import M3
from prunezoo.learned.stvit import STViT
from trainers.data.modules import GROUPS

from .frozen import Dtype, FrozenModule
from .losses import answer_slots, cross_entropy, distillation_kl


class MatryoshkaModule(FrozenModule):
    """Frozen model and M3, or STViT, and one loss over several scales.

    Args:
        vlm: Folder or Hub id of a `transformers` image-text-to-text model. It stays frozen and out of the checkpoints.
        pruner: The M3 to train, with a `lora_rank` its LoRA too; or the STViT.
        vlm_dtype: Type that the frozen model is held in: auto (as stored), float32, bfloat16 or float16.
        scales: Tokens of each image that are trained, each at least 1.
        scales_a_step: How many of them each step draws, all different; None: all, as the paper does.
        kl_weight: Weight of KL(full model ‖ scale) at the answer slots.
        answer_weight: Weight of the cross-entropy on the reference answer.
        lr: Peak learning rate.
        warm_up: Share of the steps in which it rises from 0; from there it falls to 0 by a cosine.
        weight_decay: Of the matrices; vectors have none.
        measure: Shares of the tokens that validation keeps.
    """

    pruner: M3 | STViT

    def __init__(
        self,
        vlm: str,
        pruner: M3 | STViT,
        vlm_dtype: Dtype = "auto",
        scales: tuple[int, ...] = (144, 36, 9, 1),
        scales_a_step: int | None = None,
        kl_weight: float = 1.0,
        answer_weight: float = 0.0,
        lr: float = 1e-3,
        warm_up: float = 0.05,
        weight_decay: float = 0.01,
        measure: tuple[float, ...] = (1 / 4, 1 / 9, 1 / 16, 1 / 36),
    ) -> None:
        if not scales or min(scales) < 1:
            raise PruneZooError(f"scales must be tokens of an image, each at least 1, got {list(scales)}")
        if scales_a_step is not None and not 1 <= scales_a_step <= len(scales):
            raise PruneZooError(f"scales_a_step={scales_a_step} must lie between 1 and the {len(scales)} scales")
        super().__init__(vlm, pruner, vlm_dtype, lr, warm_up, weight_decay, measure)
        self.scales, self.scales_a_step = scales, scales_a_step
        self.kl_weight, self.answer_weight = kl_weight, answer_weight
        if isinstance(pruner, M3) and pruner.lora is not None:
            pruner.lora.fit(self.vlm)

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """Answer with all tokens, then at several scales."""
        batch.pop(GROUPS, None)
        with torch.no_grad():
            encoded = encode(self.vlm, batch, self.pruner.needs)
            full = full_forward(self.vlm, encoded)
            teacher = answer_slots(full.logits, full.labels)[0]  # (S, V)
        losses = []
        for place in torch.randperm(len(self.scales))[: self.scales_a_step].tolist():
            student = run_pruned(self.vlm, encoded, self.pruner, self.scales[place]).host
            logits, tokens, _ = answer_slots(student.logits, student.labels)
            loss = self.kl_weight * distillation_kl(logits, teacher)
            if self.answer_weight:
                loss = loss + self.answer_weight * cross_entropy(logits, tokens)
            loss = self.evenly(loss, len(tokens))
            self.log(f"train/loss_{self.scales[place]}", loss.detach(), batch_size=len(teacher))
            losses.append(loss)
        mean = torch.stack(losses).mean()
        self.log("train/loss", mean.detach(), prog_bar=True, batch_size=len(teacher))
        return mean
