"""What `trainers.evaluate` does: measure, write the numbers, then print, and make what is made of them."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from prunezoo.core.base_model import check_base_model
from prunezoo.core.errors import PruneZooError
from prunezoo.core.registry import list_pruners
from trainers.cards.cards import PICTURES, write_card
from trainers.cards.parts import weights_digest
from trainers.cli.errors import check_output
from trainers.cli.lock import hold
from trainers.cli.names import FRONTS, folder_named
from trainers.cli.options import check_at_least_one
from trainers.cli.terminal import progress_bar
from trainers.data.changes import Changed
from trainers.data.suite import Suite, load_suite

from .budgets import Budget, parse_budget, parse_budgets
from .examples import pick_items, show_examples
from .instrument import BUDGETS, judge
from .journal import Journal
from .loading import load_vlm
from .measure import ALONE, measure, of_pruner, passes, why_not
from .methods import RANDOM, RIVALS, Method, PrunerMethod, build_method, layer_attentions
from .processes import Processes, launch, own_device
from .record import build_record, write_record
from .report import write_report
from .scores import FULL, NONE, ORACLE, Measurement
from .tables import print_record, print_verdicts


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


def leave_out(
    vlm: Any, processor: Any, suite: Suite, methods: list[Method], budgets: Sequence[Budget], named: Sequence[str]
) -> dict[str, str]:
    """Take out of the methods, before anything is measured, the rivals that this model cannot have; each with why.

    Args:
        vlm: the model.
        processor: its processor.
        suite: whose first item is tried.
        methods: all; those that are left out are removed.
        budgets: at which they are tried.
        named: the methods that somebody asked for by name, which are not left out.

    Raises:
        PruneZooError: one of those named cannot be had, or no method is left.
    """
    if not len(suite):
        return {}  # `measure` says so
    first = suite[0]
    found = {method.name: why_not(vlm, processor, first, method, budgets, suite.clips) for method in methods}
    missing = {name: why for name, why in found.items() if why}
    for name, why in missing.items():
        if name in named or name not in RIVALS:
            raise PruneZooError(of_pruner(name, why))
    methods[:] = [method for method in methods if method.name not in missing]
    if not methods:
        raise PruneZooError("nothing to measure: this model can have none of the rivals; name a --pruner")
    return missing


def contenders(methods: Sequence[Method], named: Sequence[str] = ()) -> list[str]:
    """Who is compared in pairs with all others: the first method, all with trained weights, and those ``named``."""
    learned = [m.name for m in methods if isinstance(m, PrunerMethod) and any(True for _ in m.pruners[0].parameters())]
    return list(dict.fromkeys([methods[0].name, *named, *learned]))


def read_suite(words: Sequence[str], options: Sequence[str], split: str, limit: int | None) -> Suite:
    """The suite of a command line.

    Args:
        words: of `--suite`: its name, and its source where it takes one.
        options: of `--suite-option`, each `key=value`; `change` is had by every suite, see `data/changes.py`.
        split: train, validation or test.
        limit: only the first so many items.

    Raises:
        PruneZooError: too many words, no `key=value`, or what `load_suite` refuses.
    """
    name, *source = words
    if len(source) > 1:
        raise PruneZooError(f"--suite {' '.join(words)}: a name and one source; a path with spaces needs quotes")
    for pair in options:
        if "=" not in pair:
            raise PruneZooError(f"--suite-option {pair!r}: write key=value")
    named = {"source": source[0]} if source else {}
    own = {**named, **dict(pair.split("=", 1) for pair in options)}
    change = own.pop("change", None)
    suite = load_suite(name, split, limit, **own)
    return suite if change is None else Changed(suite, change)


def check_outputs(args: argparse.Namespace) -> None:
    """Refuse, before hours of measuring, places that nothing can be written to, and a card of what is not measured."""
    check_output("--json", args.json)
    check_output("--report", args.report, folder=True)
    measured = [args.vlm, *(name.partition("?")[0] for name in args.pruner)]
    if args.card and args.card.resolve() not in [Path(name).resolve() for name in measured]:
        raise PruneZooError(f"--card {args.card}: not among what is measured; name that folder at --pruner too")


def schedules_of(methods: Sequence[Method]) -> list[dict[str, Any] | None]:
    """What each method was given as `?schedule=FILE`: the file's content, which may change while its name stays."""
    given = [method.pruners[0].given_schedule if isinstance(method, PrunerMethod) else None for method in methods]
    return [None if schedule is None else schedule.to_dict() for schedule in given]


