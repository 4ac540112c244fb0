"""How a policy learned, and what its updates cost, for its card.

    python -m trainers.upkeep.policy_record runs/policy_tiny

reads the training's logs, times updates beside distillation steps on the same batch, and writes `policy.json` into the
folder. On a CPU times are processor seconds, so that other work on the machine does not count.
"""

import argparse
import copy
import csv
import json
import logging
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from lightning.pytorch.cli import instantiate_class
from torch import Tensor

from prunezoo.core.budgets import budget
from prunezoo.core.contract import Pruner
from prunezoo.core.errors import PruneZooError
from prunezoo.core.registry import load_pruner
from prunezoo.core.subsets import draw_subsets, log_probability, subset_mask
from prunezoo.host import encode, encode_needs, run_pruned
from prunezoo.host.parts.loading import load_processor
from prunezoo.learned.budget import BudgetPolicy
from prunezoo.learned.policy import KeepPolicy
from trainers.caches.arms import earn
from trainers.cards.parts import POLICY_FILE
from trainers.cli.errors import command
from trainers.cli.options import check_at_least_one
from trainers.cli.recipes import load_yaml
from trainers.data.conversation import ConversationCollator
from trainers.data.modules import EARNED
from trainers.evaluation.loading import default_device
from trainers.training.budget_policy import BudgetModule
from trainers.training.distill import DistillModule
from trainers.training.frozen import FrozenModule
from trainers.training.policy_gradient import PolicyModule, Rollout
from trainers.training.run_record import RUN_FILE, read_run

M = TypeVar("M", bound=FrozenModule)

PARTS = 5
"""Into how many parts of equal length a training is divided, to show how its figures moved."""


class Clock:
    """Adds up seconds by name."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Count what happens inside."""
        begun = self._now()
        yield
        self.seconds[name] += self._now() - begun

    def _now(self) -> float:
        if self.device.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()


def time_keep_policy(module: PolicyModule, batch: dict[str, Any], clock: Clock) -> Callable[[], None]:
    """One update of :class:`PolicyModule`, part by part."""
    optimizer = torch.optim.AdamW(module.pruner.parameters(), lr=0.0)

    def update() -> None:
        with torch.no_grad():
            with clock.time("encode"):
                encoded = encode(module.vlm, batch, module.pruner.needs)
            inputs = encoded.inputs
            with clock.time("score and draw"):
                keep = budget(module.draw_budgets(inputs.valid.sum(1)), inputs.valid.sum(1))
                scores = module.pruner.score(inputs)
                order, drawn = draw_subsets(scores, inputs.valid, keep, module.draws)
                log_prob = log_probability(scores, inputs.valid, order, drawn)
            with clock.time("read all draws"):
                reward = module.reward(encoded, subset_mask(order, drawn))
        with clock.time("update the policy"):
            rollout = Rollout(inputs, order, drawn, log_prob, reward - reward.mean(0))
            for _ in range(module.passes):
                step(optimizer, module.loss(rollout))

    return update


def time_budget_policy(module: BudgetModule, batch: dict[str, Any], clock: Clock) -> Callable[[], None]:
    """One update of :class:`BudgetModule`; and once for all, reading the batch under every arm."""
    optimizer = torch.optim.AdamW([p for p in module.pruner.parameters() if p.requires_grad], lr=0.0)

    def update() -> None:
        arms = module.pruner.config.arms
        with torch.no_grad(), clock.time("read all arms, once for all updates"):
            encoded = encode(module.vlm, batch, encode_needs(module.pruner))
            rows = [
                earn(run_pruned(module.vlm, encoded, module.pruner.inner, arm).host, len(encoded.mask)) for arm in arms
            ]
        earned = torch.stack([row["probability"] for row in rows], 1)
        with clock.time("encode and update the policy"):
            step(optimizer, module.training_step({**batch, EARNED: earned}, 0))

    return update


