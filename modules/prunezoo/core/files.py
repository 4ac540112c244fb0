"""Reading the files of a stranger: JSON and safetensors, nothing that could be run, and errors of one line."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import PruneZooError

MOST_CONFIG_BYTES = 1 << 20


def read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of each tensor of a safetensors file, without reading them; PruneZooError if it is none."""
    with _open(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        return {name: (tuple(one.get_shape()), one.get_dtype()) for name, one in slices.items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        PruneZooError: It cannot be read, or a tensor holds NaN.
    """
    with _open(path) as file:
        # cloned: what is mapped from a file changes with it
        stored = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    for name, tensor in stored.items():
        if bool(tensor.isnan().any()):
            raise PruneZooError(f"{path}: tensor '{name}' holds NaN; train or download it again")
    return stored


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """A safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise PruneZooError(f"{path}: not a readable safetensors file ({error}); save or download it again") from error


def read_json(path: Path) -> Any:
    """A small JSON file; PruneZooError if it is none."""
    try:
        if path.stat().st_size <= MOST_CONFIG_BYTES:
            return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PruneZooError(f"{path}: not readable JSON ({error}); save or download it again") from error
    raise PruneZooError(f"{path}: larger than any config; download it again")
