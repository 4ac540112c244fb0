"""Measure pruners on a suite.

    python -m trainers.evaluate --vlm V --pruner P [P2 …] --keep 192 128 1/9 --suite S [--json F] [--report DIR]

A pruner is a registry name (`divprune`), a folder or a Hub id, perhaps with config fields (`FOLDER?adaptive=false`);
`oracle`, `relevance` and `attention@L` are diagnostics.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from prunezoo.core.base_model import check_base_model
from prunezoo.core.errors import PruneZooError
from prunezoo.core.registry import list_pruners
from trainers.cards.cards import PICTURES, write_card
from trainers.cards.parts import weights_digest
from trainers.cli.errors import check_output, command
from trainers.cli.lock import hold
from trainers.cli.names import find_pruner, find_vlm
from trainers.cli.options import add_option, check_at_least_one
from trainers.data.suite import SPLITS, list_suites, load_suite
from trainers.evaluation.budgets import parse_budget, parse_budgets
from trainers.evaluation.examples import pick_items, show_examples
from trainers.evaluation.instrument import BUDGETS, judge
from trainers.evaluation.journal import Journal
from trainers.evaluation.loading import load_vlm
from trainers.evaluation.measure import measure, passes
from trainers.evaluation.methods import RANDOM, RIVALS, Method, PrunerMethod, build_method, layer_attentions
from trainers.evaluation.record import build_record, write_record
from trainers.evaluation.report import write_report
from trainers.evaluation.scores import FULL, NONE, ORACLE
from trainers.evaluation.tables import WIDE, print_record, print_verdicts


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m trainers.evaluate",
        description="Measure pruners on a suite, beside the full model and zero tokens.",
    )
    add_option(p, "vlm", required=True)
    add_option(p, "pruner", help="methods (divprune), shipped pruners (ppm), folders, Hub ids, diagnostics")
    add_option(
        p,
        "keep",
        default=["1/3", "2/9", "1/9", "1/18"],
        help="tokens (64), shares (1/9, 0.25), or what a pruner sets itself (auto, auto:64)",
    )
    add_option(p, "suite", required=True, help=f"one of {', '.join(list_suites())}")
    p.add_argument(
        "--suite-option", nargs="+", default=[], metavar="KEY=VALUE", help="what the suite takes, e.g. root=…"
    )
    add_option(p, "split", choices=SPLITS)
    add_option(p, "limit")
    p.add_argument("--rivals", action="store_true", help=f"add {', '.join(RIVALS)}")
    p.add_argument(
        "--instrument", action="store_true", help="add oracle, random and every attention, and judge model and suite"
    )
    p.add_argument(
        "--equal-tokens",
        action="store_true",
        help="--keep is the mean over the decoder's layers, also for methods that prune between them",
    )
    add_option(p, "json", help="write rows and paired differences here")
    add_option(p, "report")
    p.add_argument("--examples", type=int, default=2, help="pictures of each group in the report")
    p.add_argument("--card", type=Path, help="write the model card of this checkpoint folder from what is measured")
    p.add_argument("--any-model", action="store_true", help="take pruners that were trained for another model too")
    p.add_argument("--seed", type=int, default=0, help="moves only what is random in a method")
    for name in ("batch-size", "device", "dtype"):
        add_option(p, name)
    return p


def build_methods(args: argparse.Namespace, layers: int, device: torch.device) -> list[Method]:
    """The methods that the command line names, each once, in its order, for a decoder of so many layers."""
    names = [*args.pruner, *(RIVALS if args.rivals else ())]
    if args.instrument:
        names += [RANDOM, ORACLE, *layer_attentions(layers)]
    names = [name for name in dict.fromkeys(names) if name not in (FULL, NONE)]  # these two are measured always
    if not names:
        raise PruneZooError(f"nothing to measure: name a --pruner ({', '.join(list_pruners())}, a folder, a Hub id)")
    methods = [build_method(name, args.seed, layers if args.equal_tokens else None) for name in names]
    for method in methods:
        if isinstance(method, PrunerMethod):
            method.pruners = [pruner.to(device) for pruner in method.pruners]
    return methods


def contenders(methods: Sequence[Method]) -> list[str]:
    """Who is compared in pairs with all others: the first method, and every one with trained weights."""
    learned = [m.name for m in methods if isinstance(m, PrunerMethod) and any(True for _ in m.pruners[0].parameters())]
    return list(dict.fromkeys([methods[0].name, *learned]))


def suite_options(pairs: Sequence[str]) -> dict[str, str]:
    """`key=value` words as a dict."""
    for pair in pairs:
        if "=" not in pair:
            raise PruneZooError(f"--suite-option {pair!r}: write key=value")
    return dict(pair.split("=", 1) for pair in pairs)


def check_outputs(args: argparse.Namespace) -> None:
    """Refuse, before hours of measuring, places that nothing can be written to, and a card of what is not measured."""
    check_output("--json", args.json)
    check_output("--report", args.report, folder=True)
    measured = [args.vlm, *(name.partition("?")[0] for name in args.pruner)]
    if args.card and args.card.resolve() not in [Path(name).resolve() for name in measured]:
        raise PruneZooError(f"--card {args.card}: not among what is measured; name that folder at --pruner too")


def run(args: argparse.Namespace, command_line: str, console: Console) -> dict[str, Any]:
    """Measure, print, and write what was asked for; gives the record back."""
    check_outputs(args)
    budgets = parse_budgets(args.keep)
    if args.instrument:
        budgets = tuple({b.label: b for b in (*budgets, *map(parse_budget, BUDGETS))}.values())
    check_at_least_one(args, "batch-size")
    suite = load_suite(args.suite, args.split, args.limit, **suite_options(args.suite_option))
    hold("--json", args.json)
    vlm, processor = load_vlm(args.vlm, args.device, args.dtype)
    methods = build_methods(args, vlm.config.get_text_config().num_hidden_layers, vlm.device)
    for method in methods:
        if isinstance(method, PrunerMethod) and not args.any_model:
            check_base_model(method.name, method.pruners[0].base_model, vlm)
    weights = {method.name: weights_digest(method.name.partition("?")[0]) for method in methods}
    journal = None
    if args.json:
        names = [args.vlm, str(vlm.dtype), args.suite, args.split, *args.suite_option, *(m.name for m in methods)]
        facts = [
            len(suite),
            args.seed,
            args.batch_size,
            args.equal_tokens,
            [b.label for b in budgets],
            weights_digest(args.vlm),
            weights,
            *names,
        ]
        journal = Journal(args.json.with_name(f"{args.json.name}.partial.npz"), json.dumps(facts))

    columns = (
        TextColumn(f"{suite.name} {suite.split}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("answers"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(suite) * passes(methods, budgets))
        measurement = measure(
            vlm, processor, suite, methods, budgets, args.batch_size, lambda n: progress.advance(task, n), journal
        )
    header = {
        "vlm": args.vlm,
        "suite": args.suite,
        "split": args.split,
        "seed": args.seed,
        "command": command_line,
        "weights": {name: digest for name, digest in weights.items() if digest},
    }
    record = build_record(measurement, contenders(methods), header)
    print_record(record, console)
    if args.instrument:
        verdicts = judge(record)
        record["instrument"] = [vars(verdict) for verdict in verdicts]
        print_verdicts(verdicts, console)
    if args.json:
        write_record(record, args.json)
        console.print(f"numbers: {args.json}")
    if args.report:
        named = [method for method in methods if method.name in (*args.pruner, *RIVALS, ORACLE)]
        items = pick_items(suite, args.examples)
        examples = show_examples(vlm, processor, items, named, budgets) if items and named else []
        console.print(f"report: {write_report(record, examples, args.report)}")
    if args.card:
        own = [method for method in methods if Path(method.name).resolve() == args.card.resolve()]
        items = pick_items(suite, 1)[:PICTURES]
        pictures = show_examples(vlm, processor, items, own, budgets) if own else []
        console.print(f"card: {write_card(args.card, record, pictures)[0]}")
    if journal:
        journal.remove()
    return record


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0, 2 after a mistake that the user can mend, 130 after Ctrl-C."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        args = parser().parse_args(argv)
        args.vlm, args.pruner = find_vlm(args.vlm), [find_pruner(name) for name in args.pruner]
        run(
            args,
            shlex.join(["python", "-m", "trainers.evaluate", *argv]),
            Console(width=None if sys.stdout.isatty() else WIDE),
        )
    except KeyboardInterrupt:
        print("stopped; with --json the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
