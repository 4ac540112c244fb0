"""Train the thresholds of an ATP by policy gradient, with a price a token: which image is worth more, and which less.

By distillation (`adaptive`) the thresholds learn through soft gates what a little more of a token does to the answer.
Here they are drawn, the tokens are really dropped, and thresholds become likelier as the frozen model then answers
better than under the other draws of the same image. A token costs a price, one for each budget, that rises while more
tokens are used than were asked for and falls while fewer are: dual ascent on a constraint, as for Markov decisions
(Altman, 1999). Advantage normalised within the group as in GRPO (arXiv 2402.03300), strictly on-policy. Ours; the
method is ATP-LLaVA (arXiv 2412.00447).

A draw is the displacement of the redundancy threshold, of each image at each pruned layer: a Gaussian around what the
pruner's head says. Only these heads learn. The corrections stay: draws say nothing of the scores' order. The
spatial threshold, which no draw moves but which shares a layer with the other, is held where it was.

Letters: B samples of one image each, G draws of each sample, K budgets, S answer slots, F statistics of an instance.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from prunezoo.core.contract import Pruner
from prunezoo.core.errors import PruneZooError
from prunezoo.host import Encoded, encode, encode_needs
from prunezoo.host.families import find_family
from prunezoo.host.group import repeat_samples
from prunezoo.host.run import run_pruned
from prunezoo.learned.atp import ATP
from trainers.data.modules import GROUPS

from .frozen import Dtype, FrozenModule
from .losses import answer_slots, row_means
from .warm_start import start_from


@dataclass(frozen=True)
class Draw:
    """What was drawn at one pruned layer; rows are those of the batch with G copies of each sample."""

    number: int  # of the pruned layer, from 0
    statistics: Tensor  # (B * G, F) that its head was given
    displacement: Tensor  # (B * G, 1) drawn, in log-odds


@dataclass(frozen=True)
class Rollout:
    """What was drawn for a batch, and how much better than its group each draw did."""

    draws: list[Draw]  # one for each pruned layer
    advantage: Tensor  # (G, B)


class ThresholdPolicyModule(FrozenModule):
    """Frozen model, ATP, and the updates of its thresholds.

    Args:
        vlm: Folder or Hub id of a `transformers` image-text-to-text model. It stays frozen and out of the checkpoints.
        pruner: The ATP to train, with `adaptive`.
        warm_start: Folder or Hub id of the trained ATP, of the same config, whose weights it starts from; None: from
            scratch, where thresholds keep the count that is asked for.
        vlm_dtype: Type that the frozen model is held in: auto (as stored), float32, bfloat16 or float16.
        draws: G, of each sample, at least 2.
        spread: Of the Gaussian that displacements are drawn from, in log-odds, above 0.
        budgets: K shares of the tokens, mean over all decoder layers, ascending; each sample draws one, evenly.
        price: Of the tokens that are asked for, in nats, at the start, at least 0; the same for each budget.
        price_rate: What a price rises by in a step that uses twice the tokens asked for, in nats, at least 0.
        spread_floor: Added to the spread of a group's rewards, in nats, before they are divided by it, so that a sample
            that is answered alike under every draw does not count as much as one where the thresholds decide.
        kl_weight: Weight of KL(policy ‖ start), sum over the pruned layers.
        level_weight: Weight of the squared change of the spatial threshold since the start, in log-odds.
        lr: Peak learning rate.
        warm_up: Share of the steps in which it rises from 0; from there it falls to 0 by a cosine.
        weight_decay: Of the matrices; vectors have none.
        measure: Shares of the tokens that validation keeps, by hard selection.

    Raises:
        PruneZooError: A pruner without thresholds, a warm start of another config, or a number out of its range.
    """

    pruner: ATP
    start: nn.ModuleList
    prices: Tensor

    def __init__(
        self,
        vlm: str,
        pruner: Pruner,
        warm_start: str | None,
        vlm_dtype: Dtype = "auto",
        draws: int = 8,
        spread: float = 0.5,
        budgets: tuple[float, ...] = (1 / 18, 1 / 9, 2 / 9),
        price: float = 0.1,
        price_rate: float = 0.05,
        spread_floor: float = 0.2,
        kl_weight: float = 0.01,
        level_weight: float = 1.0,
        lr: float = 5e-4,
        warm_up: float = 0.05,
        weight_decay: float = 0.0,
        measure: tuple[float, ...] = (2 / 9, 1 / 9, 1 / 18),
    ) -> None:
        if not isinstance(pruner, ATP) or not pruner.config.adaptive:
            named = f"'{pruner.name}'" + (" with adaptive=false" if isinstance(pruner, ATP) else "")
            raise PruneZooError(f"model.pruner is {named}, which has no thresholds: take an 'atp' with adaptive=true")
        if draws < 2:
            raise PruneZooError(f"draws={draws} must be at least 2: they are compared")
        if spread <= 0 or spread_floor <= 0:
            raise PruneZooError(f"spread={spread} and spread_floor={spread_floor} must be above 0")
        if not budgets or any(not 0 < share <= 1 for share in budgets) or list(budgets) != sorted(set(budgets)):
            raise PruneZooError(f"budgets must be ascending shares in (0, 1], all different, got {list(budgets)}")
        numbers = {"price": price, "price_rate": price_rate, "kl_weight": kl_weight, "level_weight": level_weight}
        for name, number in numbers.items():
            if number < 0:
                raise PruneZooError(f"{name}={number} must be at least 0")
        super().__init__(vlm, pruner, vlm_dtype, lr, warm_up, weight_decay, measure)
        depth = find_family(self.vlm).decoder().depth
        before = self.pruner.stages(depth)[0] / depth
        if budgets[0] <= before:
            raise PruneZooError(
                f"budgets: {budgets[0]} cannot be met, as the layers in front of the first pruned one use "
                f"{before:.3f} of the tokens in the mean: leave it out, or have model.pruner prune earlier"
            )
        if warm_start is not None:
            start_from(self.pruner, warm_start)
        self.pruner.corrections.requires_grad_(False)
        # not a submodule: the start is neither trained nor saved
        self.__dict__["start"] = copy.deepcopy(self.pruner.thresholds).requires_grad_(False)
        self.draws, self.spread, self.budgets, self.price_rate = draws, spread, budgets, price_rate
        self.spread_floor, self.kl_weight, self.level_weight = spread_floor, kl_weight, level_weight
        self.register_buffer("prices", torch.full((len(budgets),), price))

    def setup(self, stage: str) -> None:
        """Move what is frozen to where training happens."""
        super().setup(stage)
        self.start.to(self.trainer.strategy.root_device)

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """Draw, drop, read; then the loss of what was drawn."""
        batch.pop(GROUPS, None)
        return self.loss(self.roll_out(batch))

    @torch.no_grad()
    def roll_out(self, batch: dict[str, Any]) -> Rollout:
        """Draw thresholds G times for each sample, let the model answer, compare, and move the prices."""
        encoded = encode(self.vlm, batch, encode_needs(self.pruner))
        if not torch.equal(encoded.sample, torch.arange(len(encoded.mask), device=encoded.sample.device)):
            raise PruneZooError("training thresholds takes one image a sample: leave the others out of the data")
        available = encoded.inputs.valid.sum(1)
        chosen = torch.randint(len(self.budgets), (len(available),), device=available.device)
        shares = torch.tensor(self.budgets, dtype=torch.float64, device=available.device)
        asked = (shares[chosen] * available).round().long().clamp_min(1)
        draws, worth, tokens = self.answer(encoded, asked)
        used = tokens / asked
        reward = worth - self.prices[chosen] * used
        spread = reward.std(0, keepdim=True)
        self.log("train/reward", worth.mean(), prog_bar=True, batch_size=len(asked))
        self.log("train/reward_spread", spread.mean(), batch_size=len(asked))
        self.log("train/tokens_spread", used.mean(0).std(), batch_size=len(asked))
        self.move_prices(used, chosen)
        return Rollout(draws, (reward - reward.mean(0, keepdim=True)) / (spread + self.spread_floor))

    def answer(self, encoded: Encoded, asked: Tensor) -> tuple[list[Draw], Tensor, Tensor]:
        """Let the frozen model answer under drawn thresholds.

        Args:
            encoded: The batch, one image a sample.
            asked: (B,) long, tokens to keep of each image in the mean over all layers.

        Returns:
            The draws; log p(reference answer), mean over its tokens, in nats (G, B); tokens that the language model
            read, mean over its layers (G, B).
        """
        many, _ = repeat_samples(encoded, self.draws)
        with drawn_thresholds(self.pruner, self.spread) as draws:
            run = run_pruned(self.vlm, many, self.pruner, asked.repeat_interleave(self.draws))
        logits, tokens, row = answer_slots(run.host.logits, run.host.labels)
        slots = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        worth = row_means(slots, row, len(many.mask))
        read = run.tokens.to(worth)
        return draws, worth.view(-1, self.draws).T, read.view(-1, self.draws).T

    def move_prices(self, used: Tensor, chosen: Tensor) -> None:
        """One step of dual ascent, over the samples of all processes.

        Args:
            used: (G, B) tokens, as a share of those asked for.
            chosen: (B,) long, the budget of each sample.
        """
        total, count = used.new_zeros(2, len(self.budgets)).index_add_(
            1, chosen, torch.stack([used.mean(0), torch.ones_like(used[0])])
        )
        if self._trainer is not None:  # else no training, and so no other process
            total, count = (self.trainer.strategy.reduce(part, reduce_op="sum") for part in (total, count))
        seen = count > 0
        mean = total / count.clamp_min(1)
        self.prices.copy_(torch.where(seen, self.prices + self.price_rate * (mean - 1), self.prices).clamp_min(0))
        for place, share in enumerate(self.budgets):
            self.log(f"train/price_{share:.3f}", self.prices[place])
            if seen[place]:
                self.log(f"train/tokens_{share:.3f}", mean[place])

    def loss(self, rollout: Rollout) -> Tensor:
        """Policy gradient, KL to the start, and what holds the spatial threshold in place."""
        log_prob, kl, moved = [], [], []
        for draw in rollout.draws:
            mean, level = self.pruner.ask_head(draw.number, draw.statistics)
            with torch.no_grad():
                first_mean, first_level = self.start[draw.number](draw.statistics)
            policy = Normal(mean, self.spread, validate_args=False)
            log_prob.append(policy.log_prob(draw.displacement)[:, 0])
            kl.append(kl_divergence(policy, Normal(first_mean, self.spread, validate_args=False))[:, 0])
            moved.append((level - first_level)[:, 0].square())
        gain = rollout.advantage * torch.stack(log_prob).sum(0).view(-1, self.draws).T
        far, shift = torch.stack(kl).sum(0).mean(), torch.stack(moved).mean()
        loss = -gain.mean() + self.kl_weight * far + self.level_weight * shift
        size = rollout.advantage.shape[1]
        self.log_dict({"train/kl_to_start": far.detach(), "train/level_shift": shift.detach()}, batch_size=size)
        self.log("train/loss", loss.detach(), batch_size=size)
        return loss


@contextmanager
def drawn_thresholds(pruner: ATP, spread: float) -> Iterator[list[Draw]]:
    """Within it the pruner displaces its redundancy thresholds by draws, not by what its heads say, as if in use.

    In use, since in training mode a shift common to the batch would take back what draws have in common.

    Args:
        pruner: Its heads carry hooks for as long.
        spread: Of the Gaussian around what a head says, in log-odds.

    Yields:
        What is drawn, in the order of the pruned layers; empty until the pruner is asked.
    """
    draws: list[Draw] = []
    places = {head: number for number, head in enumerate(pruner.thresholds)}

    def draw(head: nn.Module, given: tuple[Tensor], said: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        mean, level = said
        drawn = mean + spread * torch.randn_like(mean)
        draws.append(Draw(places[head], given[0].detach(), drawn.detach()))
        return drawn, level

    handles = [head.register_forward_hook(draw) for head in places]
    training = pruner.training
    pruner.eval()
    try:
        yield draws
    finally:
        pruner.train(training)
        for handle in handles:
            handle.remove()
