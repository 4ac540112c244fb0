"""Search the options of a method for a model and a budget on training items: `vflowopt?options=FILE` then has them.

    python -m trainers.search vflowopt --vlm tiny-llava --suite scenes --keep 1/9 --limit 512 --trials 80

Every trial reads the same mean of tokens over the layers; the start, the options that the name has, is the first one.
What is found is compared with the start on the validation split, question by question. Stopped, it goes on with the
same command. Methods say which options are worth a search; `--range cell=3:12` says others.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunezoo.core.errors import PruneZooError
from prunezoo.core.registry import load_pruner
from trainers.cli.errors import check_output, command, whole_file
from trainers.cli.lock import hold
from trainers.cli.names import find_pruner, find_vlm
from trainers.cli.options import add_option, check_at_least_one
from trainers.cli.terminal import Terminal, progress_bar
from trainers.evaluation.budgets import parse_budget
from trainers.evaluation.loading import load_vlm
from trainers.evaluation.methods import build_method
from trainers.evaluation.record import build_record, write_record
from trainers.evaluation.run import measure_with_progress, read_suite
from trainers.evaluation.search import Items, Search, Space, parse_range, with_options
from trainers.evaluation.tables import WIDE, print_record


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m trainers.search", description="Search a method's options on training items, and write them."
    )
    p.add_argument("name", help="a method, with the options to start from, or a shipped pruner, folder, Hub id")
    add_option(p, "vlm", required=True)
    add_option(p, "suite", nargs="+", required=True)
    add_option(p, "suite-option")
    add_option(p, "split", default="train", choices=("train", "validation"), help="never the test split")
    add_option(p, "limit", default=512)
    add_option(p, "keep", nargs=None, required=True, help="one budget, the mean over the layers: 64, 1/9")
    p.add_argument("--range", nargs="+", default=[], metavar="NAME=LEAST:MOST", help="options to vary; or NAME=A,B,C")
    p.add_argument(
        "--objective", choices=("kl", "accuracy"), default="kl", help="KL to the full model, or right answers"
    )
    p.add_argument("--trials", type=int, default=80, help="in all, with those that are done")
    p.add_argument("--check", type=int, default=420, help="validation items that compare what is found with the start")
    p.add_argument("--seed", type=int, default=0, help="of what is tried")
    p.add_argument("--out", type=Path, default=Path("runs/search"), help="folder of trials, options.json, check.json")
    for name in ("batch-size", "device", "dtype"):
        add_option(p, name)
    return p


def compare(args: argparse.Namespace, vlm: Any, processor: Any, names: Sequence[str], console: Terminal) -> None:
    """Measure what was found beside the start on the validation split, print and write that."""
    suite = read_suite(args.suite, args.suite_option, "validation", args.check)
    depth, budgets = vlm.config.get_text_config().num_hidden_layers, (parse_budget(args.keep),)
    methods = [build_method(name, depth=depth) for name in names]
    measured = measure_with_progress(vlm, processor, suite, methods, budgets, args.batch_size, None, console)
    header = {"vlm": args.vlm, "suite": suite.name, "split": suite.split, "seed": args.seed, "command": args.words}
    record = build_record(measured, names, header)
    write_record(record, args.out / "check.json")
    print_record(record, console)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    words = sys.argv[1:] if argv is None else list(argv)
    args = parser().parse_args(words)
    args.words = shlex.join(["python", "-m", "trainers.search", *words])
    console = Terminal(width=None if sys.stdout.isatty() else WIDE)
    check_at_least_one(args, "batch-size", "trials", "check", "limit")
    check_output("--out", args.out, folder=True)
    keep, args.vlm = parse_budget(args.keep), find_vlm(args.vlm)
    if isinstance(keep.keep, str):
        raise PruneZooError(f"--keep {args.keep}: a search is for one budget: write tokens (64) or a share (1/9)")
    hold("--out", args.out, folder=True)
    name = find_pruner(args.name)
    suite = read_suite(args.suite, args.suite_option, args.split, args.limit)
    vlm, processor = load_vlm(args.vlm, args.device, args.dtype)
    pruner = load_pruner(name, vlm=vlm)
    ranges = dict(map(parse_range, args.range))
    space: Space = ranges or pruner.search_space(vlm.config.get_text_config().num_hidden_layers)
    facts = {
        **{key: getattr(args, key) for key in ("vlm", "keep", "split", "objective", "seed")},
        "suite": [suite.name, suite.version, suite.fingerprint()],
        "n": len(suite),
    }
    search = Search.begin(args.out, name, space, facts, args.seed, pruner.config.to_dict())
    items = Items(vlm, processor, suite, args.batch_size)
    with progress_bar(console, "trials") as progress:
        task = progress.add_task(f"{suite.name} {suite.split}", total=args.trials, completed=search.done)
        while search.done < args.trials:
            search.step(items, keep, args.objective)
            progress.update(task, completed=search.done)
    options, best = search.best()
    start = search.start()
    record = {
        "method": pruner.name,
        "options": options,
        **facts,
        "trials": search.done,
        "found": vars(best),
        "start": None if start is None else vars(start),
        "command": args.words,
    }
    path = args.out / "options.json"
    with whole_file(path) as scratch:
        scratch.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    found = with_options(name, options)
    before = "which is no candidate" if start is None else f"{start.value:.4f} at {start.tokens:.2f} tokens"
    console.print(f"{args.objective}: {best.value:.4f} at {best.tokens:.2f} tokens; the start {before}", soft_wrap=True)
    console.print(f"found: {found}", soft_wrap=True)
    console.print(f"saved: {path}, for {with_options(name, {'options': str(path)})}", soft_wrap=True)
    compare(args, vlm, processor, [found, name], console)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
