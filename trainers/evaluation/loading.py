"""Bring a frozen vision-language model and its processor into memory, for measuring."""

from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor

from prunezoo.core.errors import PruneZooError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def default_device() -> str:
    """`cuda` where there is a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> str:
    """`float32` on a CPU, `bfloat16` on a GPU."""
    return "float32" if torch.device(device).type == "cpu" else "bfloat16"


def check_device(device: str) -> None:
    """PruneZooError where nothing can be computed on it."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch's words for no, and not built for
        reason = str(error).strip().splitlines()[0]
        raise PruneZooError(f"--device {device}: cannot be used here ({reason}); cpu always can") from None


def load_vlm(source: str, device: str | None = None, dtype: str | None = None) -> tuple[Any, Any]:
    """Load a model and its processor, frozen and in eval mode.

    Args:
        source: local folder or Hub id of a `transformers` image-text-to-text model.
        device: where to; by default a GPU if there is one.
        dtype: float32, bfloat16 or float16; by default float32 on a CPU and bfloat16 on a GPU.

    Raises:
        PruneZooError: there is no such model, or it is none that reads images; or no such device.
    """
    device = device or default_device()
    check_device(device)
    dtype = dtype or default_dtype(device)
    if dtype not in DTYPES:
        raise PruneZooError(f"--dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    try:
        vlm = AutoModelForImageTextToText.from_pretrained(source, dtype=DTYPES[dtype])
        processor = AutoProcessor.from_pretrained(source)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PruneZooError(f"--vlm {source}: not a loadable image-text-to-text model ({reason})") from None
    return vlm.to(device).eval().requires_grad_(False), processor
