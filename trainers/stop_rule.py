"""Learn when a prefix of tail-drop latents is long enough, and write the rule into the checkpoint.

    python -m trainers.stop_rule --config configs/tail_drop_tiny.yaml --pruner checkpoints/tail-drop-tiny

For items of the recipe's training data the loss at every length is computed once and kept on disk: KL(full model ‖
prefix) in nats, mean over the answer. From what each prefix's last latent knows the rule learns to expect how much of
it a longer prefix would avoid; nothing else is trained. Held-out items then say to which mean length each tolerance
leads, for `keep="auto:16"`. Stopped, the command goes on where it was; run again, it learns a rule anew.

Letters: I items, S lengths, E hidden width.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser, instantiate_class
from rich.console import Console
from torch import Tensor
from torch.utils.data import Subset

from prunezoo.core.errors import PruneZooError
from prunezoo.core.registry import load_pruner
from prunezoo.host import encode, full_forward
from prunezoo.host.run import run_pruned
from prunezoo.learned.tail_drop import StopRule, TailDrop
from trainers.caches.vlm_cache import PrunedWorker, dtype_of, fill_with_progress, fingerprint, sample_of
from trainers.cli.errors import command
from trainers.data.conversation import ConversationCollator
from trainers.data.shards import ShardedCache
from trainers.fit import FitCLI, asks_for_help, build
from trainers.training.frozen import judge, load_frozen
from trainers.training.losses import answer_slots
from trainers.training.optimizer import adamw_cosine

STOPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 48)


@dataclass(frozen=True)
class LossWorker(PrunedWorker):
    """Computes losses; its pruner is latents with a rule for the lengths, whose weights do not matter."""

    pruner: TailDrop

    label = "losses of prefixes"

    def bytes_per_item(self, vlm: Any) -> int:
        """See Worker."""
        stops, width = len(self.pruner.config.stops), self.pruner.config.hidden
        return 8 + 4 * stops + 1 + stops + stops * width * self.pruner.queries.element_size()

    @torch.no_grad()
    def read(self, vlm: Any, collate: ConversationCollator, numbers: range) -> dict[str, Tensor]:
        """Read each item with all tokens and with every prefix.

        Returns:
            item (I,) long; loss (I, S) float32; right (I, 1 + S) bool, whether the answer is the reference's, with all
            tokens first; known (I, S, E), see TailDrop.known.
        """
        encoded = encode(vlm, collate([self.items[number] for number in numbers]), self.pruner.needs)
        full = full_forward(vlm, encoded)
        teacher, tokens, sample = answer_slots(full.logits, full.labels)
        judged = [judge(teacher, teacher, tokens, sample, len(numbers))]
        for stop in self.pruner.config.stops:
            host = run_pruned(vlm, encoded, self.pruner, stop).host
            judged.append(judge(answer_slots(host.logits, host.labels)[0], teacher, tokens, sample, len(numbers)))
        table = torch.stack(judged, dim=1)  # (B, 1 + S, 3)
        return {
            "item": torch.tensor(numbers),
            "loss": table[:, 1:, 2].clamp_min(0),
            "right": table[..., 0] > 0,
            "known": self.pruner.known(encoded.inputs.to(self.pruner.queries.dtype)),
        }


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


def losses_of(worker: LossWorker, folder: Path, processes: int = 1, shard_items: int = 256) -> dict[str, Tensor]:
    """What LossWorker computes of all its items, from the disk as far as it lies there.

    Raises:
        PruneZooError: In the folder lies something of another model, other latents or other items.
    """
    vlm = load_frozen(worker.vlm, worker.dtype)
    facts = {
        "vlm": fingerprint(vlm),
        "vlm_dtype": dtype_of(vlm),
        "pruner": fingerprint(with_stops(worker.pruner, ())),
        "stops": worker.pruner.config.stops,
        "data": sample_of(worker.items),
        "max_length": worker.max_length,
    }
    cache = ShardedCache(folder, facts, len(worker.items), shard_items, "run the same command again")
    fill_with_progress(cache, worker, vlm, processes)
    shards = list(cache.read())
    return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}


def avoidable(losses: Tensor) -> Tensor:
    """What each length loses beyond the mean of the longer half of the lengths, (I, S): what reading on can win back.

    What no length wins back says nothing about where to stop; a rule that expected it too would read on in vain.
    """
    return losses - losses[:, losses.shape[1] // 2 :].mean(1, keepdim=True)


def deviance(expected: Tensor, losses: Tensor) -> Tensor:
    """Mean of expected - losses * log(expected): Poisson's deviance, up to what does not depend on the expectation.

    However skewed the losses are, it is least where what is expected is their mean, given what is known.

    Args:
        expected: Any shape, above 0.
        losses: Likewise; single ones may be below 0.
    """
    return (expected - losses * expected.log()).mean()


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
        rule.tell.bias.copy_(losses.mean().clamp_min(1e-6).log())
    setup = adamw_cosine(list(rule.parameters()), lr, 0.05, 0.05, steps)
    optimizer, scheduler = setup["optimizer"], setup["lr_scheduler"]["scheduler"]
    for _ in range(steps):
        some = torch.randint(len(known), (batch,))
        optimizer.zero_grad()
        deviance(rule(known[some]), losses[some]).backward()
        optimizer.step()
        scheduler.step()


HELP = f"""usage: python -m trainers.stop_rule --config RECIPE --pruner FOLDER [--KEY=VALUE …]

