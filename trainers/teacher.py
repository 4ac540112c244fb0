"""Make the cache of a recipe, without training: what the frozen model says of a training set and is dear to ask.

    python -m trainers.teacher --config configs/explain_cnn_tiny.yaml [--data.processes=4]

makes the folder that a recipe's data module reads: relevance maps (`data.maps`), answers with hidden states
(`data.teacher_cache`) or what each budget earns (`data.arms`). Stopped, it goes on where it was. `trainers.fit` does
the same with what is missing before it trains, so this command is for those who have more processes to give.
"""

from prunezoo.core.errors import PruneZooError
from trainers.caches.vlm_cache import CachedDataModule
from trainers.cli.errors import command
from trainers.fit import FitCLI, asks_for_help, build

HELP = """usage: python -m trainers.teacher --config RECIPE [--config MORE.yaml …] [--KEY=VALUE …]

Make the cache that a recipe's data module reads, without training: relevance maps (data.maps), answers
(data.teacher_cache) or what each budget earns (data.arms). Stopped, it goes on where it was.

What is often set:
  --data.processes=4                 processes that compute, each with the frozen model
  --data.train_items=4096            how many items are asked
  --model.vlm=FOLDER_OR_HUB_ID       another frozen model"""


class CacheCLI(FitCLI):
    """Makes module and data module of a recipe, and no trainer."""

    def instantiate_classes(self) -> None:
        """Both."""
        made = self.parser.instantiate(self.config)
        self.model, self.datamodule = made["model"], made["data"]


@command
def main(args: list[str] | None = None) -> None:
    """Make a recipe's cache."""
    if asks_for_help(args):
        print(HELP)
        return
    cli = build(args, CacheCLI)
    if not isinstance(cli.datamodule, CachedDataModule):
        kind = type(cli.datamodule).__name__
        raise PruneZooError(f"data: {kind} keeps no cache, there is nothing to make before training; see docs/scale.md")
    cli.datamodule.make_cache(cli.model)


if __name__ == "__main__":
    main()
