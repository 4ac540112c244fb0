"""How long a vision tower takes under methods that act inside it, beside what its operations would have it be.

    python -m trainers.upkeep.tower_time --vlm random:llava-120m --keep 1/2 --json hub_cards/tower/time.json

Bare tower and method run in turns, within one process; what the method computes itself counts. Times on a CPU are
those of the process, so that other work on the machine counts as little as can be. The ideal is the ratio of the
operations of all blocks that run, the unread ones too, and of the patch embedding.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from prunezoo.core.budgets import counts_of
from prunezoo.core.contract import Pruner
from prunezoo.core.errors import PruneZooError
from prunezoo.host import Encoded, encode
from prunezoo.host.families import find_family
from prunezoo.host.parts.tower import Tower
from prunezoo.host.stages.cut import Timer
from prunezoo.host.stages.vision import VisionStage
from trainers.benchmarking.models import Request, load_for_timing, load_model
from trainers.cli.errors import check_output, command
from trainers.cli.names import find_vlm
from trainers.cli.options import add_option, check_at_least_one
from trainers.cli.terminal import Terminal
from trainers.evaluation.budgets import parse_budget
from trainers.evaluation.flops import tower_flops
from trainers.evaluation.loading import device_name
from trainers.evaluation.record import versions, write_record
from trainers.evaluation.tables import WIDE

METHODS = ("tome", "gtp", "zero_tprune", "spatten", "token_transforming", "flowcut", "eet", "diffrate", "a_clip")
LENGTH = 24
"""Words of the prompt, which no tower reads."""


def seconds(device: torch.device) -> float:
    """Of the process on a CPU; of the clock, when all is done, elsewhere."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def work_of(tower: Tower, blocks: Tensor) -> int:
    """Operations on one picture, of which the blocks that are read had ``blocks (depth, 2)`` patches."""
    behind = blocks[-1:, 1:].expand(len(tower.blocks) - tower.depth, 2)
    embedding = 2 * tower.patch_embedding.weight.numel() * int(blocks[0, 0])
    return tower_flops(tower.model.config, torch.cat([blocks, behind])) + embedding


def run_tower(tower: Tower, pixels: Tensor) -> None:
    """All of it, as the model calls it."""
    tower.model(pixels, output_hidden_states=True)


def run_shortened(tower: Tower, pixels: Tensor, encoded: Encoded, pruner: Pruner, counts: tuple[int, ...]) -> Tensor:
    """The same under a pruner: ``(depth, 2)`` patches in attention and MLP of each block that is read."""
    with VisionStage(tower, pruner, encoded.inputs, counts, Timer(pixels.device)) as stage:
        states = tower.model(pixels, output_hidden_states=True).hidden_states[tower.layers[-1]]
    blocks = stage.output(states[:, tower.prefix :]).blocks
    assert blocks is not None  # always said in this stage
    return blocks[0]


def measure(
    bare: Callable[[], None], shortened: Callable[[], Tensor], device: torch.device, repeats: int
) -> tuple[list[float], Tensor]:
    """The bare tower's time over the other's, pair by pair, in turns; and what its blocks read."""
    ratios, blocks = [], shortened()
    bare()
    for pair in range(repeats):
        took = {}
        for call in (bare, shortened)[:: 1 if pair % 2 else -1]:
            start = seconds(device)
            call()
            took[call] = seconds(device) - start
        ratios.append(took[bare] / took[shortened])
    return ratios, blocks


@torch.no_grad()
def run(args: argparse.Namespace, command_line: str) -> None:
    """Measure, write, print."""
    check_output("--json", args.json)
    check_at_least_one(args, "repeats", "batch")
    budget = parse_budget(args.keep)
    vlm, processor = load_model(find_vlm(args.vlm), None, None)
    tower = find_family(vlm).tower()
    if tower.joined is not None:
        raise PruneZooError(f"--vlm {args.vlm}: this is for plain towers, and {tower.joined}")
    request = Request(vlm, processor, args.batch, LENGTH, (args.side, args.side))()
    encoded, pixels = encode(vlm, request, run_tower=False), request["pixel_values"]
    counts = counts_of(budget.keep, encoded.inputs.counts)
    whole = torch.tensor(encoded.inputs.counts[:1])[:, None].expand(tower.depth, 2)
    rows: list[dict[str, Any]] = []
    table = Table("method", "keep", "measured", "quartiles", "ideal", "measured of ideal")
    for name in args.pruner:
        pruner = load_for_timing(name, vlm.config.get_text_config().hidden_size)
        ratios, blocks = measure(
            lambda: run_tower(tower, pixels),
            lambda pruner=pruner: run_shortened(tower, pixels, encoded, pruner, counts),  # type: ignore[misc]
            pixels.device, args.repeats,
        )  # fmt: skip
        low, middle, high = (float(value) for value in np.quantile(ratios, (0.25, 0.5, 0.75)))
        ideal = work_of(tower, whole) / work_of(tower, blocks)
        row = {"pruner": name, "keep": budget.label, "measured": middle, "quartiles": [low, high], "ideal": ideal}
        rows.append({**row, "of_ideal": middle / ideal, "repeats": args.repeats, "blocks": blocks.tolist()})
        table.add_row(
            name, budget.label, f"{middle:.2f}", f"{low:.2f}–{high:.2f}", f"{ideal:.2f}", f"{middle / ideal:.0%}"
        )
    header = {"vlm": args.vlm, "command": command_line, "device": device_name(vlm.device), "batch": args.batch}
    if args.json:
        write_record({**header, "versions": versions(), "rows": rows}, args.json)
    Terminal(width=None if sys.stdout.isatty() else WIDE).print(table)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    p = argparse.ArgumentParser(
        prog="python -m trainers.upkeep.tower_time", description="Time of a tower under methods inside it."
    )
    add_option(p, "vlm", default="random:llava-120m")
    add_option(p, "pruner", default=list(METHODS), help="methods of the vision stage")
    add_option(p, "keep", nargs=None, default="1/2", help="tokens that the tower leaves")
    add_option(p, "batch")
    p.add_argument("--side", type=int, default=336, help="of the pictures, in pixels")
    p.add_argument("--repeats", type=int, default=9, help="pairs")
    add_option(p, "json")
    args = p.parse_args(argv)
    words = ["python", "-m", "trainers.upkeep.tower_time", *(sys.argv[1:] if argv is None else argv)]
    run(args, shlex.join(words))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
