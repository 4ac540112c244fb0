"""Measure pruners on a GPU: parity with the CPU, speed at the shapes of known models, host stalls, a step of training.

    python -m trainers.upkeep.gpu [--minutes 9] [--pruner P …]      writes hub_cards/gpu/DEVICE.json
    python -m trainers.upkeep.gpu --device cpu --tiny --json F      the same code on tiny models, anywhere

No network, and nothing beyond the repository: weights are random, since times do not depend on them. Each part has its
share of the time; what did not fit is listed as not run, and after each part the record is written. Where there is no
GPU the command says so and leaves the last figures as they are.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from prunezoo.core.base_model import BaseModel
from prunezoo.core.config import fit_width
from prunezoo.core.contract import Pruner
from prunezoo.core.errors import PruneZooError
from prunezoo.core.prefill import Prefill
from prunezoo.core.registry import build_pruner, split_options
from prunezoo.host import attach
from trainers.benchmarking.gpu_table import GPUS
from trainers.benchmarking.measure import BARE, Setting, cases_of
from trainers.benchmarking.parity import KINDS, parity, stalls
from trainers.benchmarking.shapes import SHAPES, MadeUp, Shape
from trainers.cli.errors import check_output, command
from trainers.cli.options import add_option
from trainers.cli.recipes import load_yaml
from trainers.cli.terminal import Terminal
from trainers.evaluation.budgets import parse_budgets
from trainers.evaluation.loading import device_name
from trainers.evaluation.record import versions, write_record
from trainers.planning.job import Job, plan
from trainers.planning.models import load_config
from trainers.upkeep import step_cost
from trainers.upkeep.support import ROOT

RECIPE = ROOT / "configs" / "ppm_llava.yaml"
WORDS = 24
FEW = ("divprune", "ppm")
"""Pruners that are measured at every batch, length and budget."""
SHARES = {
    "parity": 0.15,
    "stalls": 0.05,
    SHAPES[0].name: 0.4,
    SHAPES[1].name: 0.14,
    SHAPES[2].name: 0.06,
    "training": 0.2,
}
"""Of the time, by part; what one leaves goes to the next."""


class TimeUp(Exception):
    """The time of a part is over."""


class Part:
    """One part, with its time.

    Args:
        seconds: That it may take.
        device: By its name.
        tiny: Tiny models.
        pruners: As on the command line.
    """

    def __init__(self, seconds: float, device: str, tiny: bool, pruners: Sequence[str]) -> None:
        self.ends = time.monotonic() + seconds
        self.device, self.tiny, self.pruners = device, tiny, pruners
        self.dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        self.rows: list[dict[str, Any]] = []
        self.not_run: list[str] = []  # for want of time
        self.refused: dict[str, str] = {}  # pruners that a shape cannot have, and why

    def tick(self) -> None:
        """Raise TimeUp where the time is over."""
        if time.monotonic() > self.ends:
            raise TimeUp

    def model(self, shape: Shape) -> Any:
        """The model of a shape, in its size."""
        return shape.build(self.tiny, self.device, self.dtype)

    def fitting(self, vlm: Any, shape: Shape) -> list[tuple[str, Pruner]]:
        """The pruners that the model can have."""
        found = []
        for name in self.pruners:
            try:
                pruner = built(name, vlm)
                with attach(vlm, pruner, 0.5), torch.no_grad():
                    vlm(**MadeUp(vlm, shape, 1, shape.unit[self.tiny], WORDS)())
                found.append((name, pruner))
            except PruneZooError as error:
                self.refused[name] = " ".join(str(error).split())
        return found


def built(name: str, vlm: Any) -> Pruner:
    """An untrained pruner by its name, perhaps with options, for a model, on its device and in its type."""
    method, options = split_options(name)
    select = options.pop("select", None)
    pruner = build_pruner(str(method), **options)
    model = BaseModel.describe(vlm)
    pruner = fit_width(pruner, model.width, model.tower_width, Prefill.of(vlm.config))
    if select is not None:
        pruner.select = select
    return pruner.to(vlm.device, vlm.dtype).eval()


def settings_of(tiny: bool) -> Iterator[tuple[int, int, tuple[str, ...], int, bool]]:
    """Batch, image tokens, budgets, new tokens, and whether all pruners are measured; what matters most comes first."""
    first, *longer = (16, 32) if tiny else (576, 1152, 2880)
    answer = 4 if tiny else 128
    yield 1, first, ("1/9",), 2, True
    yield 1, first, ("1/9",), answer, False
    for batch in (2,) if tiny else (8, 32):
        yield batch, first, ("1/9",), 2, False
    for length in longer:
        yield 1, length, ("1/9",), 2, False
    yield 1, first, ("1/3", "2/9", "1/18"), 2, False
    for batch in () if tiny else (8, 32):
        for length in longer:
            yield batch, length, ("1/9",), 2, False


def run_speed(part: Part, shape: Shape) -> None:
    """Tower, pruner, prefill, tokens and memory of one shape, in turns with the bare model."""
    vlm = part.model(shape)
    pruners = part.fitting(vlm, shape)
    text = vlm.config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    of_token = 2 * text.num_hidden_layers * text.num_key_value_heads * head * vlm.dtype.itemsize
    for batch, tokens, keeps, decode, everyone in settings_of(part.tiny):
        name = f"batch {batch}, {tokens} image tokens, keep {' '.join(keeps)}, {decode} new tokens"
        some = pruners if everyone else [(name, pruner) for name, pruner in pruners if name in FEW]
        cases = cases_of(some, parse_budgets(list(keeps)))
        setting = None
        try:
            part.tick()
            setting = Setting(vlm, MadeUp(vlm, shape, batch, tokens, WORDS), cases, decode, 2 if part.tiny else 5)
            setting.measure(part.tick)
        except TimeUp:  # what was timed of it is there
            part.not_run.append(name)
        except torch.OutOfMemoryError:
            setting, part.refused[name] = None, "out of memory"
        for row in setting.rows() if setting else []:
            kept = round(batch * (row["tokens"] + row["length"]) * of_token)
            part.rows.append({"image_tokens": tokens, "decode": decode, **row, "kv_bytes": kept})
    if part.rows:
        part.rows += list(break_even(part.rows))


def break_even(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The prompt at which a pruner has saved what it takes: its time against what a token less saves in the prefill,
    both from the first setting, and taken to be linear.
    """
    keys = ("decode", "batch", "image_tokens")
    first = [row for row in rows if all(row[key] == rows[0][key] for key in keys)]
    whole = {row["part"]: row for row in first if row["pruner"] == BARE}
    columns = rows[0]["image_tokens"] + rows[0]["length"]
    for row in first:
        if row["part"] == "pruner" and row["pruner"] != BARE and row["tokens"] < row["image_tokens"]:
            gone = 1 - (row["tokens"] + row["length"]) / columns
            saved = whole["prefill"]["median_s"] * gone / columns  # a token of the prompt
            length = row["median_s"] / saved
            yield {
                "pruner": row["pruner"],
                "keep": row["keep"],
                "part": "break_even",
                "tokens_of_prompt": round(length),
            }