Learn when a prefix of tail-drop latents is long enough, and write the rule into the checkpoint: keep='auto'.

  --pruner FOLDER                    the trained latents
  --stops=[{",".join(map(str, STOPS))}]   lengths to choose among
  --tolerance=0.05                   nats that keep='auto' accepts
  --train_items=3072                 items to learn from
  --steps=1000                       of the rule's optimizer
  --cache=runs/stop_rule             folder for the losses
  --processes=1                      processes that compute losses"""


class StopCLI(FitCLI):
    """Makes nothing of a recipe but its data module, and takes what the rule needs."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add that."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--pruner", type=str, required=True, help="folder of the trained latents")
        parser.add_argument("--stops", type=list[int], default=list(STOPS), help="lengths to choose among")
        parser.add_argument("--tolerance", type=float, default=0.05, help="nats that keep='auto' accepts")
        parser.add_argument("--train_items", type=int, default=3072, help="to learn from")
        parser.add_argument("--steps", type=int, default=1000, help="of the rule's optimizer")
        parser.add_argument("--cache", type=str, default="runs/stop_rule", help="folder for the losses")
        parser.add_argument("--processes", type=int, default=1, help="that compute losses")

    def instantiate_classes(self) -> None:
        """Not the rest."""
        self.datamodule = instantiate_class((), self.config.data.as_dict())


@command
def main(args: list[str] | None = None) -> None:
    """Learn a rule, and write it into the checkpoint."""
    if asks_for_help(args):
        print(HELP)
        return
    cli, console = build(args, StopCLI), Console()
    config, model, data = cli.config, cli.config.model.init_args, cli.datamodule
    latents = load_latents(config.pruner)
    stops = tuple(config.stops)
    if not stops:
        raise PruneZooError("stops: name two or more lengths for the rule to choose among")
    replace(latents.config, stops=stops, tolerance=config.tolerance)  # refuses at once what is out of range
    reader, tables = with_stops(latents, stops), []
    for split in ("train", "validation"):
        items = data.items(split)
        if split == "train":
            items = Subset(items, range(min(config.train_items, len(items))))
        worker = LossWorker(model.vlm, model.vlm_dtype, items, data.batch_size, data.max_length, reader)
        tables.append(losses_of(worker, Path(config.cache) / split, config.processes))
    train, held_out = tables
    torch.manual_seed(config.seed_everything)
    pruner = with_stops(latents, stops, tolerance=config.tolerance)
    assert pruner.stop is not None
    pruner.stop.float()
    learned, there = avoidable(train["loss"]), avoidable(held_out["loss"])
    learn(pruner.stop, train["known"].float(), learned, config.steps)
    pruner.to(latents.queries.dtype)
    expected = pruner.stop(held_out["known"]).detach()
    pruner.stop.calibrate(expected)
    share = explained(expected, there, learned.mean(0))
    lengths = pruner.stop.lengths(expected, config.tolerance).double()
    pruner.save_pretrained(config.pruner)
    console.print(
        f"{config.pruner}: on {len(expected)} held-out items the rule explains {share:.0%} of the variance between "
        f"items; keep='auto' keeps {lengths.mean():.1f} tokens in the mean, from {lengths.min():.0f} to "
        f"{lengths.max():.0f}"
    )


if __name__ == "__main__":
    main()
