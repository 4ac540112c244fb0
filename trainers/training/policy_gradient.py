"""Train a policy that keeps tokens by policy gradient: subsets are drawn, really pruned, read by the frozen model, and
made likelier or less likely as its answer was better or worse than that of the other subsets of the same sample.

After the pruning head of TwigVLM++ (arXiv 2503.14075 v3, its code): Plackett-Luce draws, reward by the reference answer
without generating, advantage normalised within the group (GRPO, arXiv 2402.03300), a curriculum of budgets that grows
harder, KL to the warm start. Strictly on-policy by default. Reconstructed where the code left it open: the KL is that
of the first pick, and gradients are those of the mean log-probability per pick, so that large budgets do not drown
small ones.

Letters: B samples of one image each, N image tokens, G subsets drawn for each sample, S answer slots, K picks.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from prunezoo.core.budgets import budget
from prunezoo.core.contract import PruneInputs, Pruner
from prunezoo.core.errors import PruneZooError
from prunezoo.core.subsets import draw_subsets, log_probability, pick_entropy, pick_kl, subset_mask
from prunezoo.host import Encoded, encode, full_forward
from prunezoo.host.group import group_forward
from prunezoo.learned.policy import KeepPolicy
from trainers.data.modules import GROUPS

from .frozen import Dtype, FrozenModule
from .losses import answer_slots, row_means
from .warm_start import start_from

COLLAPSED = 0.1
"""Share of distinct subsets in a group below which the policy counts as collapsed: nothing is left to compare."""
WATCHED = 20
"""Updates in a row over which that is watched."""


@dataclass(frozen=True)
class Rollout:
    """What was drawn for a batch, and how the frozen model liked it."""

    inputs: PruneInputs
    order: Tensor  # (G, B, N)
    drawn: Tensor  # (G, B, N) bool
    log_prob: Tensor  # (G, B) under the policy that drew
    advantage: Tensor  # (G, B)


class PolicyModule(FrozenModule):
    """Frozen model, policy, and its updates.

    Args:
        vlm: Folder or Hub id of a `transformers` image-text-to-text model. It stays frozen and out of the checkpoints.
        pruner: The policy to train.
        warm_start: Folder or Hub id of the distilled PPM, or of the policy, whose weights it starts from; None: from
            scratch, and there is no KL to it.
        vlm_dtype: Type that the frozen model is held in: auto (as stored), float32, bfloat16 or float16.
        draws: G, subsets drawn for each sample, at least 2.
        budgets: Shares of the tokens that are kept, ascending; each sample draws one.
        curriculum: How much the smallest budget is preferred in the end: budget i is drawn in proportion to
            exp(-curriculum * t² * i), where t runs from 0 to 1 over the training. 0: evenly throughout.
        answer_weight: Weight of the reward log p(reference answer), mean over its tokens, in nats.
        agreement_weight: Weight of the reward -KL(full model ‖ pruned), mean over the answer slots, in nats.
        spread_floor: Added to the spread of a group's rewards, in nats, before they are divided by it, so that a sample
            that is answered alike from every subset does not count as much as one where the choice decides.
        kl_weight: Weight of KL(policy ‖ warm start).
        entropy_weight: Weight of the bonus on the policy's entropy.
        passes: Updates on the same draws. 1 is strictly on-policy; more takes the clipped surrogate of PPO.
        clip: Of the surrogate: how far the probability ratio may leave 1.
        gradient_clip: Largest norm of the gradient.
        lr: Peak learning rate.
        warm_up: Share of the updates in which it rises from 0; from there it falls to 0 by a cosine.
        weight_decay: Of the matrices; vectors have none.
        measure: Shares of the tokens that validation keeps, by hard selection.
    """

    pruner: Pruner
    reference: KeepPolicy | None

    def __init__(
        self,
        vlm: str,
        pruner: Pruner,
        warm_start: str | None,
        vlm_dtype: Dtype = "auto",
        draws: int = 16,
        budgets: tuple[float, ...] = (1 / 18, 1 / 12, 1 / 9, 1 / 6),
        curriculum: float = 2.0,
        answer_weight: float = 1.0,
        agreement_weight: float = 0.0,
        spread_floor: float = 0.2,
        kl_weight: float = 0.02,
        entropy_weight: float = 0.0,
        passes: int = 1,
        clip: float = 0.2,
        gradient_clip: float = 1.0,
        lr: float = 1e-4,
        warm_up: float = 0.05,
        weight_decay: float = 0.0,
        measure: tuple[float, ...] = (1 / 9, 1 / 18),
    ) -> None:
        super().__init__(vlm, pruner, vlm_dtype, lr, warm_up, weight_decay, measure)
        if draws < 2 or passes < 1:
            raise PruneZooError(f"draws={draws} must be at least 2 (they are compared), passes={passes} at least 1")
        if not budgets or any(not 0 < share <= 1 for share in budgets) or list(budgets) != sorted(budgets):
            raise PruneZooError(f"budgets must be ascending shares in (0, 1], got {list(budgets)}")
        if answer_weight < 0 or agreement_weight < 0 or answer_weight + agreement_weight == 0:
            raise PruneZooError("a reward is needed: set answer_weight or agreement_weight above 0")
        if spread_floor <= 0:
            raise PruneZooError(f"spread_floor must be above 0, got {spread_floor}: a group may have no spread at all")
        if not 0 < clip < 1:
            raise PruneZooError(f"clip must lie in (0, 1), got {clip}")
        if warm_start is not None:
            if not pruner.scores_tokens:
                raise PruneZooError(f"model.pruner is a '{pruner.name}', which has no scores to draw by: take 'policy'")
            start_from(pruner, warm_start)
        # not a submodule: the warm start is neither trained nor saved
        reference = None if warm_start is None else copy.deepcopy(pruner).eval().requires_grad_(False)
        self.__dict__["reference"] = reference
        self.automatic_optimization = False  # several updates may come of one batch
        self.draws, self.budgets, self.curriculum = draws, budgets, curriculum
        self.answer_weight, self.agreement_weight = answer_weight, agreement_weight
        self.spread_floor, self.kl_weight, self.entropy_weight = spread_floor, kl_weight, entropy_weight
        self.passes, self.clip, self.gradient_clip = passes, clip, gradient_clip
        self.alike = 0  # updates in a row whose subsets were hardly distinct

    def setup(self, stage: str) -> None:
        """Move what is frozen to where training happens."""
        super().setup(stage)
        limit = self.trainer.max_steps  # of updates, while the trainer estimates one of each batch
        self.total_steps = self.total_steps * self.passes if limit == -1 else min(self.total_steps * self.passes, limit)
        if self.reference is not None:
            self.reference.to(self.trainer.strategy.root_device)

    def training_step(self, batch: dict[str, Any], batch_index: int) -> None:
        """Draw, read, and update `passes` times."""
        batch.pop(GROUPS, None)
        rollout = self.roll_out(batch)
        for _ in range(self.passes):
            self.update(self.loss(rollout))

    def update(self, loss: Tensor) -> None:
        """One step of the optimizer and of its schedule."""
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(loss)
        self.clip_gradients(optimizer, self.gradient_clip, "norm")  # type: ignore[arg-type]
        optimizer.step()  # type: ignore[union-attr]
        schedule.step()  # type: ignore[union-attr]

    @torch.no_grad()
    def roll_out(self, batch: dict[str, Any]) -> Rollout:
        """Draw G subsets for each sample, read each, and say how much better than its group it did."""
        encoded, inputs = self.see(batch)
        if not torch.equal(encoded.sample, torch.arange(len(encoded.mask), device=self.device)):
            raise PruneZooError("policy training takes one image a sample: leave the others out of the data")
        keep = budget(self.draw_budgets(inputs.valid.sum(1)), inputs.valid.sum(1))
        scores = self.scores(inputs)
        order, drawn = draw_subsets(scores, inputs.valid, keep, self.draws)
        mask = subset_mask(order, drawn)
        reward = self.reward(encoded, mask)
        spread = reward.std(0, keepdim=True)
        advantage = (reward - reward.mean(0, keepdim=True)) / (spread + self.spread_floor)
        self.watch(reward, spread, mask, scores, inputs.valid)
        return Rollout(inputs, order, drawn, log_probability(scores, inputs.valid, order, drawn), advantage)

    def see(self, batch: dict[str, Any]) -> tuple[Encoded, PruneInputs]:
        """The batch encoded, and what the policy sees of it."""
        encoded = encode(self.vlm, batch, self.pruner.needs)
        return encoded, encoded.inputs

    def scores(self, inputs: PruneInputs) -> Tensor:
        """The logits (B, N) of the first pick."""
        return self.pruner.score(inputs)

    def draw_budgets(self, available: Tensor) -> Tensor:
        """Tokens to keep of each image (B,)."""
        share = self.draw_shares(len(available), available.device)
        return (share * available).round().long().clamp_min(1)

    def draw_shares(self, number: int, device: torch.device) -> Tensor:
        """So many of the budgets, (number,) float64, by the curriculum."""
        done = self.global_step / max(self.total_steps, 1)
        rank = torch.arange(len(self.budgets), device=device)
        chance = torch.exp(-self.curriculum * done**2 * rank)
        shares = torch.tensor(self.budgets, dtype=torch.float64, device=device)
        return shares[torch.multinomial(chance, number, replacement=True)]

    def reward(self, encoded: Encoded, mask: Tensor) -> Tensor:
        """How well the frozen model answers from each subset (G, B, N): (G, B), at most 0."""
        out = group_forward(self.vlm, encoded, mask)
        logits, tokens, sample = answer_slots(out.logits, out.labels)
        teacher = None
        if self.agreement_weight:
            full = full_forward(self.vlm, encoded)
            said, _, owner = answer_slots(full.logits, full.labels)
            # the slots of a sample stand together, and each of its draws has as many
            place = torch.arange(len(owner), device=owner.device)
            repeated = torch.cat([place[owner == b].repeat(self.draws) for b in range(len(encoded.mask))])
            teacher = said[repeated]
        return self.worth(logits, tokens, sample, teacher, len(encoded.mask) * self.draws).view(-1, self.draws).T

    def worth(self, logits: Tensor, tokens: Tensor, sample: Tensor, teacher: Tensor | None, rows: int) -> Tensor:
        """The reward of each row, (rows,), at most 0.

        Args:
            logits: (S, V) at the answer slots.
            tokens: (S,) the reference answers.
            sample: (S,) the row of each slot.
            teacher: (S, V) the full model's; None where agreement with it counts nothing.
            rows: How many there are.
        """
        log_p = logits.log_softmax(-1)
        slots = self.answer_weight * log_p.gather(-1, tokens[:, None])[:, 0]
        if teacher is not None:
            teacher = teacher.log_softmax(-1)
            slots = slots - self.agreement_weight * (teacher.exp() * (teacher - log_p)).sum(-1)
        return row_means(slots, sample, rows)

    def loss(self, rollout: Rollout) -> Tensor:
        """Policy gradient, or its clipped surrogate where draws are used again; KL and entropy."""
        inputs = rollout.inputs
        scores = self.scores(inputs)
        log_prob = log_probability(scores, inputs.valid, rollout.order, rollout.drawn)
        picks = rollout.drawn.sum(-1).clamp_min(1)
        if self.passes == 1:
            gain = rollout.advantage * log_prob / picks
        else:
            ratio = ((log_prob - rollout.log_prob) / picks).exp()
            bounded = ratio.clamp(1 - self.clip, 1 + self.clip)
            gain = torch.minimum(ratio * rollout.advantage, bounded * rollout.advantage)
            self.log("train/clipped", (ratio != bounded).float().mean())
        entropy = pick_entropy(scores, inputs.valid).mean()
        loss = -gain.mean() - self.entropy_weight * entropy
        if self.reference is not None:
            with torch.no_grad():
                reference = self.reference.score(inputs)
            kl = pick_kl(scores, reference, inputs.valid).mean()
            loss = loss + self.kl_weight * kl
            self.log("train/kl_to_warm_start", kl.detach())
        self.log("train/entropy", entropy.detach())
        self.log("train/loss", loss.detach())
        return loss

    def watch(self, reward: Tensor, spread: Tensor, mask: Tensor, scores: Tensor, valid: Tensor) -> None:
        """Log the reward and how unlike the subsets of a group are, and warn when they are hardly so."""
        distinct = distinct_share(mask).mean()
        best = reward.amax(0)
        self.log("train/reward", reward.mean(), prog_bar=True)
        self.log_dict(
            {
                "train/reward_spread": spread.mean(),
                "train/reward_best_of_group": best.mean(),
                "train/distinct_subsets": distinct,
            }
        )
        self.alike = self.alike + 1 if float(distinct) < COLLAPSED else 0
        if self.alike == WATCHED:
            rank_zero_warn(
                f"the policy has collapsed: fewer than {100 * COLLAPSED:.0f} % of the subsets it draws differ, for "
                f"{WATCHED} updates; raise entropy_weight, kl_weight or the pruner's temperature. The best policy so "
                "far is kept."
            )


def distinct_share(mask: Tensor) -> Tensor:
    """Of the subsets (G, B, N) drawn for each sample, what share is distinct, from 0 where all are alike to 1: (B,)."""
    draws = len(mask)
    counts = [len(torch.unique(mask[:, b], dim=0)) for b in range(mask.shape[1])]
    return (torch.tensor(counts, dtype=torch.float32, device=mask.device) - 1) / (draws - 1)