def run_parity(part: Part) -> None:
    """See `benchmarking/parity.py`."""
    try:
        for row in parity(part.device, built, part.tick, KINDS[:1] if part.tiny else KINDS):
            part.rows.append(row)
    except TimeUp:
        part.not_run.append("the later cases")


def run_stalls(part: Part) -> None:
    """How often a prefill waits, on the tiny model of the first shape: waits hang on the code and not on sizes."""
    shape = SHAPES[0]
    vlm = shape.build(True, part.device, part.dtype)
    request = MadeUp(vlm, shape, 1, shape.unit[1], WORDS)
    cases: list[tuple[str, Pruner | None]] = [(BARE, None), *part.fitting(vlm, shape)]
    for place, (name, pruner) in enumerate(cases):
        try:
            part.tick()
        except TimeUp:
            part.not_run += [left for left, _ in cases[place:]]
            return
        part.rows.append({"pruner": name, "waits": stalls(vlm, request, pruner, 0.5)})


def run_training(part: Part) -> None:
    """A step of the recipe, its floor and memory, what `trainers.plan` says, and the hours that follow."""
    name = "tiny-llava" if part.tiny else "random:llava-7b"
    options = SimpleNamespace(
        vlm=str(ROOT / "checkpoints" / name) if part.tiny else name, device=part.device,
        dtype=str(part.dtype).removeprefix("torch."), batch=2 if part.tiny else 8, length=WORDS,
        hidden=32 if part.tiny else 512, repeats=2 if part.tiny else 5,
    )  # fmt: skip
    found = step_cost.measure(options)  # type: ignore[arg-type]
    config = load_config(options.vlm if part.tiny else "llava-hf/llava-1.5-7b-hf")[0]
    planned = plan(job_of(load_yaml(RECIPE.read_text("utf-8")), config, options), 1.0, None)
    step = found["floor_s"] * found["step_over_floor"]
    done = planned["flops_per_step"]["second stage"] / step  # operations a second, as measured
    memory = sum(planned["memory"].values())
    hours = planned["hours"] * 1e12 / done
    part.rows.append({"step_s": step, "planned_bytes": memory, "hours": hours, "steps": planned["steps"], **found})


