"""Measure the whole registry for the league, docs/league.md: every method at equal tokens on the same questions.

    python -m trainers.upkeep.league                    measure what has no record yet in hub_cards/league/
    python -m trainers.upkeep.league --suite pages      likewise in hub_cards/league_pages/
    python -m trainers.upkeep.league visionzip --again  these anew

Every method at the budgets that it can be brought down to, the shipped modules too; for each a record as
`trainers.evaluate --equal-tokens` writes it. It goes on where it was interrupted.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from prunezoo.core.registry import list_pruners
from prunezoo.host import encode
from prunezoo.host.run import run_pruned
from trainers.cards.parts import weights_digest
from trainers.cli.errors import command
from trainers.cli.names import CHECKPOINTS, find_pruner, find_vlm, has_weights, pruners_shipped, shown
from trainers.cli.options import add_option
from trainers.cli.terminal import Terminal
from trainers.data.conversation import ConversationCollator
from trainers.data.suite import Suite, load_suite
from trainers.evaluation.budgets import Budget, parse_budget
from trainers.evaluation.league import LEAGUES, SCENES, League
from trainers.evaluation.loading import load_vlm
from trainers.evaluation.measure import why_not
from trainers.evaluation.methods import Method, View, build_method
from trainers.evaluation.record import build_record, write_record
from trainers.evaluation.run import measure_with_progress
from trainers.evaluation.scores import FULL, NONE, Measurement
from trainers.evaluation.tables import WIDE

SPLIT = "test"
BATCH, TOGETHER = 32, 6
"""Questions, and methods, at a time."""
LOOKED = 210
"""Pictures in which it is looked where the tokens are that are kept."""
VARIANTS = (
    "tome?metric=states&most=0.1",
    "fastv?layer=1",
    "feather?softmax=all",
    "cdpruner?kernel=blend",
    "fastervlm?select=mmr",
    "corematching?layer=1&word=2",
    "corematching?layer=2&word=2",
)
"""Other settings that docs/choose.md speaks of, and of what its defaults are for deeper models."""
NOT_SHIPPED = ("top_vim",)
"""Learned, and no trained one is shipped."""
BEFORE_TOWER = ("energy", "patch_classifier", "pixelprune", "random_input", "uniform_input")
UNMEASURED = (
    *("combined", "budget", "aptp", "changed", "evs", "vidcom2", "hourglass", "tome_unmerge"),
    *("token_transforming_inverse", "dtop"),
    *BEFORE_TOWER,
    *NOT_SHIPPED,
)
"""A combination is its shipped one; `budget` and `aptp` set budgets; `changed` is for streams; `evs`, `vidcom2` and
`hourglass` are for clips, and docs/several_pictures.md has them; under `tome_unmerge`, `token_transforming_inverse` and
`dtop` the language model reads everything; those in front of the tower spare it work too, so they have a table of their
own."""


def names_of_all(of: League = SCENES) -> list[str]:
    """What is in a league: every method without weights, and what ships for its model."""
    free = [name for name in list_pruners() if name not in (FULL, NONE, *UNMEASURED) and not has_weights(name)]
    ours = pruners_shipped(of.vlm).items()
    shipped = [shown(CHECKPOINTS / folder) for folder, method in ours if method not in ("budget", "aptp")]
    return [*free, *VARIANTS, *shipped]


def path_of(name: str, of: League = SCENES) -> Path:
    """Where the record of a method lies."""
    return of.folder / f"{name.rpartition('/')[2].translate(str.maketrans('?&=', '---'))}.json"


def rows_kept(vlm: Any, processor: Any, suite: Suite, method: Method, budget: Budget) -> list[dict[str, Any]]:
    """How the tokens that are kept share themselves out over the rows of the picture, from the top.

    Nothing where none is left at the end.
    """
    items = [suite[number] for number in range(min(LOOKED, len(suite)))]
    encoded = encode(vlm, ConversationCollator(processor)(items), needs=method.needs)
    view = View(encoded.inputs, items)
    with torch.no_grad():
        run = run_pruned(vlm, encoded, method.pruner(view), method.amount(view, budget.keep), logits_to_keep=1)
    output, row = run.output, encoded.inputs.cells[..., 1]
    rows = row.gather(1, output.index)[output.valid]
    if not len(rows):
        return []
    shares = torch.bincount(rows, minlength=int(row.max()) + 1).double() / len(rows)
    kept = {
        "pruner": method.name,
        "keep": budget.label,
        "tokens": float(output.valid.sum(1).double().mean()),
        "shares": [round(share, 4) for share in shares.tolist()],
    }
    return [kept]


def reached(vlm: Any, processor: Any, suite: Suite, method: Method, of: League) -> tuple[Budget, ...]:
    """The budgets of the league that a method can be brought down to on this model."""
    budgets = map(parse_budget, of.budgets)
    return tuple(budget for budget in budgets if why_not(vlm, processor, suite[0], method, [budget]) is None)


def measure_all(of: League, names: Sequence[str], limit: int, console: Console) -> None:
    """Measure these, and write a record for each: those that reach the same budgets together, some at a time."""
    suite = load_suite(of.suite, SPLIT, limit)
    model = find_vlm(of.vlm)
    vlm, processor = load_vlm(model)
    depth = vlm.config.get_text_config().num_hidden_layers
    together: dict[tuple[Budget, ...], list[Method]] = {}
    for name in names:
        method = build_method(name, depth=depth)
        budgets = reached(vlm, processor, suite, method, of)
        if not budgets:
            console.print(f"{name}: none of {', '.join(of.budgets)} can be reached", markup=False)
            continue
        together.setdefault(budgets, []).append(method)
    for budgets, methods in together.items():
        for several in (methods[start : start + TOGETHER] for start in range(0, len(methods), TOGETHER)):
            console.print(", ".join(method.name for method in several), markup=False)
            measured = measure_with_progress(vlm, processor, suite, several, budgets, BATCH, None, console)
            for method in several:
                write(of, measured, method, budgets, limit, rows_kept(vlm, processor, suite, method, budgets[-1]))


def write(
    of: League,
    measured: Measurement,
    method: Method,
    budgets: Sequence[Budget],
    limit: int,
    kept: list[dict[str, Any]],
) -> None:
    """The record of one method."""
    model = find_vlm(of.vlm)
    scores = {key: value for key, value in measured.scores.items() if key[0] in (FULL, NONE, method.name)}
    words = ["python", "-m", "trainers.evaluate", "--vlm", model, "--suite", of.suite, "--limit", str(limit)]
    words += ["--equal-tokens", "--pruner", method.name, "--keep", *(budget.label for budget in budgets)]
    digest = weights_digest(method.name.partition("?")[0])
    header = {
        "vlm": model,
        "suite": of.suite,
        "split": SPLIT,
        "seed": 0,
        "command": shlex.join(words),
        "weights": {method.name: digest} if digest else {},
        "rows_kept": kept,
    }
    record = build_record(replace(measured, scores=scores), [method.name], header)
    write_record(record, path_of(method.name, of))


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure what has no record."""
    p = argparse.ArgumentParser(prog="python -m trainers.upkeep.league", description="Measure the whole registry.")
    p.add_argument("name", nargs="*", help="only these: methods, or shipped pruners")
    p.add_argument("--again", action="store_true", help="also what has a record")
    add_option(p, "suite", default=SCENES.suite, choices=LEAGUES)
    add_option(p, "limit", help="questions; by default those of the league")
    args = p.parse_args(argv)
    of = LEAGUES[args.suite]
    names = [find_pruner(name) for name in args.name] or names_of_all(of)
    missing = [name for name in names if args.again or not path_of(name, of).exists()]
    measure_all(of, missing, args.limit or of.items, Terminal(width=None if sys.stdout.isatty() else WIDE))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
