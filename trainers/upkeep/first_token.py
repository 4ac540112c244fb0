"""Measure the time to the first token at Qwen-VL's proportions: bare, prompt stage, input stage, and smaller pictures.

    python -m trainers.upkeep.first_token [--repeats 5] [--threads 1] [--json F]

Of Qwen2-VL's make, with random weights, since how long a model takes does not depend on them: the tower takes most of
the time, and no stage behind it can win that back. The rival of the input stage is a picture with as many tokens from
the start (`max_pixels` of the processor), which needs no code at all and sees the whole scene less sharply. Time runs
from the processor's output to the first new token; of the process, on a CPU, so that other work on the machine does not
count. All ways run in turns; each is a ratio against the bare model of its own turn.
"""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from rich.table import Table
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from prunezoo.core.registry import build_pruner
from prunezoo.host import attach
from trainers.cli.errors import check_output, command
from trainers.cli.options import add_option, check_at_least_one
from trainers.cli.terminal import Terminal
from trainers.evaluation.record import versions, write_record
from trainers.upkeep.step_cost import clock_of

PATCH, START, END, IMAGE, VIDEO, WORDS = 14, 1, 2, 3, 4, 33
SIZES = {
    # width and depth of tower and language model, rows and columns of patches
    "98m": (768, 12, 768, 12, (32, 32)),
    "tiny": (32, 2, 32, 2, (8, 8)),
}
SHARES = ("1/2", "1/4")


