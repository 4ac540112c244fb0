"""Reading the files of a stranger: JSON and safetensors, nothing that could be run, and errors of one line."""

import hashlib
import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .bounds import (
    MOST_HEADER_BYTES,
    MOST_JSON_BYTES,
    MOST_RECORD_BYTES,
    MOST_TENSORS,
    MOST_WEIGHT,
    parse_json,
    read_bytes,
)
from .errors import PruneZooError

METADATA = "__metadata__"  # what the header of a safetensors file has beside its tensors


def read_header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of each tensor of a safetensors file, without reading them; PruneZooError if it is none."""
    with _open(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        return {name: (tuple(one.get_shape()), one.get_dtype()) for name, one in slices.items()}


def write_tensors(state: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """A safetensors file, of the same bytes whenever it holds the same: the library writes metadata in any order."""
    data = save(state, metadata)
    end = 8 + int.from_bytes(data[:8], "little")
    header = parse_json(data[8:end].decode())
    header[METADATA] = dict(sorted(header[METADATA].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of 8
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def read_metadata(path: Path) -> dict[str, str]:
    """What the header of a safetensors file says beside its tensors; PruneZooError if it is none."""
    with _open(path) as file:
        return file.metadata() or {}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        PruneZooError: It cannot be read, or a tensor holds what no weight is.
    """
    with _open(path) as file:
        # cloned: what is mapped from a file changes with it
        stored = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    for name, tensor in stored.items():
        if wrong := wrong_weight(tensor):
            raise PruneZooError(f"{path}: tensor '{name}' holds {wrong}; train or download it again")
    return stored


def wrong_weight(tensor: Tensor) -> str:
    """What a tensor holds that no weight is: NaN, infinity, a number that the next product makes one; else nothing."""
    if not tensor.is_floating_point() or not tensor.numel():
        return ""
    if tensor.element_size() < 2:
        return f"{tensor.dtype}, which no method has"
    low, high = (float(end) for end in tensor.aminmax())
    if low != low:
        return "NaN"
    most = max(-low, high)
    return "" if most <= MOST_WEIGHT else f"{most:.3g}, more than any weight is"


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """A safetensors file, whose header says no more than it may."""
    try:
        _check_header(path)
        with safe_open(path, framework="pt") as file:
            yield file
    except PruneZooError:
        raise
    except (OSError, SafetensorError, ValueError) as error:
        raise PruneZooError(f"{path}: not a readable safetensors file ({error}); save or download it again") from error


def _check_header(path: Path) -> None:
    """Refuse a header that is too large, names too many tensors or one of them twice."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise PruneZooError(f"{path}: not a plain file; download it again")
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > min(MOST_HEADER_BYTES, path.stat().st_size):
            raise ValueError(f"a header of {size:,} bytes")
        header = parse_json(file.read(size).decode())
    tensors = len(header) - (METADATA in header) if isinstance(header, dict) else 0
    if tensors > MOST_TENSORS:
        raise ValueError(f"{tensors:,} tensors, more than {MOST_TENSORS}")


def read_json(path: Path, most: int = MOST_JSON_BYTES, remedy: str = "save or download it again") -> Any:
    """A JSON file of at most so many bytes; PruneZooError, which ends with the remedy, if it is none."""
    try:
        return parse_json(read_bytes(path, most).decode())
    except PruneZooError:
        raise
    except OSError as error:
        raise PruneZooError(f"{path}: {error.strerror}; {remedy}") from error
    except ValueError as error:
        raise PruneZooError(f"{path}: not readable JSON ({error}); {remedy}") from error


def read_object(path: Path, *keys: str, what: str, remedy: str) -> dict[str, Any]:
    """What we wrote ourselves: a JSON object that has these keys.

    Args:
        path: The file.
        keys: That it must have.
        what: It is, for the message: "the record of a training".
        remedy: What to do where it is none.

    Raises:
        PruneZooError: It is none.
    """
    record = read_json(path, MOST_RECORD_BYTES, remedy)
    if not isinstance(record, dict):
        raise PruneZooError(f"{path}: not {what}; {remedy}")
    if missing := [key for key in keys if key not in record]:
        raise PruneZooError(f"{path}: not {what}, it lacks {', '.join(missing)}; {remedy}")
    return record


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
