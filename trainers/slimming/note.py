"""`slim.json` beside a pruner that was made small: how, by how much, and whether it is faster for it."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from prunezoo.core.errors import PruneZooError
from prunezoo.core.files import read_object
from trainers.cli.errors import whole_file
from trainers.training.run_record import RUN_FILE

from .weights import zeros_of

NOTE_FILE = "slim.json"
PLAN_FILE = "slim_plan.json"
SPEED = {
    False: "no speed-up: zeros are stored and multiplied as any other number",
    True: "smaller matrices: measure its time with trainers.benchmark",
}
"""What is said of speed where heads and units were taken out, and where not."""


def size_of(module: nn.Module) -> dict[str, int]:
    """Numbers of parameters, and of those that are not zero among the matrices and all others."""
    parameters = sum(weight.numel() for weight in module.parameters())
    return {"parameters": parameters, "not_zero": parameters - zeros_of(module)[0]}


def write_note(folder: Path, module: nn.Module, structured: bool, facts: dict[str, Any]) -> dict[str, Any]:
    """Write the note, and the same into the record of the training, where there is one.

    Args:
        folder: Of the pruner.
        module: The pruner.
        structured: Whether heads and units were taken out.
        facts: Method, sparsity asked for, command, and what else is known.
    """
    zeros, counted = zeros_of(module)
    share = {} if structured else {"zeros": round(zeros / counted, 6)}
    note = {**facts, **size_of(module), **share, "structured": structured, "speed": SPEED[structured]}
    run = folder / RUN_FILE
    if run.is_file():
        record = read_object(run, what="the record of a training", remedy="train again")
        write(run, {**record, "parameters": note["parameters"], "slimmed": note})
    write(folder / NOTE_FILE, note)
    return note


def read_note(folder: Path) -> dict[str, Any]:
    """What :func:`write_note` wrote.

    Raises:
        PruneZooError: It cannot be read, or is none.
    """
    remedy = "name a folder that trainers.slim wrote"
    return read_object(folder / NOTE_FILE, "method", "parameters", "not_zero", what="a note of slimming", remedy=remedy)


def begin(folder: Path, plan: dict[str, Any]) -> bool:
    """Note what is going to be done, or see whether it is being done, or done, already.

    Args:
        folder: Of the pruner to be.
        plan: All that the result depends on.

    Returns:
        Whether there is something left to do.

    Raises:
        PruneZooError: Something else was begun there.
    """
    file = folder / "training" / PLAN_FILE
    if file.is_file():
        if read_object(file, what="a plan of slimming", remedy="name another --out") != plan:
            raise PruneZooError(f"--out {folder}: another slimming was begun there; name another folder, or remove it")
        return not (folder / NOTE_FILE).is_file()
    if (folder / NOTE_FILE).exists() or (folder / "config.json").exists():
        raise PruneZooError(f"--out {folder}: a pruner is there; name another folder")
    write(file, plan)
    return True


def write(path: Path, values: dict[str, Any]) -> None:
    """A JSON file, whole or not at all."""
    with whole_file(path) as scratch:
        scratch.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
