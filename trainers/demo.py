"""What `make demo` runs: train a pruner on the embedded model, measure it beside its rivals, use it.

    python -m trainers.demo [--out runs/demo] [--steps N] [--limit N]

Training and measuring are the ordinary commands, printed as they run, so that they can be typed again with other
settings.
"""

import argparse
import os
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from prunezoo import AutoPruner
from trainers.cli.errors import check_output, command
from trainers.cli.lock import hold
from trainers.cli.options import add_option, check_at_least_one
from trainers.cli.ours import run_ours
from trainers.cli.terminal import Terminal
from trainers.evaluation.demo import KEEP, SUITE, ask, verdict
from trainers.evaluation.record import read_record

CONFIG = "configs/ppm_tiny.yaml"
VLM = "checkpoints/tiny-llava"
STEPS, ITEMS = 300, 1400  # 3.5 and 0.6 minutes on two CPU cores


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
    console.rule(Text(title, style="bold"))
    console.print(f"$ {shlex.join(['python', *words])}", style="cyan", soft_wrap=True, highlight=False)
    # tables are made for a wide terminal; where there is none, rich would take 80 columns
    wide = "COLUMNS" not in os.environ and not console.is_terminal
    begun = time.monotonic()
    run_ours(*words[1:], environment={"COLUMNS": str(max(console.width, 140))} if wide else None)
    console.print(f"{title}: {time.monotonic() - begun:.0f} s", style="dim")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; the exit code is 0 when all parts ran, whoever came out above."""
    args = parser().parse_args(argv)
    check_at_least_one(args, "steps", "limit")
    check_output("--out", args.out, folder=True)
    hold("--out", args.out, folder=True)
    console = Terminal()
    if not console.is_terminal:
        console = Terminal(width=140)
    begun = time.monotonic()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"a CPU ({os.cpu_count()} cores)"
    said = f"prunezoo demo on {device}: a pruner learns which image tokens of {VLM} are worth reading."
    console.print(said, style="bold")
    out, folder = args.out, str(args.out / "ppm")
    run_part(console, "Training", fit_words(args.steps, folder))
    run_part(console, "Measuring", evaluate_words(args.limit, folder, out))
    console.print(verdict(read_record(out / "evaluation.json"), folder), highlight=False)
    ask(console, VLM, AutoPruner.from_pretrained(folder), out / "questions")
    console.rule(Text("Where everything is", style="bold"))
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
