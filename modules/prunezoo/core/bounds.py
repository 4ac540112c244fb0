"""How much of a stranger's file is believed: sizes, counts and depths are bounded here before anything is allocated."""

import json
import os
import stat
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .errors import PruneZooError

MOST_JSON_BYTES = 1 << 20
MOST_RECORD_BYTES = 1 << 26
"""Of what the commands write themselves: measurements, manifests, indices."""
MOST_DEPTH = 32
"""Of what lies inside of what, in JSON and in recipes."""
MOST_ENTRIES = 256
"""Of a list in a config."""
MOST_HEADER_BYTES = 1 << 20
"""Of the header of a safetensors file."""
MOST_TENSORS = 4096
"""Of a safetensors file; a LoRA of eighty layers has 1120."""
MOST_WEIGHT = 1e9
"""Of a weight, up or down. Trained ones are thousands at most; the square of 3e38 is infinite."""
MOST_PIXELS = 1 << 26
"""Of a picture that a few bytes ask for."""
SNAPSHOTS, BLOBS = "snapshots", "blobs"
"""Folders of a download of the Hub: the files of a commit, which are links, and what they lead to."""


def read_bytes(path: Path, most: int) -> bytes:
    """A plain file, read whole; nothing else is opened, for a pipe waits and a device has no end.

    Raises:
        PruneZooError: It is no plain file, or has more than ``most`` bytes.
        OSError: It cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise PruneZooError(f"{path}: not a plain file; download it again")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(min(size, most) + 1)  # which is allocated at once
    if max(size, len(data)) > most:
        raise PruneZooError(f"{path}: larger than any such file, more than {most:,} bytes; download it again")
    return data


def file_inside(folder: Path, name: str) -> Path:
    """A plain file of a folder, which does not lead out of it: who unpacks or publishes it means its own files.

    Raises:
        PruneZooError: There is none, it is a pipe, a device or a folder, or a link out of the folder.
    """
    path, root = folder / name, folder.resolve()
    if not path.is_file():
        what = "no plain file" if path.exists() or path.is_symlink() else "missing"
        raise PruneZooError(f"{folder}: {name} is {what}; give a folder written by save_pretrained")
    roots = [root, root.parent.parent / BLOBS] if root.parent.name == SNAPSHOTS else [root]
    if not any(path.resolve().is_relative_to(one) for one in roots):
        raise PruneZooError(f"{folder}: {name} is a link out of the folder; put the file itself there")
    return path


def parse_json(text: str) -> Any:
    """JSON of bounded depth that says each key once.

    Raises:
        ValueError: It is none, or not such.
    """
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError(f"more than {MOST_DEPTH} levels deep") from None
    level, depth = [value], 0
    while level := [inner for one in level if isinstance(one, dict | list) for inner in _inside(one)]:
        depth += 1
        if depth > MOST_DEPTH:
            raise ValueError(f"more than {MOST_DEPTH} levels deep")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key '{twice:.100}' is there twice")
    return found


def _inside(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value
