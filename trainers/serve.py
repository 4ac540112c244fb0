"""Serve a model under a pruner by vLLM: `python -m trainers.serve --vlm V --pruner P --keep 64`; see docs/serving.md.

    python -m vllm.entrypoints.openai.api_server --model V $(python -m trainers.serve --pruner P --keep 64 --print-args)

Options that are not ours go on to vLLM's server. The arguments that `--print-args` writes need no quotes.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from prunezoo.core.errors import PruneZooError
from prunezoo.core.registry import load_pruner
from prunezoo.serve import PROMPT_NOTE, hf_overrides, words_of
from trainers.cli.errors import command
from trainers.cli.names import find_pruner, find_vlm
from trainers.cli.options import add_option

SERVER = "vllm.entrypoints.openai.api_server"


def start(words: list[str]) -> None:
    """Put another program in the place of this process, which gets its signals."""
    sys.stdout.flush()
    os.execv(words[0], words)  # noqa: S606


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print vLLM's arguments, or start its server in the place of this process."""
    p = argparse.ArgumentParser(
        prog="python -m trainers.serve", description="Serve a model under a pruner by vLLM.", allow_abbrev=False
    )
    add_option(p, "vlm")
    add_option(p, "pruner", nargs=None, default=None, required=True, help="a method, shipped pruner, folder or Hub id")
    add_option(p, "keep", nargs=None, required=True, help="tokens an image (64) or a share (1/9), at most")
    p.add_argument("--positions", default="original", help="original, or compact: cheaper for vLLM, less exact")
    p.add_argument("--print-args", action="store_true", help="print the arguments for vLLM's server and start nothing")
    args, others = p.parse_known_args(argv)
    pruner = find_pruner(args.pruner)
    overrides = hf_overrides(pruner, args.keep, args.positions)
    if load_pruner(pruner).reads_prompt:
        print(PROMPT_NOTE.format(name=args.pruner), file=sys.stderr)
    words = [*words_of({"hf-overrides": overrides}), *others]
    if args.print_args:
        print(" ".join(words))
        return 0
    if args.vlm is None:
        raise PruneZooError("--vlm is missing: name the model to serve, or --print-args to start vLLM yourself")
    if find_spec("vllm") is None:
        raise PruneZooError("vLLM is not installed here: see docs/serving.md, or use --print-args")
    start([sys.executable, "-m", SERVER, "--model", find_vlm(args.vlm), *words])
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
