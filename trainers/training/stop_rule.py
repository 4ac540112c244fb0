"""Learn when a prefix of tail-drop latents is long enough, from what each length loses (`caches/prefix_losses.py`).

From what each prefix's last latent knows the rule learns to expect how much a longer prefix would avoid; nothing else
is trained.

Letters: I items, S lengths, E hidden width.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from prunezoo.core.errors import PruneZooError
from prunezoo.core.registry import load_pruner
from prunezoo.learned.tail_drop import StopRule, TailDrop

from .optimizer import adamw_cosine


def load_latents(source: str) -> TailDrop:
    """Trained tail-drop latents.

    Raises:
        PruneZooError: Another method.
    """
    pruner = load_pruner(source)
    if not isinstance(pruner, TailDrop):
        raise PruneZooError(f"--pruner {source}: a stop rule is for 'tail_drop', this is '{pruner.name}'")
    return pruner


def with_stops(pruner: TailDrop, stops: tuple[int, ...], **settings: Any) -> TailDrop:
    """The same latents in eval mode with a new, untrained rule, or with none; and with other settings in the config."""
    made = TailDrop(replace(pruner.config, stops=stops, **settings)).to(pruner.queries.dtype)
    made.load_state_dict({k: v for k, v in pruner.state_dict().items() if not k.startswith("stop.")}, strict=False)
    made.base_model = pruner.base_model
    return made.eval()


def avoidable(losses: Tensor) -> Tensor:
    """What each length loses beyond the mean of the longer half of the lengths, (I, S): what reading on can win back.

    What no length wins back says nothing about where to stop; a rule that expected it too would read on in vain.
    """
    return losses - losses[:, losses.shape[1] // 2 :].mean(1, keepdim=True)


LEAST = 1e-6
"""Nats, far below every tolerance."""


def deviance(expected: Tensor, losses: Tensor) -> Tensor:
    """Mean of expected - losses * log(expected): Poisson's deviance, up to what does not depend on the expectation.

    However skewed the losses are, it is least where what is expected is their mean, given what is known. Where that is
    below 0, as where longer prefixes do harm, it is least at 0: LEAST keeps its logarithm from falling without end.

    Args:
        expected: Any shape, above 0.
        losses: Likewise; single ones may be below 0.
    """
    return (expected - losses * (expected + LEAST).log()).mean()


def explained(expected: Tensor, losses: Tensor, usual: Tensor) -> float:
    """Share of the variance between items of one length that a rule explains; 0: no more than the usual losses do.

    Args:
        expected: (I, S).
        losses: (I, S).
        usual: (S,) mean losses, of other items.
    """
    return float(1 - (expected - losses).square().mean() / (usual - losses).square().mean())


def learn(rule: StopRule, known: Tensor, losses: Tensor, steps: int, lr: float = 1e-3, batch: int = 256) -> None:
    """Train a rule, in place.

    Args:
        rule: In float32.
        known: (I, S, E).
        losses: (I, S).
        steps: Of AdamW.
        lr: Its peak learning rate.
        batch: Items of a step.
    """
    with torch.no_grad():
        rule.tell.bias.copy_(losses.mean().clamp_min(LEAST).log())
    setup = adamw_cosine(list(rule.parameters()), lr, 0.05, 0.05, steps)
    optimizer, scheduler = setup["optimizer"], setup["lr_scheduler"]["scheduler"]
    for _ in range(steps):
        some = torch.randint(len(known), (batch,))
        optimizer.zero_grad()
        deviance(rule(known[some]), losses[some]).backward()
        optimizer.step()
        scheduler.step()


def learn_rule(
    latents: TailDrop,
    stops: tuple[int, ...],
    tolerance: float,
    train: dict[str, Tensor],
    held_out: dict[str, Tensor],
    steps: int,
) -> tuple[TailDrop, Tensor, float]:
    """Give latents a rule, learned from the losses of some items and calibrated on those of others.

    Args:
        latents: Trained.
        stops: S lengths to choose among.
        tolerance: Nats that `keep="auto"` accepts.
        train: Losses and what was known, see LossWorker, of the items to learn from.
        held_out: Those of the items to calibrate on.
        steps: Of the rule's optimizer.

    Returns:
        Latents with the rule; the length (I,) that it chooses for each held-out item; the share of the variance
        between held-out items that it explains.
    """
    pruner = with_stops(latents, stops, tolerance=tolerance)
    rule = pruner.stop
    assert rule is not None
    rule.float()
    learned, there = avoidable(train["loss"]), avoidable(held_out["loss"])
    learn(rule, train["known"].float(), learned, steps)
    pruner.to(latents.queries.dtype)
    expected = rule(held_out["known"]).detach()
    rule.calibrate(expected)
    return pruner, rule.lengths(expected, tolerance).double(), explained(expected, there, learned.mean(0))
