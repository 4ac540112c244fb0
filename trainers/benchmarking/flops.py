"""Floating-point operations of a vision-language model, from which the ideal speed-up of dropping tokens follows.

They are counted as in `prunezoo/core/prefill.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from prunezoo.core.prefill import decoder_flops


@dataclass(frozen=True)
class Work:
    """Operations of one request, by the part of the model that does them; the pruner's own are no part of it."""

    vision: int  # tower and projector
    prefill: int  # language model up to the first new token
    decode: int  # language model, all later tokens

    def of(self, part: str) -> int | None:
        """Operations of a timed part; None for parts whose time is no matter of the model's operations."""
        sums = {
            "vision": self.vision,
            "prefill": self.prefill,
            "decode": self.decode,
            "first_token": self.vision + self.prefill,
            "end_to_end": self.vision + self.prefill + self.decode,
        }
        return sums.get(part)


def request_work(config: Any, lengths: Sequence[int], decode: int, batch: int, vision: int) -> Work:
    """Work of a whole request.

    Args:
        config: Of the language model.
        lengths: Prompt tokens that each decoder layer really reads.
        decode: New tokens; the first one comes out of the prefill.
        batch: Rows, all of the same length.
        vision: Operations of the vision tower and projector, for the whole batch.
    """
    ones = [1] * len(lengths)
    steps = sum(decoder_flops(config, ones, [length + step for length in lengths]) for step in range(1, decode))
    return Work(vision, batch * decoder_flops(config, lengths, lengths), batch * steps)


def counter() -> FlopCounterMode:
    """Counts operations as they happen, on a CPU too."""

    def cpu_attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)  # the one attention kernel that torch's counter does not know

    def cpu_attention_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    kernels = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: cpu_attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: cpu_attention_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=kernels)


def counted_flops(run: Callable[[], Any]) -> tuple[Any, int]:
    """What ``run`` returns, and the operations that it took, counted by torch as they happen."""
    with counter() as counting:
        result = run()
    return result, counting.get_total_flops()