def time_distillation(module: DistillModule, batch: dict[str, Any], clock: Clock) -> Callable[[], None]:
    """One step of the second stage of :class:`DistillModule`."""
    optimizer = torch.optim.AdamW(module.pruner.parameters(), lr=0.0)

    def update() -> None:
        with clock.time("distillation"):
            step(optimizer, module.training_step(dict(batch), 0))

    return update


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Backwards, and on."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def measure_cost(folder: Path, recipe: dict[str, Any], updates: int) -> dict[str, Any]:
    """Seconds of an update, part by part, and of a distillation step of the same body at equal batch.

    Args:
        folder: The policy's.
        recipe: That it was trained by.
        updates: How many are timed, after one that is not.
    """
    policy = load_pruner(folder)
    options = {name: value for name, value in recipe["model"]["init_args"].items() if name != "pruner"}
    data = instantiate_class((), with_vlm(recipe["data"], options["vlm"]))
    items = data.items("train")
    collate = ConversationCollator(load_processor(options["vlm"]), max_length=data.max_length)
    device = torch.device(default_device())
    batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in collate(items[: data.batch_size]).items()}
    clock = Clock(device)
    update: Callable[[], None]
    if isinstance(policy, KeepPolicy):
        body: Pruner = copy.deepcopy(policy)
        update = time_keep_policy(alone(PolicyModule(pruner=policy, **options), device), batch, clock)
    elif isinstance(policy, BudgetPolicy):
        body = copy.deepcopy(policy.reader)
        update = time_budget_policy(alone(BudgetModule(pruner=policy, **options), device), batch, clock)
    else:
        raise PruneZooError(f"{folder} holds a '{policy.name}': only 'policy' and 'budget' have updates to time")
    distill = DistillModule(options["vlm"], body, options.get("vlm_dtype", "auto"), guide_share=0.0)
    distillation = time_distillation(alone(distill, device), batch, clock)
    for number in range(updates + 1):
        update()
        distillation()
        if not number:
            clock.seconds.clear()
    seconds = {name: round(total / updates, 4) for name, total in clock.seconds.items()}
    reference = seconds.pop("distillation")
    repeated = sum(value for name, value in seconds.items() if "once" not in name)
    return {
        "batch": data.batch_size,
        "parts": seconds,
        "update_seconds": round(repeated, 4),
        "distillation_seconds": reference,
        "multiple": round(repeated / reference, 2),
    }


def alone(module: M, device: torch.device) -> M:
    """A training module that no trainer leads, at the start of its training."""
    module.total_steps = 1
    module.vlm.to(device)
    if isinstance(module, PolicyModule) and module.reference is not None:
        module.reference.to(device)
    return module.to(device).train()


def with_vlm(data: dict[str, Any], vlm: str) -> dict[str, Any]:
    """The recipe's data, with the model that the command line fills in."""
    return {**data, "init_args": {**data["init_args"], "vlm": vlm}}


def read_figures(folder: Path) -> dict[str, list[float]]:
    """How each figure of a training moved: its mean in each of :data:`PARTS` parts of it.

    Raises:
        PruneZooError: There are no logs.
    """
    rows: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for path in sorted((folder / "training" / "logs").glob("version_*/metrics.csv")):
        with path.open(encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if name.startswith("train/") and value:
                        rows[name.removeprefix("train/")].append((int(row["step"]), float(value)))
    if not rows:
        raise PruneZooError(f"{folder}/training/logs: no metrics.csv; name the folder in which the policy was trained")
    last = max(number for points in rows.values() for number, _ in points) + 1
    figures = {}
    for name, points in rows.items():
        parts: list[list[float]] = [[] for _ in range(PARTS)]
        for number, value in points:
            parts[number * PARTS // last].append(value)
        figures[name] = [round(sum(part) / len(part), 4) for part in parts if part]
    return figures


def read_recipe(folder: Path) -> dict[str, Any]:
    """The recipe of a training, from the record of its run.

    Raises:
        PruneZooError: There is none.
    """
    path = folder / RUN_FILE
    try:
        return load_yaml(read_run(path)["recipe"])
    except yaml.YAMLError as error:
        raise PruneZooError(f"{path}: no recipe ({error}); name the folder of a trained policy") from None


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Write the record."""
    argv = sys.argv[1:] if argv is None else list(argv)
    p = argparse.ArgumentParser(
        prog="python -m trainers.upkeep.policy_record", description="How a policy learned, at what cost."
    )
    p.add_argument("folder", type=Path, help="the policy's folder, with the logs of its training")
    p.add_argument("--updates", type=int, default=10, help="how many are timed")
    args = p.parse_args(argv)
    check_at_least_one(args, "updates")
    recipe = read_recipe(args.folder)
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.ERROR)  # what it says of each trainer that times something is of no use here
    try:
        cost = measure_cost(args.folder, recipe, args.updates)
    finally:
        log.setLevel(level)
    record = {
        "command": shlex.join(["python", "-m", "trainers.upkeep.policy_record", *argv]),
        "figures": read_figures(args.folder),
        "cost": cost,
    }
    path = args.folder / POLICY_FILE
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
