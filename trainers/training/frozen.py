"""What every training beside a frozen vision-language model shares: the model, validation by hard budgets, optimizer.

Letters: B images (one a sample), S answer slots of the batch, V vocabulary, G groups, R rows measured.
"""

import math
from functools import partial
from typing import Any, ClassVar, Literal

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torchmetrics import Metric
from transformers import AutoModelForImageTextToText
from transformers.modeling_layers import GradientCheckpointingLayer

from prunezoo.core.base_model import BaseModel
from prunezoo.core.config import fit_width
from prunezoo.core.contract import Pruner
from prunezoo.core.errors import PruneZooError
from prunezoo.core.prefill import Prefill
from prunezoo.host import encode, full_forward
from prunezoo.host.run import run_pruned
from trainers.data.modules import GROUPS

from .losses import answer_slots
from .optimizer import adamw_cosine
from .strategies.spread import shard_trained, share_out

FREE_TEXT = 0.1
"""Where the full model writes fewer of the reference answers word for word, being right says little: the answers are
free text, and a pruner is judged by how near its distribution over the vocabulary stays to the full model's."""

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class FrozenModule(L.LightningModule):
    """A frozen model and the pruner that is trained beside it. A subclass adds `training_step`.

    Args:
        vlm: Folder or Hub id of a `transformers` image-text-to-text model. It stays frozen and out of the checkpoints.
        pruner: The pruner to train.
        vlm_dtype: Type that the frozen model is held in: auto (as stored), float32, bfloat16 or float16.
        lr: Peak learning rate.
        warm_up: Share of the steps in which it rises from 0; from there it falls to 0 by a cosine.
        weight_decay: Of the matrices; vectors have none.
        measure: Shares of the tokens that validation keeps, by hard selection; or "auto", "auto:64".
    """

    vlm: Any
    clips: ClassVar[bool] = False  # the images of each sample are one clip to the pruner

    def __init__(
        self,
        vlm: str,
        pruner: Pruner,
        vlm_dtype: Dtype,
        lr: float,
        warm_up: float,
        weight_decay: float,
        measure: tuple[float | str, ...],
    ) -> None:
        super().__init__()
        if not 0.0 <= warm_up < 1.0:
            raise PruneZooError(f"warm_up={warm_up} must lie in [0, 1)")
        # not a submodule: so the frozen model is in no checkpoint, no optimizer and no call of train()
        self.__dict__["vlm"] = load_frozen(vlm, vlm_dtype)
        self.shared_out = self.free_text = False
        model = BaseModel.describe(self.vlm)
        self.pruner = fit_width(pruner, model.width, model.tower_width, Prefill.of(self.vlm.config))
        self.pruner.base_model = model
        self.lr, self.warm_up, self.weight_decay, self.measure = lr, warm_up, weight_decay, measure

    def setup(self, stage: str) -> None:
        """Move the frozen model to where training happens, and lay out the table that validation fills."""
        device = self.trainer.strategy.root_device  # this module itself is moved only later
        if not self.shared_out:
            self.__dict__["shares"], self.shared_out = share_out(self.trainer.strategy, self.vlm), True
        self.groups = self.groups_of(self.trainer.datamodule)  # type: ignore[attr-defined]
        self.table = AnswerTable(len(self.groups), 1 + len(self.measure)).to(device)
        self.total_steps = self.trainer.estimated_stepping_batches
        if stage == "fit" and not math.isfinite(self.total_steps):
            raise PruneZooError("the schedule needs an end: set trainer.max_steps or trainer.max_epochs")

    def groups_of(self, data: Any) -> tuple[str, ...]:
        """The question groups that validation reports apart, of the training's data module."""
        return data.groups

    def configure_model(self) -> None:
        """Share the pruner out, where the strategy leaves that to the module."""
        shard_trained(self.trainer.strategy, self.pruner)

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        """Answer with all tokens and with each budget's tokens, really dropped."""
        names = batch.pop(GROUPS)
        encoded = encode(self.vlm, batch, self.pruner.needs, clips=self.clips)
        full = full_forward(self.vlm, encoded)
        teacher, tokens, sample = answer_slots(full.logits, full.labels)
        groups = torch.tensor([self.groups.index(name) for name in names], device=teacher.device)
        rows = [judge(teacher, teacher, tokens, sample, len(groups))]
        for share in self.measure:
            run = run_pruned(self.vlm, encoded, self.pruner, share)
            if isinstance(share, str):
                self.log(f"val/tokens_{share}", float(run.tokens.mean()), batch_size=len(run.tokens), sync_dist=True)
            logits = answer_slots(run.host.logits, run.host.labels)[0]
            rows.append(judge(logits, teacher, tokens, sample, len(groups)))
        self.table.update(groups, torch.stack(rows, dim=1))

    def on_validation_epoch_end(self) -> None:
        """Log and say what was measured."""
        self.report()

    def report(self) -> dict[str, Tensor]:
        """Log means over groups, retention in percent of the full model, and each group's accuracy; no figure where
        there is nothing to measure, or to take a share of. Say the most important ones, and return all.
        """
        table = self.table.compute()  # (G, R, 3), nan where a group had no item
        self.table.reset()
        accuracy, agreement, kl = table.nanmean(0).unbind(-1)
        values = {"val/full": accuracy[0]}
        labels = [share if isinstance(share, str) else f"{share:.3f}" for share in self.measure]
        for row, label in enumerate(labels, start=1):
            values[f"val/accuracy_{label}"] = accuracy[row]
            values[f"val/agreement_{label}"] = agreement[row]
            values[f"val/kl_{label}"] = kl[row]
            for group, name in enumerate(self.groups):
                if not table[group, row, 0].isnan():
                    values[f"val/{name}_{label}"] = table[group, row, 0]
            if accuracy[0] > 0:
                values[f"val/retention_{label}"] = 100 * accuracy[row] / accuracy[0]
        values["val/score"] = accuracy[1:].mean()
        values["val/kl"] = kl[1:].mean()
        self.free_text = bool(accuracy[0] < FREE_TEXT)
        self.log_dict(values, sync_dist=True)  # equal on all processes already; this says so
        figures = kl[1:] if self.free_text else 100 * accuracy[1:] / accuracy[0]
        unit = "nats" if self.free_text else "%"
        kept = ", ".join(
            f"{figure:.3g} {unit} at {label}" if math.isfinite(figure) else f"no figure at {label}"
            for figure, label in zip(figures.tolist(), labels, strict=True)
        )
        if self.free_text:
            said = f"full model {accuracy[0]:.3f} word for word, so the answers are free text; KL to it {kept}"
        else:
            said = f"accuracy {accuracy[0]:.3f} with all tokens; kept: {kept}"
        self.say(f"{said} of the tokens")
        return values

    def say(self, text: str) -> None:
        """Print a line on this step, from the first process only."""
        rank_zero_info(f"step {self.global_step}: {text}")

    @property
    def best_by(self) -> tuple[str, Literal["max", "min"]]:
        """The figure by which one state is better than another, and whether the most or the least of it is best."""
        return ("val/kl", "min") if self.free_text else ("val/score", "max")

    def evenly(self, mean: Tensor, count: int) -> Tensor:
        """A mean over ``count`` things of this process, such that its mean over processes is that over all things."""
        if self._trainer is None:  # no training, and so no other process
            return mean
        counts = torch.tensor(float(count), device=mean.device)
        return mean * (count / self.trainer.strategy.reduce(counts, reduce_op="mean"))

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and cosine."""
        weights = [p for p in self.pruner.parameters() if p.requires_grad]
        if not weights:
            raise PruneZooError(f"pruner '{self.pruner.name}' has nothing to train")
        return adamw_cosine(weights, self.lr, self.weight_decay, self.warm_up, self.total_steps)


class AnswerTable(Metric):
    """Means of what :func:`judge` says, for each group and row; G x R x 3, nan where a group had no item."""

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


def judge(logits: Tensor, teacher: Tensor, tokens: Tensor, sample: Tensor, samples: int) -> Tensor:
    """Per sample, (B, 3): the answer is exactly right; agrees in every slot with the full model's; KL in nats.

    Args:
        logits: (S, V).
        teacher: (S, V) the full model's.
        tokens: (S,) the reference answer's.
        sample: (S,) the sample of each slot.
        samples: B.
    """
    choice = logits.argmax(-1)
    kl = F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    slots = torch.stack([(choice == tokens).float(), (choice == teacher.argmax(-1)).float(), kl], dim=-1)
    empty = logits.new_zeros(samples, 3)
    index = sample[:, None].expand(-1, 3)
    every = empty.scatter_reduce(0, index, slots, "amin", include_self=False)
    mean = empty.scatter_reduce(0, index, slots, "mean", include_self=False)
    return torch.cat([every[:, :2], mean[:, 2:]], dim=1)


def load_frozen(vlm: str, dtype: str) -> Any:
    """The model in eval mode, nothing of it trainable."""
    try:
        model = AutoModelForImageTextToText.from_pretrained(vlm, dtype=dtype)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PruneZooError(
            f"cannot load a vision-language model from '{vlm}' ({reason}); give a folder or Hub id"
        ) from None
    return model.eval().requires_grad_(False)


def recompute_layers(vlm: Any) -> None:
    """Let every decoder layer keep only what enters it, and compute the rest anew in the backward pass.

    Less memory, at the price of one more forward pass. `transformers` does so only in training mode, which the frozen
    model must not enter; so only the layers themselves are told to train, none of what is in them.
    """
    for part in vlm.modules():
        if isinstance(part, GradientCheckpointingLayer):
            part.training = part.gradient_checkpointing = True
            part._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
