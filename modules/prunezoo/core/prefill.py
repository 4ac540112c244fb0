"""Work of a frozen model in a prefill, in floating-point operations: what a pruner's own work is measured against.

A multiplication and an addition are two operations. Matrix products are counted, as `torch.utils.flop_counter` counts
them: attention in full, without the half that a causal kernel may skip; norms, activations and the rotary embedding
left out. A sliding window is not counted either: at prompts shorter than it there is no difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

NEEDED = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
"""What a decoder's configuration must say; one whose layers are of another kind does not."""
TOKENS, WORDS = 576, 24
"""Of a picture where the configuration does not say it (LLaVA-1.5's), and of the prompt beside it."""
KEPT = 9
"""Of so many tokens one is kept, for pruners whose work depends on it."""


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


@dataclass(frozen=True)
class Prefill:
    """One picture and a short prompt, read by a language model with all tokens."""

    tokens: int  # of the picture
    words: int  # of the prompt
    flops: int  # of the language model

    @classmethod
    def of(cls, config: Any) -> Self | None:
        """By the configuration of a vision-language model; None where its decoder is of another kind."""
        text = config.get_text_config()
        if not all(isinstance(getattr(text, name, None), int) for name in NEEDED):
            return None
        tokens = getattr(config, "image_seq_length", None) or TOKENS
        read = [tokens + WORDS] * text.num_hidden_layers
        return cls(tokens, WORDS, decoder_flops(text, read, read))

    @property
    def kept(self) -> int:
        """Tokens that a pruner is asked for."""
        return max(1, round(self.tokens / KEPT))