def journal_of(
    args: argparse.Namespace,
    suite: Suite,
    facts: Sequence[Any],
    methods: Sequence[Method],
    weights: Mapping[str, str | None],
) -> Journal | None:
    """Where an interrupted run goes on from, beside the JSON; None where none is asked for."""
    if not args.json:
        return None
    names = [args.vlm, *args.suite, args.split, *args.suite_option, *(method.name for method in methods)]
    options = [args.seed, args.batch_size, args.equal_tokens, weights_digest(args.vlm), weights, suite.version]
    return Journal(
        args.json.with_name(f"{args.json.name}.partial.npz"),
        json.dumps([len(suite), suite.fingerprint(), *facts, *options, *names]),
    )


def measure_with_progress(
    vlm: Any,
    processor: Any,
    suite: Suite,
    methods: Sequence[Method],
    budgets: Sequence[Budget],
    batch_size: int,
    journal: Journal | None,
    console: Console,
    processes: Processes = ALONE,
) -> Measurement:
    """Measure, and show how it goes."""
    with progress_bar(console, "answers") as progress:
        task = progress.add_task(f"{suite.name} {suite.split}", total=len(suite) * passes(methods, budgets))
        return measure(
            vlm, processor, suite, methods, budgets, batch_size, lambda n: progress.advance(task, n), journal, processes
        )


def run(args: argparse.Namespace, command_line: str, console: Console) -> dict[str, Any]:
    """Measure, write what was asked for, and print; gives the record back, of several processes in the first.

    The numbers are written first: whatever fails afterwards, they are there.
    """
    check_outputs(args)
    if unknown := [name for name in args.compare if name not in args.pruner]:
        raise PruneZooError(f"--compare {unknown[0]}: not among what is measured; name it at --pruner too")
    budgets = parse_budgets(args.keep)
    if args.instrument:
        budgets = tuple({b.label: b for b in (*budgets, *map(parse_budget, BUDGETS))}.values())
    check_at_least_one(args, "batch-size")
    device = own_device(args.devices, args.device)
    suite = read_suite(args.suite, args.suite_option, args.split, args.limit)
    hold("--json", args.json)
    vlm, processor = load_vlm(args.vlm, device, args.dtype)
    methods = build_methods(args, vlm.config.get_text_config().num_hidden_layers, vlm.device)
    for method in methods:
        if isinstance(method, PrunerMethod) and not args.any_model:
            check_base_model(method.name, method.pruners[0].base_model, vlm)
    missing = leave_out(vlm, processor, suite, methods, budgets, args.pruner)
    weights = {method.name: weights_digest(folder_named(method.name)) for method in methods}
    facts = [str(vlm.dtype), [b.label for b in budgets], schedules_of(methods)]
    journal = journal_of(args, suite, facts, methods, weights)
    processes = launch(args.devices, vlm.device)  # when all that a user can mistake has been looked at
    console.quiet |= processes.rank > 0
    measurement = measure_with_progress(
        vlm, processor, suite, methods, budgets, args.batch_size, journal, console, processes
    )
    processes.end()
    if processes.rank > 0:
        return {}
    header = {
        "vlm": args.vlm,
        "suite": suite.name,
        "suite_version": suite.version,
        **({"scorer": suite.scorer} if suite.scorer else {}),
        "split": args.split,
        "seed": args.seed,
        "command": command_line,
        # of a name with a front, as `random@F`, it is not the pruner of F that was measured
        "weights": {name: digest for name, digest in weights.items() if digest and not name.startswith(FRONTS)},
        "left_out": [{"pruner": name, "why": why} for name, why in missing.items()],
    }
    record = build_record(measurement, contenders(methods, args.compare), header)
    if args.instrument:
        verdicts = judge(record)
        record["instrument"] = [vars(verdict) for verdict in verdicts]
    if args.json:
        write_record(record, args.json)
    print_record(record, console)
    if args.instrument:
        print_verdicts(verdicts, console)
    if args.json:
        console.print(f"numbers: {args.json}")
    if args.report:
        named = [method for method in methods if method.name in (*args.pruner, *RIVALS, ORACLE)]
        items = pick_items(suite, args.examples)
        examples = show_examples(vlm, processor, items, named, budgets, suite) if items and named else []
        console.print(f"report: {write_report(record, examples, args.report)}")
    if args.card:
        own = [method for method in methods if Path(method.name).resolve() == args.card.resolve()]
        items = pick_items(suite, 1)[:PICTURES]
        pictures = show_examples(vlm, processor, items, own, budgets, suite) if own else []
        console.print(f"card: {write_card(args.card, record, pictures)[0]}")
    if journal:
        journal.remove()
    return record
