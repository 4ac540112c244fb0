"""Load spoiled checkpoint folders: `python tests/helpers/fuzz.py COUNT SEED`. For a process of its own, which may fall.

Each case takes a good folder, spoils one file and loads it. That must give a PruneZooError of one line, or a pruner or
tokenizer, within seconds, without memory above twice the file (and a fixed allowance), without a file outside the
folder, and without running anything: an audit hook sees every import, compilation, unpickling, process and connection.
"""

import copy
import faulthandler
import json
import random
import resource
import signal
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from made_inputs import ALL, build
from tiny_tokenizer import FAMILY, member

from prunezoo import PruneZooError, build_pruner, load_pruner
from prunezoo.tokenizers.base import load_tokenizer

SECONDS, ALLOWANCE = 20, 96 << 20  # of one case; what malloc's arenas and short-lived temporaries may take
SMALL = {"width": 32, "hidden": 16, "heads": 2, "blocks": 1}
COMBINED = {"methods": ["ppm", "fastv"], "configs": [{**SMALL, "text_blocks": 1}, {"layer": 1}], "shares": [0.5, 0.5]}
NASTY: tuple[Any, ...] = (
    *(0, 1, -1, 3, 2**20, 2**31, 2**40, 2**63, 10**30, 10**400, -(2**62), 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *(
        None,
        True,
        False,
        "",
        "x",
        "cpu",
        "../../etc/passwd",
        "os.system",
        "a\nb",
        "\x00",
        "é" * 1000,
        [],
        {},
        [1],
        [[]],
    ),
    *(
        [2**31] * 8,
        list(range(1000)),
        {"a": {"b": 1}},
        ["ppm"],
        ["combined"],
        [{"methods": ["combined"]}],
        "1e9",
        [0] * 99,
    ),
)
FORBIDDEN = (
    "exec",
    "compile",
    "import",
    "pickle.find_class",
    "os.system",
    "os.exec",
    "subprocess.Popen",
    "socket.connect",
)


class Watch:
    """An audit hook; on only while a case runs."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in FORBIDDEN:
            self.seen.append(f"{event} {args[:1]!r:.100}")
        elif event == "open" and isinstance(args[0], str) and not Path(args[0]).is_relative_to(self.folder):
            self.seen.append(f"open {args[0]}")


def spoil_bytes(data: bytes, rng: random.Random, most: int) -> bytes:
    """Flip, cut, double or insert a few bytes among the first `most`."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(min(most, len(out)) or 1) if out else 0
        kind = rng.randrange(5)
        if kind == 0 and out:
            out[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[place:]
        elif kind == 2:
            out[place:place] = rng.randbytes(rng.choice((1, 8, 100)))
        elif kind == 3:
            del out[place : place + rng.choice((1, 4, 64))]
        else:
            out[place : place + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**63, 2**64 - 1, len(out))))
    return bytes(out)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in a JSON value something can be put."""
    if path:
        yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield from places(inner, (*path, key))


def spoil_json(value: Any, rng: random.Random) -> str:
    """Put something nasty into a JSON value, take something out, or bury it."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2, 4))):
        where = rng.choice(list(places(value)) or [()])
        if not where:
            return json.dumps(rng.choice(NASTY))
        parent = value
        for key in where[:-1]:
            parent = parent[key]
        kind = rng.randrange(8)
        if kind == 0:
            del parent[where[-1]]
        elif kind == 1 and isinstance(parent, dict):
            parent[rng.choice(("module", "__class__", "extra", "base_model", "auto_map", "\n"))] = copy.deepcopy(
                rng.choice(NASTY)
            )
        else:
            parent[where[-1]] = copy.deepcopy(rng.choice(NASTY))
    text = json.dumps(value)
    depth = rng.choice((0, 0, 0, 0, 0, 0, 0, 200_000))
    return "[" * depth + text if depth else text