def build(size: str) -> Any:
    """A model of random weights."""
    wide, deep, width, depth, _ = SIZES[size]
    heads = max(width // 64, 1)
    text = {
        "vocab_size": 8192, "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth,
        "num_attention_heads": heads, "num_key_value_heads": heads, "pad_token_id": 0, "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "mrope_section": _sections(width // heads)},
    }  # fmt: skip
    vision = {
        "depth": deep, "embed_dim": wide, "hidden_size": width, "num_heads": max(wide // 64, 1), "mlp_ratio": 4,
        "patch_size": PATCH,
    }  # fmt: skip
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=START, vision_end_token_id=END,
    )  # fmt: skip
    torch.manual_seed(0)
    vlm = Qwen2VLForConditionalGeneration(config).eval()
    vlm.generation_config.eos_token_id = None
    return vlm


def _sections(head: int) -> list[int]:
    """How a head's frequencies are dealt out over time, height and width."""
    each = (head // 2 - head // 8) // 2
    return [head // 2 - 2 * each, each, each]


def request(rows: int, columns: int) -> dict[str, torch.Tensor]:
    """A processor's output for a picture of so many patches, and a prompt of 33 words."""
    random = torch.Generator().manual_seed(0)
    frame = torch.randn(rows * columns, 3, 1, PATCH, PATCH, generator=random)
    words = torch.randint(10, 8000, (WORDS,), generator=random).tolist()
    ids = torch.tensor([[START, *[IMAGE] * (rows * columns // 4), END, *words]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": frame.expand(-1, -1, 2, -1, -1).flatten(1),
        "image_grid_thw": torch.tensor([[1, rows, columns]]),
        "mm_token_type_ids": (ids == IMAGE).long(),
    }


def ways(rows: int, columns: int) -> dict[str, tuple[str | None, str, tuple[int, int]]]:
    """What is compared: a pruner or none, what it keeps, and the picture."""
    whole = (rows, columns)
    found: dict[str, tuple[str | None, str, tuple[int, int]]] = {"bare": (None, "1", whole)}
    found |= {f"prompt stage, {share}": ("uniform", share, whole) for share in SHARES}
    found["input stage, all kept"] = ("random_input", "1.0", whole)
    found["input stage, PixelPrune on noise"] = ("pixelprune", "auto", whole)
    found |= {f"input stage, {share}": ("random_input", share, whole) for share in SHARES}
    found["smaller picture, 1/2"] = (None, "1", (rows // 2, columns))
    found["smaller picture, 1/4"] = (None, "1", (rows // 2, columns // 2))
    return found


def timed(vlm: Any, pruner: str | None, keep: str, picture: tuple[int, int], clock: Callable[[], float]) -> list[float]:
    """Seconds to the first token, and in the tower."""
    batch, marks = request(*picture), []
    visual = vlm.model.visual
    handles = [
        visual.register_forward_pre_hook(lambda *_: marks.append(clock())),
        visual.register_forward_hook(lambda *_: marks.append(clock())),
    ]
    try:
        with nullcontext() if pruner is None else attach(vlm, build_pruner(pruner).eval(), keep):
            begin = clock()
            vlm.generate(**batch, max_new_tokens=1, do_sample=False)
            end = clock()
    finally:
        for handle in handles:
            handle.remove()
    (entered, left) = marks
    return [end - begin, left - entered]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All numbers."""
    torch.set_num_threads(args.threads)
    vlm, compared = build(args.size).to(args.device), ways(*SIZES[args.size][-1])
    clock = clock_of(vlm.device)
    found: dict[str, list[list[float]]] = {name: [] for name in compared}
    for turn in range(args.repeats + 1):
        for name, (pruner, keep, picture) in compared.items():
            seconds = timed(vlm, pruner, keep, picture, clock)
            if turn:  # the first one only warms up
                found[name].append(seconds)
    rows = []
    for name, (pruner, keep, (high, wide)) in compared.items():
        row: dict[str, Any] = {"way": name, "pruner": pruner, "keep": keep, "patches": high * wide}
        for place, part in enumerate(("first_token", "tower")):
            own = [seconds[place] for seconds in found[name]]
            ratios = [bare[place] / seconds for bare, seconds in zip(found["bare"], own, strict=True)]
            row[part] = {"seconds": median(own), "times": median(ratios), "low": min(ratios), "high": max(ratios)}
        rows.append(row)
    visual = vlm.model.visual
    weights = {"tower": visual, "language": vlm.model.language_model}
    return {
        "size": args.size,
        "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in weights.items()},
        "words": WORDS,
        "threads": args.threads,
        "repeats": args.repeats,
        "rows": rows,
    }


def show(found: dict[str, Any]) -> Table:
    """The table."""
    tower, language = (found["parameters"][name] / 1e6 for name in ("tower", "language"))
    table = Table(title=f"first token, tower of {tower:.0f} M and language model of {language:.0f} M parameters")
    for column in ("", "patches", "seconds", "times bare", "lowest–highest", "tower, times bare"):
        table.add_column(column, justify="right" if column else "left")
    for row in found["rows"]:
        first, inside = row["first_token"], row["tower"]
        spread = f"{first['low']:.2f}–{first['high']:.2f}"
        numbers = (str(row["patches"]), f"{first['seconds']:.2f}", f"{first['times']:.2f}", spread)
        table.add_row(row["way"], *numbers, f"{inside['times']:.2f}")
    return table


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    argv = sys.argv[1:] if argv is None else list(argv)
    p = argparse.ArgumentParser(
        prog="python -m trainers.upkeep.first_token", description="Measure the time to the first token."
    )
    p.add_argument("--size", choices=SIZES, default="98m", help="of the tower, about that of the language model")
    p.add_argument("--repeats", type=int, default=5, help="turns that are measured, behind one that warms up")
    p.add_argument("--threads", type=int, default=1, help="of the CPU")
    for name in ("device", "json"):
        add_option(p, name)
    args = p.parse_args(argv)
    check_at_least_one(args, "repeats", "threads")
    check_output("--json", args.json)
    args.device = args.device or "cpu"
    found = measure(args)
    if args.json:
        line = shlex.join(["python", "-m", "trainers.upkeep.first_token", *argv])
        write_record({"command": line, "versions": versions(), **found}, args.json)
    Terminal().print(show(found))


if __name__ == "__main__":
    main()
