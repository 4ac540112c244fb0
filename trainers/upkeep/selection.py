"""Measure how long greedy methods take to choose 1/9 of the tokens, beside plain loops of the same arithmetic.

    python -m trainers.upkeep.selection [--tokens 576 2880] [--batch 1 16] [--repeats 5] [--json F]

A plain loop (`plain.py`) goes over one picture after another and works out its criterion anew in each step. It is timed
on one picture, whatever the batch: so many pictures take so many times as long. Pruner and loop run in turns, on made
up tokens that stand in groups, as those of pictures do; what both choose is checked to be the same. On a CPU times are
those of the process, so that other work on the machine counts little. The prefill of `--vlm` (the language model on all
tokens, without the tower) stands beside them.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from prunezoo.core.contract import PruneInputs
from prunezoo.core.errors import PruneZooError
from prunezoo.core.registry import load_pruner
from trainers.benchmarking.models import load_model
from trainers.cli.errors import check_output, command
from trainers.cli.names import find_vlm
from trainers.cli.options import add_option, check_at_least_one
from trainers.cli.terminal import Terminal
from trainers.evaluation.loading import device_name
from trainers.evaluation.record import versions, write_record

from .plain import LOOPS
from .step_cost import clock_of

WORDS, GROUPS = 24, 60
"""Words of the prompt; groups of tokens that are alike."""


def made_up(batch: int, tokens: int, width: int, device: torch.device, seed: int = 0) -> PruneInputs:
    """Pictures of so many tokens, in groups, with all that the methods ask for."""
    random = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, device=device)

    def grouped() -> Tensor:
        group = torch.randint(GROUPS, (batch, tokens, 1), generator=random, device=device)
        return normal(batch, GROUPS, width).gather(1, group.expand(-1, -1, width)) + 0.7 * normal(batch, tokens, width)

    heads = (2 * normal(batch, tokens, 8)).softmax(1)
    signals = {"vision_states": grouped(), "cls_head_attention": heads, "cls_attention": heads.mean(2)}
    valid, text_valid = (torch.ones(batch, n, dtype=torch.bool, device=device) for n in (tokens, WORDS))
    cells = torch.zeros(batch, tokens, 3, dtype=torch.long)
    return PruneInputs(
        grouped(), valid, cells.to(device), normal(batch, WORDS, width), text_valid, signals,
        known=(tokens,) * batch, host_cells=cells.numpy(),
    )  # fmt: skip


def first_of(inputs: PruneInputs) -> PruneInputs:
    """The first picture."""
    assert inputs.text is not None and inputs.text_valid is not None
    signals = {name: values[:1] for name, values in inputs.signals.items()}
    return PruneInputs(
        inputs.features[:1], inputs.valid[:1], inputs.cells[:1], inputs.text[:1], inputs.text_valid[:1], signals
    )


@torch.no_grad()
def measure(
    name: str, inputs: PruneInputs, keep: int, repeats: int, clock: Callable[[], float]
) -> tuple[list[float], list[float]]:
    """Seconds of a pruner for the batch, and of its plain loop for as many pictures, in turns.

    Raises:
        PruneZooError: They choose differently.
    """
    pruner, loop, first = load_pruner(name), LOOPS[name], first_of(inputs)
    if sorted(loop(first, keep)) != pruner(inputs, keep).index[0].tolist():  # and both are warm
        raise PruneZooError(f"'{name}' and its plain loop choose differently: the times would not be of the same work")
    own: list[float] = []
    plain: list[float] = []
    for _ in range(repeats):
        begin = clock()
        pruner(inputs, keep)
        middle = clock()
        loop(first, keep)
        own.append(middle - begin)
        plain.append((clock() - middle) * len(inputs.valid))
    return own, plain


@torch.no_grad()
def prefill(decoder: Any, inputs: PruneInputs, repeats: int, clock: Callable[[], float]) -> float:
    """Seconds of the language model on all tokens and words of the batch."""
    assert inputs.text is not None
    embeddings = torch.cat([inputs.features, inputs.text], 1).to(decoder.dtype)
    seconds = []
    for _ in range(repeats):
        begin = clock()
        decoder(inputs_embeds=embeddings)
        seconds.append(clock() - begin)
    return median(seconds)


def measure_all(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """All numbers."""
    vlm, _ = load_model(args.vlm, args.device, args.dtype)
    decoder, device = vlm.model.language_model, vlm.device
    width, clock, rows = vlm.config.get_text_config().hidden_size, clock_of(device), []
    for tokens in args.tokens:
        keep = max(1, round(tokens / 9))
        for batch in args.batch:
            inputs = made_up(batch, tokens, width, device)
            whole = prefill(decoder, inputs, min(args.repeats, 2), clock)
            for name in LOOPS:
                own, plain = measure(name, inputs, keep, args.repeats, clock)
                ratios = [slow / fast for slow, fast in zip(plain, own, strict=True)]
                rows.append(
                    {
                        "pruner": name, "tokens": tokens, "kept": keep, "batch": batch, "seconds": median(own),
                        "plain_s": median(plain), "ratio": median(ratios), "spread": [min(ratios), max(ratios)],
                        "prefill_s": whole, "share_of_prefill": median(own) / whole,
                    }
                )  # fmt: skip
                console.print(f"{name}, {tokens} tokens, batch {batch}: {rows[-1]['ratio']:.1f} times as fast")
    return {"width": width, "device": device_name(device), "dtype": "float32", "rows": rows}


def show(found: dict[str, Any], console: Console) -> None:
    """The table."""
    table = Table(title=f"choosing 1/9 of the tokens on {found['device']}, {found['width']} wide")
    for column in ("method", "tokens", "batch", "seconds", "plain loop", "times as fast", "of a prefill"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in found["rows"]:
        table.add_row(
            row["pruner"], str(row["tokens"]), str(row["batch"]), f"{row['seconds']:.4f}", f"{row['plain_s']:.4f}",
            f"{row['ratio']:.1f}", f"{row['share_of_prefill']:.1%}",
        )  # fmt: skip
    console.print(table)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    argv = sys.argv[1:] if argv is None else list(argv)
    p = argparse.ArgumentParser(
        prog="python -m trainers.upkeep.selection", description="Measure how long greedy methods take to choose."
    )
    add_option(p, "vlm", default="random:llava-120m", help="whose width and prefill: random:llava-120m or another")
    p.add_argument("--tokens", type=int, nargs="+", default=[576, 2880], help="image tokens of a picture")
    add_option(p, "batch", nargs="+", default=[1, 16])
    p.add_argument("--repeats", type=int, default=5, help="times that each is measured")
    for name in ("device", "dtype", "json"):
        add_option(p, name)
    args = p.parse_args(argv)
    check_at_least_one(args, "tokens", "batch", "repeats")
    check_output("--json", args.json)
    args.vlm = find_vlm(args.vlm)
    console = Terminal()
    found = measure_all(args, console)
    if args.json:
        line = shlex.join(["python", "-m", "trainers.upkeep.selection", *argv])
        write_record({"vlm": args.vlm, "command": line, "versions": versions(), **found}, args.json)
    show(found, console)


if __name__ == "__main__":
    main()
