"""Token Transforming with its inverse: the tower works on fewer tokens, and gives one for every patch again.

The map is that of `token_transforming`, which is inspired by https://arxiv.org/abs/2506.05709; how the paper goes back,
as it must for dense tasks, is not public. Ours: behind the last block each patch is the mixture of the tokens that are
left by its shares in them, through all maps in turn. So the tower is faster, and the language model reads all tokens:
combine it with a pruner of a later stage.
"""

from ..core.registry import register_pruner
from .token_transforming import TokenTransforming


@register_pruner("token_transforming_inverse")
class TokenTransformingInverse(TokenTransforming):
    """A dense map in some blocks, undone behind the last one; `keep` is what the last map leaves."""

    restore = True
