"""ToMe with unmerging: the vision tower works on merged tokens, and gives one for every patch again.

Token Merging for Fast Stable Diffusion, Bolya and Hoffman, CVPR workshops 2023, https://arxiv.org/abs/2303.17604,
code https://github.com/dbolya/tomesd. There tokens are merged in front of a module and unmerged behind it. Ours: they
stay merged through all blocks of the tower, as with `tome`, and each patch then gets a copy of the token that it went
into. So the tower is faster, and the language model reads all tokens: combine it with a pruner of a later stage.
"""

from ..core.registry import register_pruner
from .tome import ToMe


@register_pruner("tome_unmerge")
class ToMeUnmerge(ToMe):
    """Bipartite matching in all blocks, undone behind them; `keep` is what the last block leaves."""

    restore = True
