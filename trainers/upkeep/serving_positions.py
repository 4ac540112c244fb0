"""What it costs that kept tokens are numbered anew (`--positions compact` of `trainers.serve`); writes its record.

    python -m trainers.upkeep.serving_positions --json hub_cards/serving_positions.json

The same questions under the same pruner with either positions, by teacher forcing as `trainers.evaluate` does. What
vLLM serves is token for token what `attach` answers, so no server is needed. Intervals: 95 % bootstrap over questions.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from prunezoo.core.budgets import Keep, read_keep
from prunezoo.core.registry import load_pruner
from prunezoo.host import encode, pruned_forward
from prunezoo.host.stages.prompt import Positions
from prunezoo.serve.settings import check_served
from trainers.cli.errors import check_output, command
from trainers.cli.names import find_pruner, find_vlm
from trainers.cli.options import add_option, check_at_least_one
from trainers.cli.terminal import Terminal
from trainers.data.conversation import ConversationCollator
from trainers.data.suite import Suite, load_suite
from trainers.evaluation.loading import load_vlm
from trainers.evaluation.measure import Answers
from trainers.evaluation.record import versions, write_record
from trainers.evaluation.statistics import interval

BATCH, DRAWS = 32, 2000
BOTH: tuple[Positions, ...] = get_args(Positions)


@torch.no_grad()
def right_answers(vlm: Any, processor: Any, suite: Suite, name: str, keep: Keep) -> np.ndarray:
    """``(positions, items)``: whether each answer is right, original positions first.

    Raises:
        PruneZooError: The pruner cannot be served.
    """
    pruner = load_pruner(name).to(vlm.device).eval()
    check_served(pruner)
    collate, found = ConversationCollator(processor), []
    for first in range(0, len(suite), BATCH):
        items = [suite[i] for i in range(first, min(first + BATCH, len(suite)))]
        batch = {k: v.to(vlm.device) if isinstance(v, Tensor) else v for k, v in collate(items).items()}
        encoded = encode(vlm, batch, pruner.needs)
        output, rows = pruner(encoded.inputs, keep), []
        for positions in BOTH:
            out = pruned_forward(vlm, encoded, output, positions)
            assert out.labels is not None
            answers = Answers.read(out.logits, out.labels)
            rows.append(answers.every(answers.choice == answers.target, len(items)))
        found.append(torch.stack(rows))
    return torch.cat(found, 1).double().cpu().numpy()


def row_of(name: str, keep: Keep, right: np.ndarray) -> dict[str, Any]:
    """Percent of right answers with either positions, and what is lost by the second, in points with its interval."""
    lost = 100 * (right[0] - right[1])
    random = np.random.default_rng(0)
    draws = np.array([lost[random.integers(len(lost), size=len(lost))].mean() for _ in range(DRAWS)])
    accuracy = dict(zip(BOTH, (100 * right.mean(1)).tolist(), strict=True))
    return {
        "pruner": name,
        "keep": str(keep),
        "n": len(lost),
        **accuracy,
        "lost": float(lost.mean()),
        "ci": interval(draws),
    }


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    argv = sys.argv[1:] if argv is None else list(argv)
    p = argparse.ArgumentParser(prog="python -m trainers.upkeep.serving_positions", description="Measure positions.")
    add_option(p, "vlm", default="tiny-llava")
    add_option(p, "pruner", default=["divprune", "fastervlm", "m3-tiny", "ppm-tiny"])
    add_option(p, "keep", nargs=None, default="16", help="tokens an image, or a share")
    add_option(p, "suite", default="scenes")
    add_option(p, "limit", default=1000)
    add_option(p, "json")
    args = p.parse_args(argv)
    check_at_least_one(args, "limit")
    check_output("--json", args.json)
    keep = read_keep(args.keep)
    vlm, processor = load_vlm(find_vlm(args.vlm))
    suite = load_suite(args.suite, "test", args.limit)
    rows = []
    table = Table("pruner", "keep", "n", *BOTH, "lost by compact, points")
    for name in args.pruner:
        rows.append(row := row_of(name, keep, right_answers(vlm, processor, suite, find_pruner(name), keep)))
        low, high = row["ci"]
        percents = [f"{row[positions]:.1f}" for positions in BOTH]
        table.add_row(name, row["keep"], str(row["n"]), *percents, f"{row['lost']:.1f} [{low:.1f}, {high:.1f}]")
    if args.json:
        line = shlex.join(["python", "-m", "trainers.upkeep.serving_positions", *argv])
        facts = {"suite": suite.name, "suite_version": suite.version, "split": suite.split, "versions": versions()}
        write_record({"command": line, "vlm": args.vlm, **facts, "rows": rows}, args.json)
    Terminal().print(table)


if __name__ == "__main__":
    main()
