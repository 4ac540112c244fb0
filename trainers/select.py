"""Choose which items of a recipe's training split are worth training on; the recipe takes the list as `data.only`.

    python -m trainers.select --config configs/ppm_tiny.yaml --data.train_items=4096 --method dbp --share 0.2
    python -m trainers.fit --config configs/ppm_tiny.yaml --data.train_items=4096 --data.only=runs/only.json

`random` needs nothing. `prototype` and `dbp` embed every item once by the frozen model, and keep that on disk: stopped,
the command goes on where it was, and another share or method asks the model no more.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console

from prunezoo.core.errors import PruneZooError
from trainers.caches.embeddings import EmbeddingWorker, read_embeddings
from trainers.caches.vlm_cache import dtype_of
from trainers.cli.errors import check_output, command
from trainers.cli.terminal import Terminal
from trainers.data.modules import ItemDataModule
from trainers.data.selection.chosen import Chosen
from trainers.data.selection.clusters import Numbers, cluster
from trainers.data.selection.density import choose_by_density
from trainers.data.selection.prototype import choose_by_prototype
from trainers.data.selection.random_choice import choose_random
from trainers.fit import FitCLI, asks_for_help, build
from trainers.training.frozen import load_frozen

Method = Literal["random", "prototype", "dbp"]

HELP = """usage: python -m trainers.select --config RECIPE --method METHOD --share SHARE [--KEY=VALUE …]

Choose which items of a recipe's training split are worth training on; the recipe takes the list as data.only.

  --method=random|prototype|dbp      see docs/train.md
  --share=0.2                        of the items that are chosen
  --file=runs/only.json              the list
  --data.train_items=4096            choose among the first so many
  --clusters=64                      of prototype and dbp
  --hold=easy                        prototype: items near the centre of their cluster, or hard: far ones
  --temperature=0.5                  dbp: the lower, the more a cluster's part follows its complexity
  --duplicates=0.05                  dbp: cosine distance below which two items are the same
  --seed=0                           of random and of where the clusters begin
  --cache=runs/embeddings            folder for the embeddings
  --processes=1                      that embed"""


class SelectCLI(FitCLI):
    """Makes nothing of a recipe but its data module, and takes what choosing needs."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add that."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--method", type=Method, required=True, help="how they are chosen")
        parser.add_argument("--share", type=float, required=True, help="of the items, in (0, 1]")
        parser.add_argument("--file", type=str, default="runs/only.json", help="the list")
        parser.add_argument("--clusters", type=int, default=64, help="of prototype and dbp")
        parser.add_argument("--hold", type=Literal["hard", "easy"], default="easy", help="prototype: which ones")
        parser.add_argument("--temperature", type=float, default=0.5, help="dbp: of the clusters' parts")
        parser.add_argument("--duplicates", type=float, default=0.05, help="dbp: cosine distance of duplicates")
        parser.add_argument("--seed", type=int, default=0, help="of random, and of where the clusters begin")
        parser.add_argument("--cache", type=str, default="runs/embeddings", help="folder for the embeddings")
        parser.add_argument("--processes", type=int, default=1, help="that embed")

    def instantiate_classes(self) -> None:
        """Not the rest."""
        self.datamodule = self.parser.instantiate(self.config)["data"]


def check(config: Any) -> None:
    """Refuse settings out of range.

    Raises:
        PruneZooError: The first one.
    """
    if not 0 < config.share <= 1:
        raise PruneZooError(f"--share {config.share}: above 0, and at most 1")
    if config.temperature <= 0:
        raise PruneZooError(f"--temperature {config.temperature}: above 0")
    if not 0 <= config.duplicates <= 2:
        raise PruneZooError(f"--duplicates {config.duplicates}: a cosine distance lies in [0, 2]")
    if config.processes < 1:
        raise PruneZooError(f"--processes {config.processes}: at least 1")
    if config.data.init_args.get("only"):
        raise PruneZooError("data.only: the recipe trains on chosen items already; leave it out to choose anew")
    check_output("--file", Path(config.file))


def choose(config: Any, data: ItemDataModule, count: int, console: Console) -> tuple[Numbers, dict[str, Any]]:
    """The numbers of the chosen items, and what the choice depends on."""
    items, method = data.items("train"), config.method
    how = {"method": method, "share": config.share, "seed": config.seed}
    if method == "random":
        return choose_random(len(items), count, config.seed), how
    settings = config.model.init_args
    if "vlm" not in settings:
        raise PruneZooError(f"--method {method}: the recipe has no frozen model to embed items with; take random")
    vlm = load_frozen(settings.vlm, settings.get("vlm_dtype", "auto"))
    worker = EmbeddingWorker(data.vlm, dtype_of(vlm), items, data.batch_size, data.max_length)
    embeddings, groups = read_embeddings(config.cache, data.source, worker, vlm, config.processes)
    found = cluster(embeddings, config.clusters, config.seed)
    how |= {"clusters": config.clusters}
    console.print(f"{len(items)} items in {config.clusters} clusters of {found.sizes.min()} to {found.sizes.max()}")
    if method == "prototype":
        return choose_by_prototype(found, groups, count, config.hold), how | {"hold": config.hold}
    how |= {"temperature": config.temperature, "duplicates": config.duplicates}
    return choose_by_density(found, count, config.temperature, config.duplicates), how


@command
def main(args: Sequence[str] | None = None) -> None:
    """Choose, and write the list."""
    words = None if args is None else list(args)
    if asks_for_help(words):
        print(HELP)
        return
    cli = build(words, SelectCLI)
    config, data, console = cli.config, cli.datamodule, Terminal()
    check(config)
    if not isinstance(data, ItemDataModule):
        raise PruneZooError(f"data: {type(data).__name__} has no items to choose from")
    items = data.items("train")
    count = round(config.share * len(items))
    if not count:
        raise PruneZooError(f"--share {config.share}: none of {len(items)} items; choose a larger share")
    numbers, how = choose(config, data, count, console)
    ids = tuple(items[number].id for number in numbers)
    chosen = Chosen(data.source, len(items), how, tuple(map(int, np.sort(numbers))), ids)
    chosen.write(Path(config.file))
    console.print(f"{config.file}: {count} of {len(items)} items, for data.only", soft_wrap=True)


if __name__ == "__main__":
    main()
