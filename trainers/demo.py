"""What `make demo` runs: train a pruner on the embedded model, measure it beside its rivals, use it.

    python -m trainers.demo [--out runs/demo] [--steps N] [--limit N]

Training and measuring are the ordinary commands, printed as they run, so that they can be typed again with other
settings.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from prunezoo import AutoPruner, Pruner, PruneZooError, attach
from trainers.cli.errors import check_output, command
from trainers.cli.lock import hold
from trainers.cli.options import add_option, check_at_least_one
from trainers.data.conversation import ConversationCollator
from trainers.data.suite import Item, load_suite
from trainers.evaluation.budgets import parse_budget
from trainers.evaluation.loading import load_vlm
from trainers.evaluation.methods import RIVALS
from trainers.evaluation.record import MEAN, read_record, select

CONFIG = "configs/ppm_tiny.yaml"
VLM = "checkpoints/tiny-llava"
SUITE = "scenes"
KEEP = "1/9"
STEPS, ITEMS = 300, 1400  # 3.5 and 0.6 minutes on two CPU cores
ASKED = ("attribute", "reading", "dialogue")  # the first test item of each, whatever the answer turns out to be


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m trainers.demo", description="Train, measure and use a small pruner.")
    p.add_argument("--out", type=Path, default=Path("runs/demo"), help="where everything is written")
    p.add_argument("--steps", type=int, default=STEPS, help="training steps")
    add_option(p, "limit", default=ITEMS, help="questions of the test split to measure on")
    return p


def run_part(console: Console, title: str, words: Sequence[str]) -> None:
    """Run one command of the repository, shown as it would be typed.

    Raises:
        PruneZooError: it failed; why stands above.
    """
    console.rule(f"[bold]{title}")
    console.print(f"$ {shlex.join(['python', *words])}", style="cyan", soft_wrap=True, highlight=False)
    # tables are made for a wide terminal; where there is none, rich would take 80 columns
    environment = {"COLUMNS": str(max(console.width, 140)), **os.environ} if not console.is_terminal else None
    begun = time.monotonic()
    code = subprocess.run([sys.executable, *words], env=environment, check=False).returncode  # noqa: S603 - our own
    if code:
        raise PruneZooError(f"{words[1]} ended with code {code}; its own message stands above")
    console.print(f"{title}: {time.monotonic() - begun:.0f} s", style="dim")


def verdict(record: Mapping[str, Any], pruner: str) -> str:
    """Whether the pruner is above every rival at the budget, as a line of rich text.

    Args:
        record: what `trainers.evaluate --json` wrote.
        pruner: the trained pruner, as named there.
    """
    mean = {row["pruner"]: row["retention"] for row in select(record, keep=KEEP, group=MEAN)}
    own, rivals = mean[pruner], {name: mean[name] for name in RIVALS}
    if own is None:
        return "[bold red]No comparison:[/] the full model answers nothing in some group of so few questions."
    best = max(rivals, key=lambda name: rivals[name])
    gap = own - rivals[best]
    pairs = {row["rival"]: row for row in record["paired"] if row["pruner"] == pruner}
    low, high = pairs[best]["ci"]
    if own <= rivals[best]:
        said = "[bold red]The freshly trained PPM is NOT above every rival:[/]"
    elif all(pairs[name]["ci"][0] > 0 for name in RIVALS):
        said = "[bold green]The freshly trained PPM is above every rival:[/]"
    else:
        said = "[bold yellow]The freshly trained PPM is above every rival, but an interval reaches 0:[/]"
    return (
        f"{said} mean retention {own:.1f} % at {KEEP} of the image tokens; the best rival, {best}, has "
        f"{rivals[best]:.1f} %: {gap:+.1f} points (95 % interval {low:+.1f} to {high:+.1f}, {record['n']} questions)."
    )


@torch.no_grad()
def answer(vlm: Any, processor: Any, item: Item) -> str:
    """What the model writes when asked; `generate` is called as ever, pruner or not."""
    batch = ConversationCollator(processor, answers=False)([item])
    batch = {name: value.to(vlm.device) for name, value in batch.items()}
    ids = vlm.generate(**batch, max_new_tokens=8, do_sample=False)
    return processor.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()


def ask(console: Console, vlm_source: str, pruner: Pruner, pictures: Path) -> None:
    """Answer sample questions with all tokens and with few, through the library as anybody would use it.

    Args:
        console: where the table is printed.
        vlm_source: folder of the model.
        pruner: the pruner.
        pictures: folder in which the pictures are left.
    """
    console.rule("[bold]Three questions, with all image tokens and with few")
    console.print(
        "pruner = AutoPruner.from_pretrained(folder)\n"
        f"with attach(vlm, pruner, keep={KEEP}) as run:\n"
        '    vlm.generate(**processor(images=image, text=prompt, return_tensors="pt"))\n',
        style="cyan",
        highlight=False,
    )
    vlm, processor = load_vlm(vlm_source)
    suite = load_suite(SUITE, "test")
    table = Table("picture", "question", "reference", "all tokens", f"{KEEP} of them", "image tokens")
    for group in ASKED:
        item = next(item for item in suite if item.group == group)
        picture = pictures / f"{group}.png"
        pictures.mkdir(parents=True, exist_ok=True)
        item.image.save(picture)
        full = answer(vlm, processor, item)
        with attach(vlm, pruner, keep=parse_budget(KEEP).keep) as run:
            pruned = answer(vlm, processor, item)
        history = "".join(f"{question} {said}. " for question, said in item.turns[:-1])
        tokens = f"{run.stats.before[0]} -> {run.stats.after[0]}"
        table.add_row(str(picture), history + item.question, item.answer, full, pruned, tokens)
    console.print(table)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; the exit code is 0 when all parts ran, whoever came out above."""
    args = parser().parse_args(argv)
    check_at_least_one(args, "steps", "limit")
    check_output("--out", args.out, folder=True)
    hold("--out", args.out, folder=True)
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    begun = time.monotonic()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"a CPU ({os.cpu_count()} cores)"
    console.print(f"[bold]prunezoo demo[/] on {device}: a pruner learns which image tokens of {VLM} are worth reading.")
    out, folder = args.out, str(args.out / "ppm")
    run_part(console, "Training", fit_words(args.steps, folder))
    run_part(console, "Measuring", evaluate_words(args.limit, folder, out))
    console.print(verdict(read_record(out / "evaluation.json"), folder), highlight=False)
    ask(console, VLM, AutoPruner.from_pretrained(folder), out / "questions")
    console.rule("[bold]Where everything is")
    console.print(f"pruner  {folder}  (config.json, model.safetensors, README.md)", highlight=False)
    console.print(f"report  {out / 'report' / 'index.html'}  (curves, and pictures of what is kept)", highlight=False)
    console.print(f"numbers {out / 'evaluation.json'}", highlight=False)
    console.print(f"The demo took {(time.monotonic() - begun) / 60:.1f} minutes.", highlight=False)
    return 0


def fit_words(steps: int, folder: str) -> list[str]:
    """The training command: the embedded recipe, shorter."""
    words = ["-m", "trainers.fit", "--config", CONFIG, f"--out={folder}", f"--trainer.max_steps={steps}"]
    return [*words, f"--trainer.val_check_interval={steps}"]  # measured once, at the end


def evaluate_words(limit: int, folder: str, out: Path) -> list[str]:
    """The measuring command."""
    words = ["-m", "trainers.evaluate", "--vlm", VLM, "--pruner", folder, "--rivals", "--keep", KEEP]
    words += ["--suite", SUITE, "--limit", str(limit), "--json", str(out / "evaluation.json")]
    return [*words, "--report", str(out / "report"), "--card", folder]


if __name__ == "__main__":
    raise SystemExit(main())
