"""What a token costs in each block of the vision tower and in each layer of the language model."""

from typing import Any

from prunezoo.core.prefill import decoder_flops


def tower_costs(config: Any, tokens: int) -> int:
    """Operations of one block of a plain ViT (CLIP, SigLIP) on one picture of so many patches; CLS is left out.

    Args:
        config: Of the vision model.
        tokens: Patches.
    """
    return attention_cost(config, tokens) + mlp_cost(config, tokens)


def attention_cost(config: Any, tokens: int) -> int:
    """Of that, the attention's part."""
    width = config.hidden_size
    return tokens * (8 * width * width + 4 * tokens * width)


def mlp_cost(config: Any, tokens: int) -> int:
    """And that of the MLP."""
    return 4 * tokens * config.hidden_size * config.intermediate_size


def layer_costs(config: Any, tokens: int) -> int:
    """Operations of one layer of the language model on so many image tokens.

    Args:
        config: Of the language model.
        tokens: Image tokens, of one picture; words are left out.
    """
    return decoder_flops(config, [tokens], [tokens]) - decoder_flops(config, [], [])


def blocks_of(config: Any) -> int:
    """Vision blocks that run: those up to the one that the projector reads, of a model's whole configuration."""
    layer = getattr(config, "vision_feature_layer", -1)
    last = layer if isinstance(layer, int) else layer[-1]
    count = config.vision_config.num_hidden_layers
    return last if last >= 0 else count + 1 + last
