"""The command `prunezoo`: what needs no trainer.

prunezoo list
prunezoo attach-check llava-hf/llava-1.5-7b-hf
prunezoo serve-args divprune --keep 64
"""

import argparse
import inspect
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from . import __version__
from .core.budgets import read_keep
from .core.errors import PruneZooError
from .core.hub import DTYPES
from .core.registry import list_pruners, load_pruner, pruner_class
from .doctor import doctor, small_pruner
from .host.parts.loading import default_device, default_dtype, load_vlm
from .serve import PROMPT_NOTE, hf_overrides, words_of

WIDTH = 32
"""Of the tokens for which `list` builds a method, to see whether it has weights."""
QUESTION = "What is in the picture?"


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; the exit code is 0, 1 where nothing works on a model, 2 after a mistake, said in one line."""
    args = parser().parse_args(sys.argv[1:] if argv is None else list(argv))
    try:
        return int(args.run(args))
    except PruneZooError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="prunezoo", description="Visual-token pruners for frozen vision-language models.")
    p.add_argument("--version", action="version", version=f"prunezoo {__version__}")
    commands = p.add_subparsers(required=True, metavar="COMMAND")

    listed = commands.add_parser("list", help="the methods, or all about some of them")
    listed.add_argument("name", nargs="*", help="methods")
    listed.set_defaults(run=list_methods)

    checked = commands.add_parser("attach-check", help="which methods work on a model, and why the others do not")
    checked.add_argument("vlm", help="folder or Hub id of a transformers image-text-to-text model")
    checked.add_argument("--keep", default="0.5", help="tokens (64) or a share (1/9); by default half")
    checked.add_argument("--device", help="by default a GPU if there is one")
    checked.add_argument("--dtype", choices=DTYPES, help="by default float32 on a CPU, bfloat16 on a GPU")
    checked.set_defaults(run=attach_check)

    served = commands.add_parser("serve-args", help="vLLM's arguments to serve a model under a pruner")
    served.add_argument("pruner", help="a method, folder or Hub id")
    served.add_argument("--keep", required=True, help="tokens an image (64) or a share (1/9), at most")
    served.add_argument("--positions", default="original", help="original, or compact: cheaper for vLLM, less exact")
    served.set_defaults(run=serve_args)
    return p


def list_methods(args: argparse.Namespace) -> int:
    """Print the methods, or the whole text of those that are named."""
    for name in args.name:
        print(f"{name}\n\n{inspect.getdoc(inspect.getmodule(pruner_class(name)))}\n")
    if args.name:
        return 0
    for name in list_pruners():
        cls = pruner_class(name)
        learned = any(True for _ in small_pruner(name, WIDTH).parameters()) if name != "combined" else True
        first = (inspect.getdoc(inspect.getmodule(cls)) or "").split("\n\n")[0]
        about = " ".join(first.split()).partition(". ")[0].rstrip(".")
        print(f"{name:<16} {cls.stage:<7} {'learned' if learned else 'ready':<8} {about}")
    return 0


def attach_check(args: argparse.Namespace) -> int:
    """Print what works on a model."""
    keep = read_keep(args.keep)
    device = args.device or default_device()
    vlm, processor = load_vlm(args.vlm, device, args.dtype or default_dtype(device))
    found = doctor(vlm, example(processor, vlm), keep)
    print(found)
    return 0 if found.working else 1


def example(processor: Any, vlm: Any) -> dict[str, Any]:
    """A question about a picture, as a model's processor makes it, where the model is.

    Raises:
        PruneZooError: the processor has no chat template.
    """
    if not getattr(processor, "chat_template", None):
        raise PruneZooError(f"{type(processor).__name__} has no chat template: call prunezoo.doctor with inputs")
    noise = np.random.default_rng(0).integers(0, 255, (336, 336, 3), dtype=np.uint8)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    start = getattr(processor.tokenizer, "bos_token", None)
    return dict(
        processor(
            text=[text],
            images=[[Image.fromarray(noise)]],
            add_special_tokens=start is None or not text.startswith(start),  # the template may have written it
            return_tensors="pt",
        ).to(vlm.device)
    )


def serve_args(args: argparse.Namespace) -> int:
    """Print the arguments; they need no quotes."""
    overrides = hf_overrides(args.pruner, args.keep, args.positions)
    if load_pruner(args.pruner).reads_prompt:
        print(PROMPT_NOTE.format(name=args.pruner), file=sys.stderr)
    print(" ".join(words_of({"hf-overrides": overrides})))
    return 0
