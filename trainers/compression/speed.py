"""Pictures a second of encoding and decoding, as ratios against the same ViT's bare forward."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunezoo.tokenizers.base import Text, Tokenizer

Row = dict[str, Any]


@torch.no_grad()
def measure_speed(
    tokenizer: Tokenizer, images: Tensor, lengths: Sequence[int], repeats: int, name: str, text: Text | None = None
) -> list[Row]:
    """`{dtype, part, tokens, per_second, ratio, spread}`, timed in turns with the bare ViT.

    Args:
        tokenizer: In eval mode, on the device and in the type that are timed.
        images: ``(B, 3, S, S)``.
        lengths: Tokens that decoding reads.
        repeats: Pairs of a case and the bare ViT; medians over them, and the interquartile range of the ratio.
        name: Of the type.
        text: Beside each of the pictures, where the tokenizer reads one.
    """
    codes = tokenizer.encode(images, text)
    cases: list[tuple[str, int | None, Callable[[], Tensor]]] = [
        ("encode", tokenizer.config.tokens, lambda: tokenizer.encode(images, text))
    ]
    cases += [("decode", k, lambda k=k: tokenizer.decode(codes[:, : tokenizer.numbers(k)], text)) for k in lengths]  # type: ignore[misc]
    rows = []
    everything = []
    for part, tokens, case in cases:
        pairs = []
        for turn in range(repeats + 1):
            both = (lambda: tokenizer.bare(images), case)
            seconds = [_seconds(run, images.device) for run in (both if turn % 2 else both[::-1])]
            pairs.append(seconds if turn % 2 else seconds[::-1])
        bare, own = np.array(pairs[1:]).T  # the first pair warms up
        everything.append(bare)
        rows.append(_row(name, part, tokens, len(images), own, bare / own))
    bare = np.concatenate(everything)
    return [_row(name, "bare ViT", None, len(images), bare, np.ones(1)), *rows]


def _row(name: str, part: str, tokens: int | None, batch: int, seconds: np.ndarray, ratio: np.ndarray) -> Row:
    low, high = np.quantile(ratio, [0.25, 0.75])
    return {
        "dtype": name,
        "part": part,
        "tokens": tokens,
        "per_second": round(float(batch / np.median(seconds)), 2),
        "ratio": round(float(np.median(ratio)), 4),
        "spread": round(float(high - low), 4),
    }


def _seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun
