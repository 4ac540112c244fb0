"""Bring a vision-language model and its processor into memory, from a folder or from the Hub."""

from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor

from ...core.errors import PruneZooError
from ...core.hub import DTYPES


def load_vlm(source: str, device: str, dtype: str) -> tuple[Any, Any]:
    """A model, frozen and in eval mode, and its processor.

    Args:
        source: Local folder or Hub id of a `transformers` image-text-to-text model.
        device: Where to.
        dtype: Key of ``hub.DTYPES``.

    Raises:
        PruneZooError: No such type; no such model, or it is none that reads images.
    """
    if dtype not in DTYPES:
        raise PruneZooError(f"dtype={dtype}: write {', '.join(DTYPES)}")
    try:
        vlm = AutoModelForImageTextToText.from_pretrained(source, dtype=DTYPES[dtype])
        processor = AutoProcessor.from_pretrained(source)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PruneZooError(f"{source}: not a loadable image-text-to-text model ({reason})") from None
    return vlm.to(device).eval().requires_grad_(False), processor


def default_device() -> str:
    """`cuda` where there is a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> str:
    """`float32` on a CPU, `bfloat16` on a GPU."""
    return "float32" if torch.device(device).type == "cpu" else "bfloat16"
