"""Which guide teaches best: each as an oracle that chooses the tokens itself, and a PPM trained by each.

    python -m trainers.upkeep.guides --out runs/guides [--steps 300] [--limit 420] [--untrained] [--json F]

All is measured on the validation split of scenes. As an oracle a guide is told the reference answer, if it asks for
one; a trained PPM is not. Every training is that of configs/ppm_tiny.yaml but for the guide, with equally many steps;
what a guide costs is given in seconds of one processor for each image, the pass that answers included. What is trained
or measured already is taken from the folder, so that a run that was stopped goes on.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from prunezoo.core.hub import CONFIG_FILE
from prunezoo.host import encode
from trainers.cli.errors import check_output, command
from trainers.cli.options import add_option, check_at_least_one
from trainers.cli.ours import run_ours
from trainers.cli.terminal import Terminal
from trainers.data.conversation import ConversationCollator
from trainers.data.suite import load_suite
from trainers.evaluation.loading import load_vlm
from trainers.evaluation.record import mean_row, read_record, versions, write_record
from trainers.evaluation.scores import GUIDE
from trainers.training.guide_names import GUIDES, find_guide, fixed
from trainers.upkeep.size_curve import KEEPS, RECIPE, VLM
from trainers.upkeep.support import ROOT

SPLIT = "validation"
TIMED = 16
"""Images that a guide's cost is measured on, in one batch."""


def measure(pruners: Sequence[str], path: Path, limit: int) -> dict[str, Any]:
    """The record of some pruners on the validation split, measured unless the file has it."""
    if not path.is_file() or not {row["pruner"] for row in read_record(path)["rows"]} >= set(pruners):
        where = ("--vlm", VLM, "--suite", "scenes", "--split", SPLIT, "--limit", str(limit), "--json", str(path))
        run_ours("trainers.evaluate", *where, "--keep", *KEEPS, "--pruner", *pruners, cwd=ROOT)
    return read_record(path)


def train(guide: str, folder: Path, steps: int | None) -> None:
    """A PPM by the recipe with this guide; without effect where it is there."""
    if (folder / CONFIG_FILE).is_file():
        return
    more = [] if steps is None else [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}"]
    layers = ["--model.guide_layer=null"] if guide == "attention" else []
    words = (f"--out={folder}", f"--model.guide={guide}", *layers, *more)
    run_ours("trainers.fit", "--config", RECIPE, *words, cwd=ROOT)


def seconds_of(guides: Sequence[str]) -> dict[str, float]:
    """What each guide takes, in seconds of one processor for each image; without the encoding."""
    vlm, processor = load_vlm(str(ROOT / VLM), "cpu", "float32")
    batch = ConversationCollator(processor)(load_suite("scenes", SPLIT, TIMED)[:TIMED])
    with torch.no_grad():
        encoded = encode(vlm, batch)
    found = {}
    for guide in guides:
        begun = time.process_time()
        fixed(find_guide(guide), vlm, encoded)
        found[guide] = round((time.process_time() - begun) / TIMED, 4)
    return found


def rows_of(record: dict[str, Any], pruners: dict[str, str], kind: str, seconds: dict[str, float]) -> list[Any]:
    """`{guide, kind, seconds, keep, tokens, accuracy, retention, ci}` of each guide and budget."""
    rows = []
    for guide, pruner in pruners.items():
        for keep in KEEPS:
            row = mean_row(record, pruner, keep)
            own = {name: row[name] for name in ("tokens", "accuracy", "retention", "ci")}
            rows.append({"guide": guide, "kind": kind, "seconds": seconds[guide], "keep": keep, **own})
    return rows


def show(record: dict[str, Any], console: Console) -> None:
    """Print the table."""
    table = Table(title=f"{record['suite']} {record['split']}, {record['n']} questions")
    for column in ("guide", "tokens chosen", "s an image", "keep", "retention, %"):
        table.add_column(column, justify="left" if column in ("guide", "tokens chosen") else "right")
    for row in record["rows"]:
        kept = f"{row['retention']:.1f} ({row['ci'][0]:.1f}–{row['ci'][1]:.1f})"
        table.add_row(row["guide"], row["kind"], f"{row['seconds']:.2f}", row["keep"], kept)
    console.print(table)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    argv = sys.argv[1:] if argv is None else list(argv)
    p = argparse.ArgumentParser(prog="python -m trainers.upkeep.guides", description="Compare guides as teachers.")
    p.add_argument("--out", type=Path, required=True, help="folder of what is trained and measured; goes on there")
    p.add_argument("--guide", nargs="+", choices=list(GUIDES), default=list(GUIDES), help="which; by default all")
    p.add_argument("--steps", type=int, help="of each training; by default the recipe's")
    p.add_argument("--untrained", action="store_true", help="train nothing: let the guides choose, and no more")
    for name in ("limit", "json"):
        add_option(p, name, **({"default": 420} if name == "limit" else {}))
    args = p.parse_args(argv)
    check_at_least_one(args, "limit", *(("steps",) if args.steps is not None else ()))
    check_output("--json", args.json)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    seconds = seconds_of(args.guide)
    named = {guide: f"{GUIDE}{guide}" for guide in args.guide}
    found = measure(list(named.values()), out / f"chosen-{args.limit}.json", args.limit)
    rows = rows_of(found, named, "by the guide", seconds)
    if not args.untrained:
        folders = {guide: out / f"guide-{guide}" for guide in args.guide}
        for guide, folder in folders.items():
            train(guide, folder, args.steps)
        trained = {guide: str(folder) for guide, folder in folders.items()}
        measured = measure(list(trained.values()), out / f"trained-{args.limit}.json", args.limit)
        rows += rows_of(measured, trained, "by a PPM trained by it", seconds)
    kept = {key: found[key] for key in ("vlm", "suite", "suite_version", "split", "n")}
    line = shlex.join(["python", "-m", "trainers.upkeep.guides", *argv])
    record = {**kept, "command": line, "versions": versions(), "rows": rows}
    if args.json:
        write_record(record, args.json)
    show(record, Terminal())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
