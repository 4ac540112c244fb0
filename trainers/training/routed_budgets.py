"""Train APTP (arXiv 2406.12042) beside a frozen vision-language model: codes of budgets, and the router to them.

A step gives each prompt of the batch a code, by Sinkhorn's balanced assignment, and the frozen model reads the tokens
behind gates: the token of rank r, by the inner pruner's scores, weighs as the gate of the rung that it is on. The codes
learn from KL(full ‖ gated). The router learns from it in the first steps, in which its own gates stand in the place of
the codes', and then that prompts which are alike get gates which are alike:

    KL + ratio_weight |log(R / target)| + contrast_weight BCE(softmax(cos of gates / t), softmax(cos of prompts / t))
       - spread_weight std(R) + top_weight (1 - max R)

with R the shares of the tokens of a batch, and in |log(R / target)| their mean. Weights and temperatures are the
paper's, but for the KL, which is in nats of one answer token.

Letters: B samples of one image each, N image tokens, R rungs, K codes, S answer slots.
"""

from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.nn import functional

from prunezoo.core.errors import PruneZooError
from prunezoo.core.registry import load_pruner
from prunezoo.host import encode, encode_needs, full_forward, gated_forward
from prunezoo.learned.aptp import APTP, falling_gates, nearness, opened
from trainers.data.modules import GROUPS, IDS

from .adaptive import adopt
from .frozen import Dtype, FrozenModule
from .losses import answer_slots, distillation_kl


class RoutedBudgetsModule(FrozenModule):
    """Frozen model, router and codes.

    Args:
        vlm: Folder or Hub id of a `transformers` image-text-to-text model. It stays frozen and out of the checkpoints.
        pruner: The APTP to train.
        inner: Folder or Hub id of the trained pruner whose budget is set, or the name of one without weights; it stays
            as it is.
        vlm_dtype: Type that the frozen model is held in: auto (as stored), float32, bfloat16 or float16.
        target: Share in (0, 1) of the tokens wanted in the mean.
        own: Share in [0, 1] of the steps, at the beginning, with the router's own gates.
        kl_weight: Weight of the KL.
        ratio_weight: Of the mean's distance to the target.
        contrast_weight: Of the contrastive term.
        spread_weight: Of the bonus on the spread of shares.
        top_weight: Of the distance of the largest share to 1.
        contrast_temperature: t, above 0.
        lr: Peak learning rate.
        warm_up: Share of the steps in which it rises from 0; from there it falls to 0 by a cosine.
        weight_decay: Of the matrices; vectors have none.
        measure: Budgets that validation measures: shares, "auto" or "auto:64".
    """

    pruner: APTP

    def __init__(
        self,
        vlm: str,
        pruner: APTP,
        inner: str,
        vlm_dtype: Dtype = "auto",
        target: float = 1 / 9,
        own: float = 0.1,
        kl_weight: float = 1.0,
        ratio_weight: float = 2.0,
        contrast_weight: float = 100.0,
        spread_weight: float = 0.1,
        top_weight: float = 0.1,
        contrast_temperature: float = 0.03,
        lr: float = 2e-4,
        warm_up: float = 0.02,
        weight_decay: float = 0.0,
        measure: tuple[float | str, ...] = ("auto", 1 / 9),
    ) -> None:
        if not 0.0 < target < 1.0 or not 0.0 <= own <= 1.0 or contrast_temperature <= 0:
            raise PruneZooError(
                f"target={target} must lie in (0, 1), own={own} in [0, 1], contrast_temperature="
                f"{contrast_temperature} above 0"
            )
        super().__init__(vlm, pruner, vlm_dtype, lr, warm_up, weight_decay, measure)
        adopt(self.pruner.inner, load_pruner(inner), inner)
        self.target, self.own, self.temperature = target, own, contrast_temperature
        self.weights = {
            "kl": kl_weight,
            "ratio": ratio_weight,
            "contrast": contrast_weight,
            "spread": spread_weight,
            "top": top_weight,
        }

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """One step."""
        batch.pop(GROUPS, None)
        with torch.no_grad():
            encoded = encode(self.vlm, batch, encode_needs(self.pruner))
            full = full_forward(self.vlm, encoded)
            teacher = answer_slots(full.logits, full.labels)[0]
            scores = self.pruner.inner.score(encoded.inputs).float()
        prompts = self.pruner.read(encoded.inputs)
        asked = self.pruner.route(prompts)
        wanted = falling_gates(asked, gumbel_like(asked))
        codes = falling_gates(self.pruner.codes, gumbel_like(self.pruner.codes))
        code = balanced(nearness(wanted, codes).detach()).argmax(1)
        alone = self.global_step < self.own * self.total_steps
        gates = opened(wanted if alone else codes[code])
        shares = self.pruner.shares_of(gates)
        student = gated_forward(self.vlm, encoded, self.token_gates(scores, encoded.inputs.valid, gates))
        logits, tokens, _ = answer_slots(student.logits, student.labels)
        terms = {
            "kl": self.evenly(distillation_kl(logits, teacher), len(tokens)),
            "ratio": (shares.mean() / self.target).log().abs(),
            "contrast": contrast(wanted, prompts, self.temperature),
            "spread": -shares.std(correction=0),
            "top": 1 - shares.max(),
        }
        terms = {name: self.weights[name] * term for name, term in terms.items()}
        loss = torch.stack(list(terms.values())).sum()
        self.log_dict({f"train/{name}": term.detach() for name, term in terms.items()}, batch_size=len(shares))
        self.log("train/share", shares.detach().mean(), prog_bar=True, batch_size=len(shares))
        return loss

    def token_gates(self, scores: Tensor, valid: Tensor, gates: Tensor) -> Tensor:
        """``(B, N)``: to each token the gate ``(B, R)`` of its rung, by its rank among ``scores (B, N)``."""
        order = torch.argsort(scores.masked_fill(~valid, -torch.inf), dim=1, descending=True, stable=True)
        rank = torch.argsort(order, dim=1)
        rungs = torch.tensor(self.pruner.config.rungs, device=scores.device, dtype=torch.double)
        ends = (rungs * valid.sum(1, keepdim=True)).round().clamp_min(1)  # (B, R)
        rung = torch.searchsorted(ends, rank.double(), right=True)  # R for what no rung reaches
        return functional.pad(gates, (0, 1)).gather(1, rung) * valid

    def on_validation_start(self) -> None:
        """Count how often each code is given to validation items."""
        values = []
        for batch in self.trainer.datamodule.val_dataloader():  # type: ignore[attr-defined]
            batch = self.trainer.strategy.batch_to_device(batch, self.device)
            for key in (IDS, GROUPS):
                batch.pop(key, None)
            values.append(self.pruner.values(encode(self.vlm, batch, encode_needs(self.pruner)).inputs))
        self.pruner.calibrate(torch.cat(values))
        said = ", ".join(
            f"{share:.3f} ({given:.0%})"
            for share, given in zip(self.pruner.shares.tolist(), self.pruner.given.tolist(), strict=True)
        )
        rank_zero_info(f"step {self.global_step}: shares of the codes, and how often each is given: {said}")