def job_of(recipe: dict[str, Any], config: Any, options: SimpleNamespace) -> Job:
    """What `trainers.plan` makes of the recipe, on the model and batch at hand."""
    own, width = recipe["model"]["init_args"], config.get_text_config().hidden_size
    sizes = {"width": width, "hidden": options.hidden, "blocks": 4}
    pruner = {"class_path": own["pruner"]["class_path"], "init_args": {"config": sizes}}
    arguments = SimpleNamespace(
        vlm_dtype=options.dtype, guide=own["guide"], guide_share=own["guide_share"], guide_weight=0.0, recompute=False,
        pruner=SimpleNamespace(as_dict=lambda: pruner),
    )  # fmt: skip
    trainer = recipe["trainer"]
    parsed = SimpleNamespace(
        model=SimpleNamespace(init_args=arguments),
        data=SimpleNamespace(init_args=SimpleNamespace(batch_size=options.batch)),
        trainer=SimpleNamespace(
            max_steps=trainer["max_steps"], precision=trainer["precision"], strategy="auto", accumulate_grad_batches=1
        ),
    )  # fmt: skip
    image = config.image_seq_length
    return Job(parsed, config, 1, image + options.length, image)


def parts() -> dict[str, Callable[[Part], None]]:
    """What is measured, in this order."""
    speeds = {shape.name: (lambda part, shape=shape: run_speed(part, shape)) for shape in SHAPES}
    return {"parity": run_parity, "stalls": run_stalls, **speeds, "training": run_training}


def record_path(device: torch.device) -> Path:
    """Where the figures of a device are kept."""
    return GPUS / f"{'-'.join(device_name(device).lower().replace(',', ' ').split())}.json"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0 also where there is no GPU."""
    argv = sys.argv[1:] if argv is None else list(argv)
    p = argparse.ArgumentParser(prog="python -m trainers.upkeep.gpu", description="Measure pruners on a GPU.")
    add_option(p, "pruner", default=list(FEW), help="methods, the learned ones untrained")
    p.add_argument("--minutes", type=float, default=8.5, help="for everything")
    p.add_argument("--tiny", action="store_true", help="tiny models: to try the code out")
    p.add_argument("--part", nargs="+", choices=list(SHARES), default=list(SHARES))
    for name in ("device", "json"):
        add_option(p, name)
    args, console = p.parse_args(argv), Terminal()
    check_output("--json", args.json)
    if args.device is None and not torch.cuda.is_available():
        console.print("no GPU is at hand: nothing was measured, and the last figures stay as they are")
        return 0
    device = args.device or "cuda"
    path = args.json or record_path(torch.device(device))
    record: dict[str, Any] = {
        "device": device_name(torch.device(device)), "date": time.strftime("%Y-%m-%d"), "tiny": args.tiny,
        "command": shlex.join(["python", "-m", "trainers.upkeep.gpu", *argv]), "versions": versions(), "parts": {},
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    share = 60 * args.minutes / sum(SHARES[name] for name in args.part)
    ends = time.monotonic()
    for name in args.part:
        ends += share * SHARES[name]
        part = Part(ends - time.monotonic(), device, args.tiny, args.pruner)
        begun = time.monotonic()
        parts()[name](part)
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
        seconds = round(time.monotonic() - begun, 2)
        record["parts"][name] = {
            "seconds": seconds, "rows": part.rows, "not_run": part.not_run, "refused": part.refused
        }  # fmt: skip
        write_record(record, path)
        left_out = f", not run: {len(part.not_run)}" if part.not_run else ""
        console.print(f"{name}: {len(part.rows)} rows in {seconds:.0f} s{left_out}")
    console.print(f"numbers: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
