"""What `trainers.slim` does for each method: from a recipe, and perhaps a trained pruner, to a small one."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import lightning as L

from prunezoo.core.contract import PruneInputs, Pruner
from prunezoo.core.errors import PruneZooError
from prunezoo.core.registry import load_pruner
from prunezoo.learned.ppm import PPM
from trainers.training.run_record import RUN_FILE

from .consensus import ConsensusPPM
from .iss_p import ShrinkWeights
from .lrp import References, prune_by_relevance
from .lth import Tickets, find_ticket
from .magnitude import magnitude_masks
from .masks import HoldMasks
from .precrop import Costs, precrop_sizes
from .units import as_ppm
from .weights import apply_masks

STRUCTURED = ("lrp", "consensus", "precrop")
"""Those that take heads and units out; the others set weights to zero, which makes nothing faster."""


class Run(Protocol):
    """What a method asks of the command."""

    config: Any  # the parsed recipe, with the options of the command
    out: Path  # folder of the small pruner
    line: str  # the command line

    def start(self) -> Pruner | None:
        """The trained pruner to begin with, if one is named."""

    def recipes(self) -> Pruner:
        """The recipe's own pruner, untrained."""

    def train(
        self,
        out: Path,
        callbacks: Sequence[L.Callback] = (),
        point: Path | None = None,
        start: Pruner | None = None,
        settings: dict[str, Any] | None = None,
        kind: str | None = None,
        steps: int | None = None,
    ) -> Pruner:
        """Train by the recipe."""

    def keep_as_it_is(self, pruner: Pruner) -> Pruner:
        """Save without training."""

    def references(self, pruner: Pruner, batches: int) -> list[PruneInputs]:
        """Training data as the pruner sees them."""


def magnitude(run: Run) -> Pruner:
    """Zeros for the smallest weights."""
    pruner = trained(run)
    masks = magnitude_masks(pruner, run.config.sparsity, run.config.part, run.config.even)
    apply_masks(pruner, masks)
    return tune(run, pruner, [HoldMasks(masks)])


def iss_p(run: Run) -> Pruner:
    """Soft shrinkage."""
    return run.train(run.out, [ShrinkWeights(run.config.sparsity, **run.config.iss_p.as_dict())])


def lth(run: Run) -> Pruner:
    """Late rewinding."""
    steps = run.config.trainer.max_steps
    if steps < 1:
        raise PruneZooError("trainer.max_steps: rewinding needs the number of steps of a training")
    tickets, folder = Tickets(**run.config.lth.as_dict()), run.out / "training"
    last = find_ticket(run.config.sparsity, tickets, steps, folder, run.train)
    pruner = load_pruner(str(last))
    pruner.save_pretrained(run.out)
    shutil.copyfile(last / RUN_FILE, run.out / RUN_FILE)
    return pruner


def lrp(run: Run) -> Pruner:
    """Relevance."""
    pruner, references = as_ppm(trained(run), "lrp"), References(**run.config.lrp.as_dict())
    batches = run.references(pruner, references.batches)
    return tune(run, prune_by_relevance(pruner, run.config.sparsity, batches, references))


def consensus(run: Run) -> Pruner:
    """Gates."""
    whole = as_ppm(run.start() or run.recipes(), "consensus")
    if type(whole) is not PPM:
        raise PruneZooError(f"--method consensus is for 'ppm', and this is a '{whole.name}': take lrp")
    settings = {"sparsity": run.config.sparsity, **run.config.consensus.as_dict()}
    return run.train(run.out, settings=settings, kind=f"{ConsensusPPM.__module__}.{ConsensusPPM.__name__}")


def precrop(run: Run) -> Pruner:
    """Widths from costs, then the training."""
    if run.config.pruner is not None:
        raise PruneZooError("--pruner: precrop is for untrained pruners; leave it out")
    whole = as_ppm(run.recipes(), "precrop")
    return run.train(run.out, settings=precrop_sizes(whole, run.config.sparsity, Costs(**run.config.precrop.as_dict())))


METHODS: dict[str, Callable[[Run], Pruner]] = {
    "magnitude": magnitude, "iss_p": iss_p, "lth": lth, "lrp": lrp, "consensus": consensus, "precrop": precrop,
}  # fmt: skip


def trained(run: Run) -> Pruner:
    """The pruner to begin with, which the method needs.

    Raises:
        PruneZooError: None is named.
    """
    pruner = run.start()
    if pruner is None:
        raise PruneZooError(f"--method {run.config.method} needs a trained pruner: name one by --pruner")
    return pruner


def tune(run: Run, pruner: Pruner, callbacks: Sequence[L.Callback] = ()) -> Pruner:
    """Train what was made small for as many steps as are asked for; or save it as it is."""
    if run.config.tune:
        return run.train(run.out, callbacks, start=pruner, steps=run.config.tune)
    return run.keep_as_it_is(pruner)
