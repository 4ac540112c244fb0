"""The options that several commands repeat, each with its name, kind, default and help in one place.

A command says which it takes, and what it says otherwise: `add_option(p, "vlm", default="tiny-llava")`.
"""

import argparse
from pathlib import Path
from typing import Any

from prunezoo.core.errors import PruneZooError
from prunezoo.core.hub import DTYPES

OPTIONS: dict[str, dict[str, Any]] = {
    "vlm": {"help": "folder, Hub id, or tiny-llava, the embedded one"},
    "pruner": {"nargs": "+", "default": [], "help": "methods, shipped pruners, folders, Hub ids"},
    "tokenizer": {"help": "folder or Hub id"},
    "keep": {"nargs": "+", "help": "tokens (64) or shares (1/9, 0.25)"},
    "suite": {"help": "a registered suite, e.g. scenes"},
    "suite-option": {
        "nargs": "+",
        "default": [],
        "metavar": "KEY=VALUE",
        "help": "what the suite takes, e.g. scorer=vqa group=type",
    },
    "split": {"default": "test"},
    "limit": {"type": int, "help": "only the first so many items"},
    "batch": {"type": int, "default": 1, "help": "pictures at once"},
    "batch-size": {"type": int, "default": 32},
    "device": {"help": "by default a GPU if there is one"},
    "dtype": {"choices": DTYPES, "help": "by default float32 on a CPU, bfloat16 on a GPU"},
    "json": {"type": Path, "help": "write all numbers here"},
    "report": {"type": Path, "help": "write a page with curves and pictures into this folder"},
}


def add_option(parser: argparse.ArgumentParser, name: str, **own: Any) -> None:
    """Add an option of OPTIONS to a command.

    Args:
        parser: of the command.
        name: of the option, without the dashes.
        own: what this command says otherwise of it, as `argparse` takes it.
    """
    parser.add_argument(f"--{name}", **{**OPTIONS[name], **own})


def check_at_least_one(args: argparse.Namespace, *options: str) -> None:
    """Refuse numbers below 1, alone or in a list.

    Raises:
        PruneZooError: the option and the value.
    """
    for option in options:
        values = getattr(args, option.replace("-", "_"))
        for value in values if isinstance(values, list) else [values]:
            if value < 1:
                raise PruneZooError(f"--{option} {value}: at least 1")
