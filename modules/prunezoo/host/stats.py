"""What attached pruners did so far: tokens before and after each stage, bytes of KV cache saved, seconds."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .stages.cut import Cut, Timer, layer_mean


@dataclass
class StageStats:
    """One stage of one pruner. One entry for each image, in the order of the calls."""

    pruner: str  # its name
    stage: str
    layer: int | None  # in front of which decoder layer; None: before the language model
    before: list[int] = field(default_factory=list)  # tokens of the image found
    after: list[int] = field(default_factory=list)  # tokens of it left
    timers: list[Timer] = field(default_factory=list, repr=False)

    @property
    def seconds(self) -> float:
        """In the pruner, without vision tower and language model; with the signals that a layer stage needs."""
        return sum(timer.seconds for timer in self.timers)

    def __str__(self) -> str:
        where = f"{self.stage} stage" if self.layer is None else f"{self.stage} stage, layer {self.layer}"
        if not self.before:
            return f"{where}: no images so far"
        before, after = sum(self.before), sum(self.after)
        return (
            f"{where}: {len(self.before)} images, {before} -> {after} tokens "
            f"({100 * after / max(before, 1):.1f} %), {self.seconds:.3f} s in the pruner"
        )


@dataclass
class AttachStats:
    """All stages, in their order."""

    stages: list[StageStats]
    tokens: list[float] = field(default_factory=list)  # of each image in the language model, mean over its layers
    kv_bytes_saved: int | None = 0  # of the caches filled by prompts, in their type and heads; None: unknown

    @property
    def before(self) -> list[int]:
        """Tokens of each image at first."""
        return self.stages[0].before

    @property
    def after(self) -> list[int]:
        """Tokens of each image behind the last stage."""
        return self.stages[-1].after

    @property
    def seconds(self) -> float:
        """In all stages."""
        return sum(stage.seconds for stage in self.stages)

    def add(self, cuts: Sequence[Cut], depth: int) -> None:
        """Count a batch: what each stage did, for a decoder of ``depth`` layers."""
        for stage, cut in zip(self.stages, cuts, strict=True):
            stage.before += cut.before.numpy().tolist()
            stage.after += cut.after.numpy().tolist()
            stage.timers.append(cut.timer)
        self.tokens += layer_mean(cuts, depth).numpy().tolist()

    def add_saved(self, saved: int | None) -> None:
        """Count bytes of a cache; None: unknown, and so is the sum."""
        self.kv_bytes_saved = None if saved is None or self.kv_bytes_saved is None else self.kv_bytes_saved + saved

    def reset(self) -> None:
        """Begin anew."""
        for stage in self.stages:
            stage.before, stage.after, stage.timers = [], [], []
        self.tokens, self.kv_bytes_saved = [], 0

    def __str__(self) -> str:
        lines = [str(stage) for stage in self.stages]
        if self.tokens:
            mean = sum(self.tokens) / len(self.tokens)
            size = "unknown bytes" if self.kv_bytes_saved is None else _size(self.kv_bytes_saved)
            lines.append(f"{mean:.1f} tokens an image, mean over decoder layers; {size} of KV cache saved")
        return "\n".join(lines)


def kv_bytes_saved(cache: Any, dropped: Sequence[int]) -> int | None:
    """Bytes by which a filled cache is smaller than it would be with the columns that were dropped; None: unknown.

    Args:
        cache: A cache of `transformers`.
        dropped: Columns that each layer was spared.

    A layer that keeps a state of one size, or reuses another's keys, saves nothing.
    """
    saved = 0
    for number, (layer, gone) in enumerate(zip(cache.layers, dropped, strict=True)):
        if getattr(layer, "keys", None) is None and not hasattr(layer, "_quantized_keys"):
            continue
        if not isinstance(layer.keys, torch.Tensor) or layer.keys.dim() != 4 or hasattr(layer, "_quantized_keys"):
            return None  # quantized, in a form that is the backend's own
        held = int(cache.get_seq_length(number))
        if layer.is_sliding:  # it holds no more than its window either way
            most = getattr(layer, "sliding_window", held) - 1
            gone = min(held + gone, most) - min(held, most)
        column = (layer.keys.nbytes + layer.values.nbytes) // layer.keys.shape[2]
        saved += gone * column
    return saved


def _size(count: int) -> str:
    """Bytes as people read them."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"