def spoil_tensors(data: bytes, rng: random.Random) -> bytes:
    """Edit the header of a safetensors file, its length, or its numbers."""
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    kind = rng.randrange(6)
    if kind == 0:
        return spoil_bytes(data, rng, 8 + length)
    if kind == 1:
        return data[:8] + data[8 : 8 + length] + spoil_bytes(body, rng, len(body))
    if kind == 2 and len(header) > 1:  # another shape or type over the same bytes
        one = header[rng.choice([name for name in header if name != "__metadata__"])]
        one.update(
            rng.choice(({"dtype": "F64"}, {"dtype": "BF16"}, {"dtype": "I32"}, {"shape": [2**62, 4]}, {"shape": []}))
        )
    if kind == 3 and len(header) > 1:  # another name
        header[rng.choice(("x", "module.weight", "../y", "a\nb", ""))] = header.pop(rng.choice(list(header)))
    if kind >= 4:
        text = spoil_json(header, rng).encode()
    else:
        text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def good_folders(root: Path) -> list[Path]:
    """One of every method that has weights, one that has none, and one of every tokenizer."""
    pruners = {name: build(name) for name in ALL}
    pruners = {
        name: one for name, one in pruners.items() if name == "pyramiddrop" or any(True for _ in one.parameters())
    }
    pruners["combined"] = build_pruner("combined", **COMBINED)
    folders = [pruner.save_pretrained(root / name) for name, pruner in pruners.items()]
    stored = json.loads((root / "ppm" / "config.json").read_text())
    stored["base_model"] = {"name": "n", "family": "llava", "width": 32, "depth": 2, "tower": "clip", "tower_width": 24}
    (root / "ppm" / "config.json").write_text(json.dumps(stored))
    return [*folders, lora_folder(root / "lora"), *(member(name).save_pretrained(root / name) for name in FAMILY)]


def load(folder: Path) -> object:
    """What is in a folder, as its owner would load it."""
    return load_tokenizer(folder) if folder.name in FAMILY else load_pruner(folder)


def lora_folder(folder: Path) -> Path:
    """An M3 with a LoRA, without a model to fit it to."""
    pruner: Any = build_pruner("m3", **SMALL, lora_rank=2)
    for layer in range(2):
        pruner.lora._add(
            f"model.language_model.layers.{layer}.self_attn.q_proj", torch.randn(2, 32), torch.randn(32, 2)
        )
    return pruner.save_pretrained(folder)


def main(count: int, seed: int) -> None:
    faulthandler.enable()
    rng, watch, outcomes = random.Random(seed), Watch(), Counter[str]()
    with tempfile.TemporaryDirectory() as scratch:
        folders = good_folders(Path(scratch))
        for folder in folders:
            load(folder)  # whatever is imported late is imported now
        for case in range(count):
            folder = folders[case % len(folders)]
            files = sorted(p for p in folder.rglob("*") if p.is_file())
            file = rng.choice([p for p in files if (p.suffix == ".json") == bool(case // len(folders) % 2)])
            whole = file.read_bytes()
            if rng.randrange(20) == 0:
                spoiled = b"\x80\x04cos\nsystem\n(S'touch /tmp/run'\ntR."  # a pickle
            elif file.suffix != ".json":
                spoiled = spoil_tensors(whole, rng)
            elif rng.randrange(4):
                spoiled = spoil_json(json.loads(whole), rng).encode("utf-8", "surrogatepass")
            else:
                spoiled = spoil_bytes(whole, rng, len(whole))
            file.write_bytes(spoiled)
            outcomes[attempt(case, folder, len(spoiled), watch)] += 1
            file.write_bytes(whole)
    print(json.dumps(outcomes))


def attempt(case: int, folder: Path, size: int, watch: Watch, allowance: int = ALLOWANCE) -> str:
    """Load a folder under limits; what comes of it."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * size + allowance, hard))
    signal.alarm(SECONDS)
    watch.folder = folder
    try:
        load(folder)
        outcome = "loaded"
    except PruneZooError as error:
        outcome = "refused"
        if "\n" in str(error) or len(str(error)) > 2000:
            raise AssertionError(f"case {case}: not one line: {error}") from error
    finally:
        watch.folder = None
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    if watch.seen:
        raise AssertionError(f"case {case}: {watch.seen}")
    return outcome


def large() -> None:
    """Load a file so large that the allowance is little beside it, and then with a config that asks for more still."""
    with tempfile.TemporaryDirectory() as scratch:
        sizes = {"width": 2048, "hidden": 1024, "heads": 8, "blocks": 1, "text_blocks": 1}
        folder = build_pruner("ppm", **sizes).save_pretrained(Path(scratch, "ppm"))
        config, size = folder / "config.json", (folder / "model.safetensors").stat().st_size
        assert size > ALLOWANCE, size
        stored = json.loads(config.read_text())
        found = [attempt(0, folder, size, Watch(), size // 4)]
        for change in ({"hidden": 2**15}, {"blocks": 1000}, {"width": 2**40}):
            config.write_text(json.dumps({**stored, "config": {**stored["config"], **change}}))
            found.append(attempt(len(found), folder, size, Watch(), size // 4))
    print(json.dumps(found))


if __name__ == "__main__":
    large() if sys.argv[1:] == ["large"] else main(int(sys.argv[1]), int(sys.argv[2]))
