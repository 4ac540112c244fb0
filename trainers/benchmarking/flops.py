"""Floating-point operations of a vision-language model, from which the ideal speed-up of dropping tokens follows.

A multiplication and an addition are two operations. Matrix products are counted, as `torch.utils.flop_counter` counts
them: attention in full, without the half that a causal kernel may skip; norms, activations and the rotary embedding
left out. A sliding window is not counted either: at prompts shorter than it there is no difference.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count


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


def decoder_flops(config: Any, queries: Sequence[int], keys: Sequence[int]) -> int:
    """Operations of one forward pass of a gated decoder (Llama, Mistral, Qwen, Gemma) over one row of a batch.

    Args:
        config: Of the language model, `vlm.config.get_text_config()`.
        queries: Tokens that each decoder layer computes.
        keys: Tokens that each of them attends to, its cache and its own.

    Returns:
        Operations of the layers, and of the output embedding for the last position alone, as `generate` asks for it.
    """
    width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or width // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    projections = 2 * width * head * (heads + groups)  # query and output; key and value
    weights = projections + 3 * width * inner  # gate, up and down
    layers = sum(2 * q * weights + 4 * q * k * heads * head for q, k in zip(queries, keys, strict=True))
    return layers + 2 * width * config.vocab_size


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
