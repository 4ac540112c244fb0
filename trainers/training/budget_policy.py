"""Train a policy that sets budgets: a contextual bandit whose arms are all enumerable, so that nothing need be drawn.

What every arm earns on a training item is computed once (`caches/arms.py`). A step asks the policy for its
probabilities at a price per token, and follows the exact gradient of the expected reward less the price of the expected
tokens. The estimators that draw arms are there as well, and agree with it in direction: REINFORCE (Williams, 1992) with
the mean of the sample's other draws as baseline, and GRPO (arXiv 2402.03300). The price is drawn anew for each sample,
so that the policy learns all trade-offs at once, or is one number that a dual ascent moves until the expected tokens
meet a target.

Letters: B samples of one image each, A arms, G draws, I validation items.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from prunezoo.core.errors import PruneZooError
from prunezoo.core.registry import load_pruner
from prunezoo.host import encode, encode_needs
from prunezoo.learned.budget import BudgetPolicy
from trainers.data.modules import EARNED, GROUPS, IDS

from .adaptive import adopt
from .frozen import Dtype, FrozenModule
from .warm_start import start_from

Estimator = Literal["exact", "reinforce", "grpo"]
COLLAPSED = 0.01
"""Nats that the question must say about the arm; below, the policy counts as collapsed: it gives all the same."""
WATCHED = 50
"""Updates in a row over which that is watched."""


class BudgetModule(FrozenModule):
    """Frozen model, budget policy, and its updates.

    Args:
        vlm: Folder or Hub id of a `transformers` image-text-to-text model. It stays frozen and out of the checkpoints.
        pruner: The budget policy to train.
        inner: Folder or Hub id of the trained pruner whose budget is set; it stays as it is.
        reader: Folder or Hub id of a trained PPM, from which the policy's reader starts; None: from scratch.
        vlm_dtype: Type that the frozen model is held in: auto (as stored), float32, bfloat16 or float16.
        estimator: Of the gradient: `exact`, or from draws, `reinforce` or `grpo`.
        draws: G of the latter two, at least 2.
        prices: Least and most price of all the image's tokens, in units of the reward; each sample draws one, even on
            a log scale.
        target: Share of the tokens wanted in the mean; then one price rises or falls until it is met. None: draw it.
        ascent: Step of that, in log-price for each relative deviation from the target.
        value_weight: Weight of the squared error of the arms' values against what they earn.
        entropy_weight: Weight of the bonus on the policy's entropy.
        mean: Share of the tokens that `keep="auto"` shall stand for.
        lr: Peak learning rate.
        warm_up: Share of the updates in which it rises from 0; from there it falls to 0 by a cosine.
        weight_decay: Of the matrices; vectors have none.
        measure: Budgets that validation measures: shares, "auto" or "auto:64".
    """

    pruner: BudgetPolicy

    def __init__(
        self,
        vlm: str,
        pruner: BudgetPolicy,
        inner: str,
        reader: str | None = None,
        vlm_dtype: Dtype = "auto",
        estimator: Estimator = "exact",
        draws: int = 16,
        prices: tuple[float, float] = (0.1, 10.0),
        target: float | None = None,
        ascent: float = 0.02,
        value_weight: float = 1.0,
        entropy_weight: float = 0.0,
        mean: float = 1 / 9,
        lr: float = 1e-3,
        warm_up: float = 0.05,
        weight_decay: float = 0.01,
        measure: tuple[float | str, ...] = ("auto", 1 / 9),
    ) -> None:
        super().__init__(vlm, pruner, vlm_dtype, lr, warm_up, weight_decay, measure)
        pruner = self.pruner  # of the model's width
        arms = pruner.config.arms
        if draws < 2:
            raise PruneZooError(f"draws={draws} must be at least 2: they are compared")
        if not 0 < prices[0] <= prices[1]:
            raise PruneZooError(f"prices must be two, 0 < least <= most, got {list(prices)}")
        for name, share in (("mean", mean), ("target", target)):
            if share is not None and not arms[0] < share < arms[-1]:
                raise PruneZooError(
                    f"{name}={share} must lie between the least and the most arm, {arms[0]}, {arms[-1]}"
                )
        adopt(pruner.inner, load_pruner(inner), inner)
        if reader is not None:
            start_from(pruner.reader, reader)
        self.estimator, self.draws, self.prices, self.target = estimator, draws, prices, target
        self.ascent, self.value_weight, self.entropy_weight, self.mean = ascent, value_weight, entropy_weight, mean
        self.log_price: Tensor
        self.register_buffer("log_price", torch.tensor((math.log(prices[0]) + math.log(prices[1])) / 2))
        self.alike = 0  # updates in a row in which all samples were given the same

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """One update."""
        batch.pop(GROUPS, None)
        earned = batch.pop(EARNED)  # (B, A)
        with torch.no_grad():
            encoded = encode(self.vlm, batch, self.pruner.needs)
        if len(encoded.sample) != len(earned):
            raise PruneZooError("training a budget policy takes one image a sample: leave the others out of the data")
        values = self.pruner.values(encoded.inputs)
        price = self.draw_prices(earned)
        logits = self.pruner.logits(values, price)
        gain = earned - price[:, None] * self.pruner.shares
        terms = {"policy": policy_loss(logits, gain, self.estimator, self.draws)}
        if self.value_weight:
            terms["value"] = self.value_weight * F.mse_loss(values, earned)
        if self.entropy_weight:
            terms["entropy_bonus"] = -self.entropy_weight * entropy(logits).mean()
        self.watch(values.detach(), logits.detach(), earned)
        self.log_dict({f"train/{name}": term.detach() for name, term in terms.items()}, batch_size=len(earned))
        return torch.stack(list(terms.values())).sum()

    def draw_prices(self, earned: Tensor) -> Tensor:
        """A price (B,) for each sample: the one of the dual ascent, or each its own."""
        if self.target is not None:
            return self.log_price.exp().expand(len(earned))
        low, high = map(math.log, self.prices)
        return (low + (high - low) * torch.rand(len(earned), device=earned.device)).exp()

    def watch(self, values: Tensor, logits: Tensor, earned: Tensor) -> None:
        """Log what is expected, move the price, and warn where the question does not matter to the budget."""
        chance = logits.softmax(-1)
        share = (chance * self.pruner.shares).sum(-1).mean()
        if self.target is not None:
            self.log_price += self.ascent * (share - self.target) / self.target
        # at one price for all, so that what differs is the question
        at_one = self.pruner.logits(values, self.log_price.exp().expand(len(values)))
        informed = torch.special.entr(at_one.softmax(-1).mean(0)).sum() - entropy(at_one).mean()
        figures = {
            "train/reward": (chance * earned).sum(-1).mean(),
            "train/reward_of_best_arm": earned.amax(-1).mean(),
            "train/share": share,
            "train/entropy": entropy(logits).mean(),
            "train/information": informed,
            "train/price": self.log_price.exp(),
        }
        self.log_dict(figures, batch_size=len(earned))
        self.alike = self.alike + 1 if float(informed) < COLLAPSED else 0
        if self.alike == WATCHED:
            rank_zero_warn(
                f"the budget policy gives every question the same, for {WATCHED} updates: raise entropy_weight or the "
                "pruner's temperature, or lower lr. The best policy so far is kept."
            )

    def on_validation_start(self) -> None:
        """Find which price leads to which mean, on the validation items, and say who gets how much."""
        values, groups = self.validation_values()
        self.pruner.calibrate(values, self.mean)
        arms = self.pruner.best_arm(values, self.pruner.price_of(self.pruner.default_mean.expand(len(values))))
        shares = F.one_hot(arms, len(self.pruner.shares)).float()
        self.histogram = {
            f"val/{name}_at_{arm:.3f}": shares[groups == group, number].mean()
            for group, name in enumerate(self.groups)
            for number, arm in enumerate(self.pruner.config.arms)
            if bool((groups == group).any())
        }
        mean = self.pruner.shares[arms].mean()
        rank_zero_info(f"step {self.global_step}: auto keeps {mean:.4f} of the tokens where {self.mean:.4f} are wanted")

    def on_validation_epoch_end(self) -> None:
        """See FrozenModule; and the histogram of budgets."""
        super().on_validation_epoch_end()
        self.log_dict(self.histogram, sync_dist=True)  # equal on all processes already; this says so

    def validation_values(self) -> tuple[Tensor, Tensor]:
        """What the policy thinks of every arm on all validation items (I, A), and their groups (I,)."""
        values, groups = [], []
        needs = encode_needs(self.pruner)
        for batch in self.trainer.datamodule.val_dataloader():  # type: ignore[attr-defined]
            batch = self.trainer.strategy.batch_to_device(batch, self.device)
            batch.pop(IDS, None)
            groups += [self.groups.index(group) for group in batch.pop(GROUPS)]
            values.append(self.pruner.values(encode(self.vlm, batch, needs).inputs))
        return torch.cat(values), torch.tensor(groups, device=self.device)


def policy_loss(logits: Tensor, gain: Tensor, estimator: Estimator, draws: int) -> Tensor:
    """What is to be made small so that the expected gain grows.

    Args:
        logits: (B, A) of the policy.
        gain: (B, A) of each arm, its price taken off; taken as constant.
        estimator: `exact`: minus the expected gain. `reinforce`: its gradient from draws, unbiased; the baseline of a
            draw is the mean of the sample's others. `grpo`: draws, gains standardised within the sample's draws.
        draws: G, of each sample.
    """
    log_p = logits.log_softmax(-1)
    if estimator == "exact":
        return -(log_p.exp() * gain).sum(-1).mean()
    arm = torch.multinomial(log_p.detach().exp(), draws, replacement=True)  # (B, G)
    earned = gain.gather(1, arm)
    advantage = earned - earned.mean(1, keepdim=True)
    if estimator == "reinforce":
        advantage = advantage * draws / (draws - 1)
    else:
        advantage = advantage / (earned.std(1, keepdim=True) + 1e-4)
    return -(advantage * log_p.gather(1, arm)).mean()


def entropy(logits: Tensor) -> Tensor:
    """Of each row of logits (B, A), in nats."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)
