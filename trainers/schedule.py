"""Make a schedule, the counts of tokens by vision block or decoder layer that methods take as `?schedule=FILE`.

    python -m trainers.schedule precrop --vlm tiny-llava --share 1/2 --vision tower.json --layer layers.json
    python -m trainers.schedule hand --stage vision --available 144 --counts 144 96 64 36 --out tower.json
    python -m trainers.schedule read runs/diffrate_tiny --out tower.json
    python -m trainers.schedule of 'vflowopt?options=found.json' --vlm tiny-llava --keep 1/9 --out layers.json
    python -m trainers.schedule show tower.json

`precrop` is the closed form of PreCrop: from the cost of a token in each block and layer alone, no data and no weights.
`of` writes down what a method with several places does by itself at a budget, as with the options of a search.
"""

import argparse
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import torch

from prunezoo.core.budgets import counts_of
from prunezoo.core.errors import PruneZooError
from prunezoo.core.registry import load_pruner
from prunezoo.core.schedule import PLACES, Schedule, precrop
from prunezoo.learned.diffrate import DiffRate
from trainers.cli.errors import command, whole_file
from trainers.cli.names import find_pruner, find_vlm
from trainers.cli.options import add_option
from trainers.cli.terminal import Terminal
from trainers.evaluation.budgets import parse_budget
from trainers.planning.costs import blocks_of, layer_costs, tower_costs
from trainers.planning.models import load_config


def make_precrop(vlm: str, share: float) -> tuple[Schedule, Schedule]:
    """Of the vision and of the layer stage, which together cost that share of what tower and language model cost.

    Args:
        vlm: As `load_config` takes it.
        share: In (0, 1].

    Raises:
        PruneZooError: The share is out of range, or the model's tower is no plain ViT of one picture size.
    """
    if not 0 < share <= 1:
        raise PruneZooError(f"--share {share}: it lies in (0, 1]")
    config, _ = load_config(vlm)
    tokens = getattr(config, "image_seq_length", None)
    if not tokens or not hasattr(config.vision_config, "intermediate_size"):
        raise PruneZooError(f"{vlm}: how many tokens its pictures have is not known beforehand; take `hand`")
    text, blocks = config.get_text_config(), blocks_of(config)
    costs = [tower_costs(config.vision_config, tokens)] * blocks
    costs += [layer_costs(text, tokens)] * text.num_hidden_layers
    counts = [max(round(tokens * one), 1) for one in precrop(costs, share * sum(costs))]
    named = f"precrop of {vlm}, share {share:.4g}"
    return (
        Schedule("vision", tokens, tuple(counts[:blocks]), named),
        Schedule("layer", tokens, tuple(counts[blocks:]), named),
    )


def read_trained(name: str) -> Schedule:
    """What a pruner has learned.

    Raises:
        PruneZooError: It learns no schedule, or is not trained.
    """
    pruner = load_pruner(find_pruner(name))
    if not isinstance(pruner, DiffRate):
        raise PruneZooError(f"'{name}' learns no schedule: give a trained diffrate")
    return pruner.as_schedule()


def make_own(name: str, vlm: str, keep: str) -> Schedule:
    """What a method does by itself at a budget on a model, for others to take.

    Args:
        name: of a method of the vision or layer stage, with its options.
        vlm: As `load_config` takes it.
        keep: Tokens or a share.

    Raises:
        PruneZooError: The method has no such places, or the model's pictures have no known size.
    """
    pruner = load_pruner(find_pruner(name))
    if pruner.stage not in PLACES:
        raise PruneZooError(f"'{name}' acts once, at the {pruner.stage} stage: name one of the vision or layer stage")
    config, _ = load_config(vlm)
    tokens = getattr(config, "image_seq_length", None)
    if not tokens:
        raise PruneZooError(f"{vlm}: how many tokens its pictures have is not known beforehand; take `hand`")
    depth = blocks_of(config) if pruner.stage == "vision" else config.get_text_config().num_hidden_layers
    asked, found = torch.tensor(counts_of(parse_budget(keep).keep, (tokens,))), torch.tensor([tokens])
    left = dict(zip(pruner.stages(depth), map(int, pruner.steps(asked, found, depth)), strict=True))
    counts, now = [], tokens
    for place in range(depth):
        now = min(now, left.get(place, now))  # one that only looks leaves what it finds
        counts.append(now)
    return Schedule(pruner.stage, tokens, tuple(counts), f"{pruner.name} at {keep}")


def write(schedule: Schedule, path: Path) -> None:
    """Save it, whole or not at all."""
    with whole_file(path) as scratch:
        schedule.save(scratch)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    p = argparse.ArgumentParser(prog="python -m trainers.schedule", description="Make and show schedules of tokens.")
    tasks = p.add_subparsers(dest="task", required=True)
    closed = tasks.add_parser("precrop", help="the closed form of PreCrop, from costs alone")
    add_option(closed, "vlm", required=True)
    closed.add_argument("--share", required=True, type=Fraction, help="of their operations, as 0.5 or 1/2")
    closed.add_argument("--vision", type=Path, help="file for the vision blocks")
    closed.add_argument("--layer", type=Path, help="file for the decoder layers")
    hand = tasks.add_parser("hand", help="counts as they are given")
    hand.add_argument("--stage", required=True, choices=PLACES)
    hand.add_argument("--available", required=True, type=int, help="tokens of the picture that they are for")
    hand.add_argument("--counts", required=True, type=int, nargs="+", help="one for each block or layer")
    hand.add_argument("--out", required=True, type=Path)
    read = tasks.add_parser("read", help="what a trained `diffrate` has learned")
    read.add_argument("folder", help="its folder or Hub id")
    read.add_argument("--out", required=True, type=Path)
    own = tasks.add_parser("of", help="what a method with several places does by itself")
    own.add_argument("method", help="with its options, as 'vflowopt?options=runs/search/options.json'")
    add_option(own, "vlm", required=True)
    add_option(own, "keep", nargs=None, required=True)
    own.add_argument("--out", required=True, type=Path)
    show = tasks.add_parser("show", help="print one")
    show.add_argument("file", type=Path)
    args = p.parse_args(argv)
    made: list[tuple[Schedule, Path | None]]
    if args.task == "precrop":
        pair = make_precrop(find_vlm(args.vlm), float(args.share))
        made = list(zip(pair, (args.vision, args.layer), strict=True))
    elif args.task == "hand":
        made = [(Schedule(args.stage, args.available, tuple(args.counts)), args.out)]
    elif args.task == "read":
        made = [(read_trained(args.folder), args.out)]
    elif args.task == "of":
        made = [(make_own(args.method, find_vlm(args.vlm), args.keep), args.out)]
    else:
        made = [(Schedule.load(args.file), None)]
    console = Terminal(width=None if sys.stdout.isatty() else 132)
    for schedule, path in made:
        console.print(f"{PLACES[schedule.stage]}, of {schedule.available} tokens, by {schedule.made_by}:")
        console.print("  " + " ".join(map(str, schedule.counts)))
        if path is not None:
            write(schedule, path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
