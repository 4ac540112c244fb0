"""Train a pruner against a frozen vision-language model by distillation, after CoViPAL (arXiv 2508.17243).

First stage ("guide"): the scores learn what the frozen model itself finds relevant. Second stage ("end to end"; what
could be read of the paper does not describe it, so it is ours): the frozen model reads the image through the pruner's
gates, hard in value and soft in gradient, and should answer as it does with all tokens; the guide stays on.

Letters: B images (one a sample), N image tokens, S answer slots of the batch, V vocabulary, G groups, R rows measured.
"""

import math
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torchmetrics import Metric
from transformers import AutoModelForImageTextToText

from modules.core.contract import Pruner
from modules.core.errors import PruneZooError
from modules.host import Encoded, encode, full_forward, gated_forward, pruned_forward

from .data.modules import GROUPS
from .losses import answer_slots, cross_entropy, distillation_kl, guide_kl, guide_mse, topk_hinge
from .teacher import attention_guide, relevance

GUIDE_LOSSES = {"mse": guide_mse, "kl": guide_kl}


class DistillModule(L.LightningModule):
    """Frozen model, pruner, and the two stages.

    Args:
        vlm: Folder or Hub id of a `transformers` image-text-to-text model. It stays frozen and out of the checkpoints.
        pruner: The pruner to train.
        vlm_dtype: Type that the frozen model is held in: auto (as stored), float32, bfloat16 or float16.
        guide: Whose map the scores learn: the frozen model's gradient `relevance`, or the `attention` of one layer.
        guide_layer: Layer of the attention guide, from 0.
        guide_loss: `mse` (the paper's first stage) or `kl` (scores as logits over the tokens).
        guide_share: Share in [0, 1] of the training that is the first stage.
        guide_weight: Weight of the guide loss in the second stage; in the first it is 1.
        rank_weight: Weight of the ranking hinge on the guide, in both stages.
        kl_weight: Weight of KL(full model ‖ pruned) at the answer slots, second stage.
        answer_weight: Weight of the cross-entropy on the reference answer, second stage.
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
        vlm_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        guide: Literal["relevance", "attention"] = "relevance",
        guide_layer: int = 16,
        guide_loss: Literal["mse", "kl"] = "kl",
        guide_share: float = 0.7,
        guide_weight: float = 1.0,
        rank_weight: float = 0.0,
        kl_weight: float = 1.0,
        answer_weight: float = 0.0,
        temperature: float = 1.0,
        keep: tuple[float, float] = (0.03, 0.35),
        lr: float = 1e-3,
        warm_up: float = 0.05,
        weight_decay: float = 0.01,
        measure: tuple[float, ...] = (1 / 3, 2 / 9, 1 / 9, 1 / 18),
    ) -> None:
        super().__init__()
        if not 0.0 <= guide_share <= 1.0 or not 0.0 <= warm_up < 1.0:
            raise PruneZooError(f"guide_share={guide_share} must lie in [0, 1], warm_up={warm_up} in [0, 1)")
        if not 0.0 < keep[0] <= keep[1] <= 1.0:
            raise PruneZooError(f"keep must be two shares, 0 < least <= most <= 1, got {list(keep)}")
        if temperature <= 0.0:
            raise PruneZooError(f"temperature must be above 0, got {temperature}")
        # not a submodule: so the frozen model is in no checkpoint, no optimizer and no call of train()
        self.__dict__["vlm"] = load_frozen(vlm, vlm_dtype)
        self.pruner = pruner
        self.pruner.gate_temperature = temperature
        self.guide, self.guide_layer, self.guide_loss = guide, guide_layer, GUIDE_LOSSES[guide_loss]
        self.guide_share, self.guide_weight, self.rank_weight = guide_share, guide_weight, rank_weight
        self.kl_weight, self.answer_weight = kl_weight, answer_weight
        self.keep, self.measure = keep, measure
        self.lr, self.warm_up, self.weight_decay = lr, warm_up, weight_decay

    def setup(self, stage: str) -> None:
        """Move the frozen model to where training happens, and lay out the table that validation fills."""
        device = self.trainer.strategy.root_device  # this module itself is moved only later
        self.vlm.to(device)
        self.groups: tuple[str, ...] = self.trainer.datamodule.groups  # type: ignore[attr-defined]
        self.table = AnswerTable(len(self.groups), 1 + len(self.measure)).to(device)
        self.total_steps = self.trainer.estimated_stepping_batches
        if stage == "fit" and not math.isfinite(self.total_steps):
            raise PruneZooError("the schedule needs an end: set trainer.max_steps or trainer.max_epochs")

    @property
    def end_to_end(self) -> bool:
        """Whether the second stage has begun."""
        return self.global_step >= self.guide_share * self.total_steps

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """One step of either stage."""
        batch.pop(GROUPS, None)
        with torch.no_grad():
            encoded = encode(self.vlm, batch, self.pruner.needs)
        end_to_end = self.end_to_end
        guide, teacher = self.ask_teacher(encoded, with_guide=not end_to_end or self.guide_weight > 0)
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
            student = gated_forward(self.vlm, encoded, output.gates)
            logits, tokens, _ = answer_slots(student.logits, student.labels)
            terms["kl"] = self.kl_weight * distillation_kl(logits, teacher)
            if self.answer_weight:
                terms["answer"] = self.answer_weight * cross_entropy(logits, tokens)
        loss = torch.stack(list(terms.values())).sum()
        self.log_dict({f"train/{name}": term.detach() for name, term in terms.items()}, batch_size=len(keep))
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(keep))
        return loss

    def ask_teacher(self, encoded: Encoded, with_guide: bool) -> tuple[Tensor | None, Tensor]:
        """The guide (B, N) if wanted, and the full model's logits (S, V) at the answer slots."""
        if with_guide and self.guide == "relevance":
            return relevance(self.vlm, encoded)
        with torch.no_grad():
            if with_guide:
                return attention_guide(self.vlm, encoded, self.guide_layer)
            full = full_forward(self.vlm, encoded)
            return None, answer_slots(full.logits, full.labels)[0]

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        """Answer with all tokens and with each budget's tokens, really dropped."""
        groups = torch.tensor([self.groups.index(group) for group in batch.pop(GROUPS)], device=self.device)
        encoded = encode(self.vlm, batch, self.pruner.needs)
        full = full_forward(self.vlm, encoded)
        teacher, tokens, sample = answer_slots(full.logits, full.labels)
        rows = [self.judge(teacher, teacher, tokens, sample, len(groups))]
        for share in self.measure:
            short = pruned_forward(self.vlm, encoded, self.pruner(encoded.inputs, share))
            logits = answer_slots(short.logits, short.labels)[0]
            rows.append(self.judge(logits, teacher, tokens, sample, len(groups)))
        self.table.update(groups, torch.stack(rows, dim=1))

    @staticmethod
    def judge(logits: Tensor, teacher: Tensor, tokens: Tensor, sample: Tensor, samples: int) -> Tensor:
        """Per sample, (B, 3): the answer is exactly right; agrees in every slot with the full model's; KL in nats."""
        choice = logits.argmax(-1)
        kl = F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
        slots = torch.stack([(choice == tokens).float(), (choice == teacher.argmax(-1)).float(), kl], dim=-1)
        empty = logits.new_zeros(samples, 3)
        index = sample[:, None].expand(-1, 3)
        every = empty.scatter_reduce(0, index, slots, "amin", include_self=False)
        mean = empty.scatter_reduce(0, index, slots, "mean", include_self=False)
        return torch.cat([every[:, :2], mean[:, 2:]], dim=1)

    def on_validation_epoch_end(self) -> None:
        """Log means over groups, retention in percent of the full model, and each group's accuracy."""
        table = self.table.compute()  # (G, R, 3), nan where a group had no item
        self.table.reset()
        accuracy, agreement, kl = table.nanmean(0).unbind(-1)
        values = {"val/full": accuracy[0]}
        for row, share in enumerate(self.measure, start=1):
            values[f"val/accuracy_{share:.3f}"] = accuracy[row]
            values[f"val/agreement_{share:.3f}"] = agreement[row]
            values[f"val/kl_{share:.3f}"] = kl[row]
            for group, name in enumerate(self.groups):
                values[f"val/{name}_{share:.3f}"] = table[group, row, 0]
            values[f"val/retention_{share:.3f}"] = 100 * accuracy[row] / accuracy[0]
        values["val/score"] = accuracy[1:].mean()
        self.log_dict(values, sync_dist=True)  # equal on all processes already; this says so
        kept = ", ".join(
            f"{100 * right / accuracy[0]:.1f} % at {share:.3f}"
            for right, share in zip(accuracy[1:].tolist(), self.measure, strict=True)
        )
        rank_zero_info(f"step {self.global_step}: full model {accuracy[0]:.3f}, of which {kept} of the tokens")

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and cosine."""
        weights = [p for p in self.pruner.parameters() if p.requires_grad]
        if not weights:
            raise PruneZooError(f"pruner '{self.pruner.name}' has nothing to train")
        groups = [
            {"params": [p for p in weights if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in weights if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=self.lr)

        def factor(step: int) -> float:
            done = min(step / max(self.total_steps, 1), 1.0)
            if done < self.warm_up:
                return (done * self.total_steps + 1) / (self.warm_up * self.total_steps + 1)
            return 0.5 * (1 + math.cos(math.pi * (done - self.warm_up) / (1 - self.warm_up)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class AnswerTable(Metric):
    """Means of what `DistillModule.judge` says, for each group and row; G x R x 3, nan where a group had no item."""

    full_state_update = False

    def __init__(self, groups: int, rows: int) -> None:
        super().__init__()
        self.sums: Tensor
        self.counts: Tensor
        self.add_state("sums", torch.zeros(groups, rows, 3), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(groups), dist_reduce_fx="sum")

    def update(self, groups: Tensor, values: Tensor) -> None:
        """Add the group (B,) and values (B, R, 3) of some samples."""
        self.sums.index_add_(0, groups, values)
        self.counts.index_add_(0, groups, torch.ones_like(groups, dtype=self.counts.dtype))

    def compute(self) -> Tensor:
        """The means, (G, R, 3)."""
        return self.sums / self.counts[:, None, None]


def draw_budgets(available: Tensor, least: float, most: float) -> Tensor:
    """A random number of tokens to keep of each image, (B,) long: shares from least to most, even on a log scale."""
    low, high = math.log(least), math.log(most)
    share = (low + (high - low) * torch.rand(available.shape, device=available.device)).exp()
    return (share * available).round().long().clamp_min(1)


def load_frozen(vlm: str, dtype: str) -> Any:
    """The model in eval mode, nothing of it trainable."""
    try:
        model = AutoModelForImageTextToText.from_pretrained(vlm, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PruneZooError(
            f"cannot load a vision-language model from '{vlm}' ({reason}); give a folder or Hub id"
        ) from None
    return model.eval().requires_grad_(False)
