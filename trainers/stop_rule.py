"""Learn when a prefix of tail-drop latents is long enough, and write the rule into the checkpoint.

    python -m trainers.stop_rule --config configs/tail_drop_tiny.yaml --pruner checkpoints/tail-drop-tiny

For items of the recipe's training data the loss at every length is computed once and kept on disk: KL(full model ‖
prefix) in nats, mean over the answer. From what each prefix's last latent knows the rule learns to expect how much of
it a longer prefix would avoid; nothing else is trained. Held-out items then say to which mean length each tolerance
leads, for `keep="auto:16"`. Stopped, the command goes on where it was; run again, it learns a rule anew.
"""

from dataclasses import replace
from pathlib import Path

import torch
from lightning.pytorch.cli import LightningArgumentParser, instantiate_class
from torch.utils.data import Subset

from prunezoo.core.errors import PruneZooError
from trainers.caches.prefix_losses import LossWorker, losses_of
from trainers.cli.errors import command
from trainers.cli.terminal import Terminal
from trainers.fit import FitCLI, asks_for_help, build
from trainers.training.stop_rule import learn_rule, load_latents, with_stops

STOPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 48)


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
    cli, console = build(args, StopCLI), Terminal()
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
    pruner, lengths, share = learn_rule(latents, stops, config.tolerance, train, held_out, config.steps)
    pruner.save_pretrained(config.pruner)
    console.print(
        f"{config.pruner}: on {len(lengths)} held-out items the rule explains {share:.0%} of the variance between "
        f"items; keep='auto' keeps {lengths.mean():.1f} tokens in the mean, from {lengths.min():.0f} to "
        f"{lengths.max():.0f}"
    )


if __name__ == "__main__":
    main()
