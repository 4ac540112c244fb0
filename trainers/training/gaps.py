"""Train the ranker in front of a vision tower through the real drop: which cells the frozen model misses least.

A tower that was trained on whole pictures loses by every gap, and no map of what is relevant knows how much. So subsets
of cells are drawn, really left out in front of the tower, and made likelier or less likely as the frozen model still
says what it says of the whole picture. Ours; draws, advantage and update are those of :mod:`policy_gradient`.

It starts as `energy`: in the first updates the ranker learns the variance of a cell, which needs no model.

Letters: B samples of one image each, N cells of an image, G subsets drawn for each sample, S answer slots.
"""

from typing import Any

import torch
from torch import Tensor

from prunezoo.core.contract import PruneInputs, PruneOutput
from prunezoo.core.errors import PruneZooError
from prunezoo.core.plan import mask_to_index
from prunezoo.host import Encoded, encode, full_forward, pruned_forward
from prunezoo.host.families import find_family
from prunezoo.host.stages.input import check_input_stage, leave_out, see_pixels, with_host_ids
from prunezoo.learned.patch_classifier import PatchClassifier
from prunezoo.training_free.energy import Energy
from trainers.data.modules import GROUPS

from .frozen import Dtype
from .losses import answer_slots, guide_kl
from .policy_gradient import PolicyModule

PIN = 0.01
"""Weight of what holds the logits in place; every other loss is blind to a shift of them all."""


