"""Measure pruners on benchmarks by lmms-eval: the full model, zero tokens, and each pruner at each budget, in one go.

    python -m trainers.harness --vlm V --pruner P divprune --keep 192 64 --tasks gqa,pope --out runs/a --json a.json

Each task under each pruner is a run of its own, kept in --out; the same command goes on where it was stopped.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunezoo.core.errors import PruneZooError
from prunezoo.lmms import parse_keep
from trainers.cards.cards import write_card
from trainers.cards.parts import weights_digest
from trainers.cli.errors import check_output, command, one_line
from trainers.cli.lock import hold
from trainers.cli.names import find_pruner, find_vlm
from trainers.cli.options import add_option, check_at_least_one
from trainers.cli.terminal import Terminal
from trainers.evaluation.methods import RIVALS
from trainers.evaluation.record import write_record
from trainers.evaluation.report import write_report
from trainers.evaluation.scores import FULL, NONE
from trainers.evaluation.tables import WIDE, print_record
from trainers.harnessing.jobs import Job, Result, Settings, check_installed, jobs_of, run_job
from trainers.harnessing.record import benchmarks_of, print_benchmarks, record_of


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m trainers.harness",
        description="Measure pruners on lmms-eval's benchmarks, beside the full model.",
    )
    add_option(p, "vlm", required=True)
    add_option(p, "pruner")
    add_option(p, "keep", default=["1/3", "2/9", "1/9"])
    p.add_argument("--tasks", required=True, help="of lmms-eval, parted by commas, e.g. gqa,pope,textvqa_val")
    p.add_argument("--include-path", help="folder of tasks of your own; their code is run")
    p.add_argument("--rivals", action="store_true", help=f"add those of {', '.join(RIVALS)} that this model can have")
    p.add_argument("--out", type=Path, required=True, help="folder where each run is kept")
    add_option(p, "json")
    add_option(p, "report")
    p.add_argument("--card", type=Path, help="write the model card of this checkpoint folder from what is measured")
    add_option(p, "limit", help="only the first so many questions of a task")
    for name in ("batch-size", "device", "dtype"):
        add_option(p, name)
    return p


def run_all(
    jobs: Sequence[Job], settings: Settings, root: Path, may_fail: Sequence[str], console: Terminal
) -> tuple[dict[Job, Result], dict[str, str]]:
    """The results of all runs, and the rivals that the model cannot have, each with why.

    Args:
        jobs: in their order.
        settings: what they have in common.
        root: where they are kept.
        may_fail: methods that nobody asked for by name.
        console: told after each run.

    Raises:
        PruneZooError: a run of another method failed.
    """
    results: dict[Job, Result] = {}
    missing: dict[str, str] = {}
    for number, job in enumerate(jobs, start=1):
        if job.pruner in missing:
            continue
        begun = time.monotonic()
        try:
            result, is_new = run_job(job, settings, root)
        except PruneZooError as error:
            if job.pruner not in may_fail:
                raise
            missing[job.pruner] = one_line(error)
            continue
        results[job] = result
        took = f"{time.monotonic() - begun:.0f} s" if is_new else "was done"
        console.print(f"{number}/{len(jobs)} {job.task} under {job.pruner} at {job.keep}: {took}", soft_wrap=True)
    return {job: result for job, result in results.items() if job.pruner not in missing}, missing


def read_arguments(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Methods and tasks of a command line, all looked at before hours are spent.

    Raises:
        PruneZooError: nothing to measure, a task or budget that is none, or a place that nothing can be written to.
    """
    check_at_least_one(args, "batch-size")
    if args.limit is not None:
        check_at_least_one(args, "limit")
    for keep in args.keep:
        parse_keep(keep)
    tasks = list(dict.fromkeys(filter(None, (task.strip() for task in args.tasks.split(",")))))
    methods = [find_pruner(name) for name in args.pruner if name not in (FULL, NONE)]
    methods = list(dict.fromkeys([*methods, *(RIVALS if args.rivals else ())]))
    if not methods or not tasks:
        raise PruneZooError(f"nothing to measure: name {'--tasks' if methods else 'a --pruner'}")
    check_output("--json", args.json)
    check_output("--out", args.out, folder=True)
    check_output("--report", args.report, folder=True)
    if args.card and args.card.resolve() not in [Path(name.partition("?")[0]).resolve() for name in methods]:
        raise PruneZooError(f"--card {args.card}: not among what is measured; name that folder at --pruner too")
    return methods, tasks


def contenders_of(methods: Sequence[str]) -> list[str]:
    """Who is compared in pairs with all others: the first method, and each that is a folder or Hub id with weights."""
    learned = [name for name in methods if weights_digest(name.partition("?")[0]) or "/" in name]
    return list(dict.fromkeys([methods[0], *learned]))


def show(record: dict[str, Any] | None, rows: list[dict[str, Any]], console: Terminal) -> None:
    """Print what was measured."""
    print_benchmarks(rows, console)
    if record is not None:
        print_record(record, console)
    else:
        console.print("No task here has a score for each question: no retention, no intervals, no card.")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser().parse_args(argv)
    methods, tasks = read_arguments(args)
    harness = check_installed()
    hold("--out", args.out, folder=True)
    console = Terminal(width=None if sys.stdout.isatty() else WIDE)
    vlm = find_vlm(args.vlm)
    settings = Settings(vlm, args.batch_size, args.device, args.dtype, args.limit, args.include_path)
    rivals = [name for name in methods if name in RIVALS and name not in args.pruner]
    results, missing = run_all(jobs_of(methods, args.keep, tasks), settings, args.out, rivals, console)
    measured = [name for name in methods if name not in missing]
    if not measured:
        raise PruneZooError("nothing to measure: this model can have none of the rivals; name a --pruner")
    weights = {name: weights_digest(name.partition("?")[0]) for name in measured}
    header = {
        "vlm": vlm,
        "suite_version": f"lmms-eval {harness}" + (f", first {args.limit}" if args.limit else ""),
        "command": shlex.join(["python", "-m", "trainers.harness", *argv]),
        "weights": {name: digest for name, digest in weights.items() if digest},
        "left_out": [{"pruner": name, "why": why} for name, why in missing.items()],
    }
    record = record_of(results, contenders_of(measured), header)
    rows = benchmarks_of(results)
    if args.json:
        write_record(record or {**header, "suite": "lmms-eval", "benchmarks": rows}, args.json)
    show(record, rows, console)
    if args.json:
        console.print(f"numbers: {args.json}")
    if record is None:
        return 0
    if args.report:
        console.print(f"report: {write_report(record, [], args.report)}")
    if args.card:
        console.print(f"card: {write_card(args.card, record)[0]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
