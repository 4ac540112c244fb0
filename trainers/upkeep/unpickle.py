"""Turn a pickled state dict into safetensors: `python -m trainers.upkeep.unpickle weights.bin weights.safetensors`.

For weights that are published as a pickle only. A pickle can carry code; this reads it with torch's weights-only
loader, which refuses everything but tensors and plain containers, and only after asking.
"""

import argparse
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from prunezoo.core.errors import PruneZooError
from trainers.cli.errors import command, one_line

MOST_TIMES = 4
"""What tensors may take, in sizes of their file: some have one memory under two names."""


def unpickle(source: Path, target: Path) -> int:
    """Write the tensors of a pickled state dict to a safetensors file; their number.

    Raises:
        PruneZooError: It cannot be read, or holds anything but tensors that are whole in the file.
    """
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = one_line(error)
        raise PruneZooError(f"{source}: refused by torch's weights-only loader ({reason})") from None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise PruneZooError(f"{source}: not a state dict, which maps names to tensors")
    if any(tensor.layout is not torch.strided or tensor.is_meta for tensor in state.values()):
        raise PruneZooError(f"{source}: holds tensors without plain numbers, which are no weights")
    # expanded tensors, and one memory under many names, are made whole when they are written: gigabytes of a few bytes
    asked, size = sum(tensor.numel() * tensor.element_size() for tensor in state.values()), source.stat().st_size
    if asked > MOST_TIMES * size:
        raise PruneZooError(f"{source}: {size:,} bytes that ask for {asked:,}; its tensors are not whole in the file")
    target.parent.mkdir(parents=True, exist_ok=True)
    # clones: a state dict may hold one memory under two names, a safetensors file may not
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, target, metadata={"format": "pt"})
    return len(state)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Ask, then convert."""
    p = argparse.ArgumentParser(
        prog="python -m trainers.upkeep.unpickle", description="Pickled weights to safetensors."
    )
    p.add_argument("source", type=Path, help="a pickled state dict, such as pytorch_model.bin")
    p.add_argument("target", type=Path, help="the safetensors file to write")
    p.add_argument("--yes", action="store_true", help="do not ask")
    args = p.parse_args(argv)
    if not args.yes:
        print(f"{args.source} is a pickle. It will be read with torch's weights-only loader. Do you trust its source?")
        if not sys.stdin.isatty() or input("[y/N] ").strip().lower() not in ("y", "yes"):
            raise PruneZooError(f"{args.source} was not read: answer y, or give --yes")
    print(f"{args.target}: {unpickle(args.source, args.target)} tensors")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