class GapsModule(PolicyModule):
    """Frozen model, ranker, and the updates.

    Args:
        vlm: Folder or Hub id of a `transformers` image-text-to-text model. It stays frozen and out of the checkpoints.
        pruner: The ranker. Its logits are those of the draws, so `grow=false` is wanted: growing is no ranking.
        vlm_dtype: Type that the frozen model is held in: auto (as stored), float32, bfloat16 or float16.
        start_share: Share in [0, 1) of the updates that learn the variance of a cell.
        auto_share: Share in (0, 1) of the cells that `keep="auto"` keeps in the mean: the logits are held so that about
            as many are above 0.
        draws: G, subsets drawn for each sample, at least 2.
        budgets: Shares of the cells that are kept, ascending; each batch draws one, so that no row is padded.
        curriculum: See PolicyModule.
        answer_weight: Weight of the reward log p(reference answer), mean over its tokens, in nats.
        agreement_weight: Weight of the reward -KL(full model ‖ with gaps), mean over the answer slots, in nats.
        spread_floor: See PolicyModule.
        temperature: Logits are divided by it for the draws: below 1, subsets stay near what is kept in use.
        entropy_weight: Weight of the bonus on the policy's entropy.
        gradient_clip: Largest norm of the gradient.
        lr: Peak learning rate.
        slower: Factor in (0, 1] of the learning rate behind the start: what draws say is mostly noise, and Adam takes
            steps of one size whatever the noise.
        warm_up: Share of the updates in which it rises from 0; from there it falls to 0 by a cosine.
        weight_decay: Of the matrices; vectors have none.
        measure: Shares of the cells that validation keeps, by hard selection.
    """

    pruner: PatchClassifier

    def __init__(
        self,
        vlm: str,
        pruner: PatchClassifier,
        vlm_dtype: Dtype = "auto",
        start_share: float = 0.1,
        auto_share: float = 0.75,
        draws: int = 8,
        budgets: tuple[float, ...] = (1 / 4, 1 / 3, 1 / 2, 3 / 4),
        curriculum: float = 0.0,
        answer_weight: float = 0.0,
        agreement_weight: float = 1.0,
        spread_floor: float = 0.2,
        temperature: float = 0.4,
        entropy_weight: float = 0.0,
        gradient_clip: float = 1.0,
        lr: float = 2e-3,
        slower: float = 0.1,
        warm_up: float = 0.05,
        weight_decay: float = 0.01,
        measure: tuple[float, ...] = (3 / 4, 1 / 2, 1 / 4),
    ) -> None:
        if not 0 <= start_share < 1 or not 0 < auto_share < 1:
            raise PruneZooError(f"start_share={start_share} must lie in [0, 1), auto_share={auto_share} in (0, 1)")
        if pruner.config.grow:
            raise PruneZooError(
                "model.pruner.config.grow must be false here: cells that are kept as neighbours of others "
                "are not ranked"
            )
        if temperature <= 0 or not 0 < slower <= 1:
            raise PruneZooError(f"temperature={temperature} must be above 0, slower={slower} in (0, 1]")
        super().__init__(
            vlm, pruner, None, vlm_dtype, draws, budgets, curriculum, answer_weight, agreement_weight, spread_floor,
            0.0, entropy_weight, gradient_clip=gradient_clip, lr=lr, warm_up=warm_up, weight_decay=weight_decay,
            measure=measure,
        )  # fmt: skip
        check_input_stage(find_family(self.vlm), pruner)
        self.start_share, self.auto_share = start_share, auto_share
        self.temperature, self.slower = temperature, slower

    def training_step(self, batch: dict[str, Any], batch_index: int) -> None:
        """Learn the variance at first; then draw, leave out, read and update."""
        if self.global_step >= self.start_share * self.total_steps:
            for group in self.optimizers().param_groups:  # type: ignore[union-attr]  # which the schedule sets anew
                group["lr"] *= self.slower
            return super().training_step(batch, batch_index)
        batch.pop(GROUPS, None)
        with torch.no_grad():
            inputs = self.pixels(encode(self.vlm, batch, run_tower=False))
        logits = self.pruner.rate(inputs)
        guide = self.started(logits, inputs)
        self.log("train/guide", guide.detach(), prog_bar=True)
        self.update(guide + self.pinned(logits, inputs.valid))
        return None

    @staticmethod
    def started(logits: Tensor, inputs: PruneInputs) -> Tensor:
        """KL(variance ‖ softmax of the logits) in nats: 0 where they are the logarithm of the variance."""
        return guide_kl(logits, Energy().score(inputs), inputs.valid, cut=0.0)

    def loss(self, rollout: Any) -> Tensor:
        """See PolicyModule; and the logits stay where they are."""
        return super().loss(rollout) + self.pinned(self.pruner.rate(rollout.inputs), rollout.inputs.valid)

    def pinned(self, logits: Tensor, valid: Tensor) -> Tensor:
        """How far 0 is from where ``auto_share`` of the logits of an image are above it."""
        cut = logits.masked_fill(~valid, torch.nan).nanquantile(1 - self.auto_share, dim=1)
        return PIN * cut.square().mean()

    def pixels(self, encoded: Encoded) -> PruneInputs:
        """What a pruner of the input stage sees of a batch."""
        return see_pixels(find_family(self.vlm), with_host_ids(encoded), encoded).inputs

    def see(self, batch: dict[str, Any]) -> tuple[Encoded, PruneInputs]:
        """The batch encoded, and its pixels."""
        encoded = encode(self.vlm, batch)
        return encoded, self.pixels(encoded)

    def scores(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)``: the logits of the first pick."""
        return self.pruner.rate(inputs) / self.temperature

    def draw_shares(self, number: int, device: torch.device) -> Tensor:
        """One for all: the plain towers pad pictures to the one that keeps most."""
        return super().draw_shares(1, device).expand(number)

    def reward(self, encoded: Encoded, mask: Tensor) -> Tensor:
        """How well the frozen model answers with a tower that saw only each subset (G, B, N): (G, B), at most 0."""
        teacher = None
        if self.agreement_weight:
            full = full_forward(self.vlm, encoded)
            teacher = answer_slots(full.logits, full.labels)[0]
        seen, rows = with_host_ids(encoded), []
        for subset in mask:
            output = PruneOutput(*mask_to_index(subset))
            out = pruned_forward(self.vlm, leave_out(self.vlm, seen, encoded, output), output)
            rows.append(self.worth(*answer_slots(out.logits, out.labels), teacher, len(subset)))
        return torch.stack(rows)