def gumbel_like(values: Tensor) -> Tensor:
    """Standard Gumbel noise."""
    tiny = torch.finfo(values.dtype).tiny
    return -(-torch.rand_like(values).clamp_min(tiny).log()).clamp_min(tiny).log()


def balanced(near: Tensor, epsilon: float = 0.05, rounds: int = 3) -> Tensor:
    """Sinkhorn's assignment (Cuturi, NeurIPS 2013), as SwAV has it: rows are given out evenly over the columns.

    Args:
        near: ``(B, K)``, higher is nearer.
        epsilon: Above 0; small is nearly hard.
        rounds: How often rows and columns are scaled in turns.

    Returns:
        ``(B, K)``, rows of sum 1.
    """
    plan = ((near - near.max()) / epsilon).exp()
    for _ in range(rounds):
        plan = plan / plan.sum(0, keepdim=True).clamp_min(1e-12) / plan.shape[1]
        plan = plan / plan.sum(1, keepdim=True).clamp_min(1e-12) / plan.shape[0]
    return plan * plan.shape[0]


def contrast(gates: Tensor, prompts: Tensor, temperature: float) -> Tensor:
    """Cross-entropy, element by element, of the likeness of gates to that of prompts; a scalar.

    Args:
        gates: ``(B, R)``.
        prompts: ``(B, E)``, taken as constant.
        temperature: Of both softmaxes over the batch.
    """
    like = (nearness(prompts, prompts) / temperature).softmax(-1).detach()
    ours = (nearness(gates, gates) / temperature).softmax(-1)
    return functional.binary_cross_entropy(ours.clamp(1e-7, 1 - 1e-7), like)
