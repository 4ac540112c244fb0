"""Operations of a forward pass under a pruner, as a share of those on all tokens: vision tower and language model.

The tower counts as it ran, block by block; the language model reads the words of the prompt and of the answer besides.
Embeddings, projector and what the pruner does itself are left out.
"""

from typing import Any

import torch
from torch import Tensor

from prunezoo.core.contract import Pruner
from prunezoo.core.prefill import decoder_flops
from prunezoo.host import Encoded
from prunezoo.host.families import find_family
from prunezoo.host.parts.tower import Tower
from prunezoo.host.run import PrunedRun
from trainers.planning.costs import attention_cost, mlp_cost

NEEDED = ("hidden_size", "intermediate_size", "num_attention_heads")
"""What a decoder's configuration must say; one whose layers are of another kind does not."""


def flops_share(vlm: Any, encoded: Encoded, run: PrunedRun | None) -> Tensor:
    """Of each sample.

    Args:
        vlm: The model.
        encoded: Its batch.
        run: What was pruned of it; None: nothing.

    Returns:
        ``(B,)`` double; nan where a sample has several images, where an image's patches are not the tokens of the
        language model, or where its decoder is of another kind.
    """
    family = find_family(vlm)
    counts = torch.tensor(encoded.inputs.counts, dtype=torch.long)
    depth = family.decoder().depth
    layers = counts[:, None].expand(-1, depth) if run is None else run.layers.cpu()
    text = vlm.config.get_text_config()
    nothing = torch.full((len(encoded.mask),), torch.nan, dtype=torch.double)
    one_each = encoded.rows == tuple(range(len(encoded.mask))) and not encoded.clips
    if not all(hasattr(text, name) for name in NEEDED) or not one_each:
        return nothing
    tower = family.tower()
    vision = tower.model.config
    if tower.joined is not None or not hasattr(vision, "intermediate_size"):
        return nothing
    every = counts[:, None, None].expand(-1, tower.depth, 2)
    ran = every
    if run is not None and run.blocks is not None:
        ran = run.blocks
    elif run is not None and run.cuts[0].stage == "input":
        ran = run.cuts[0].after[:, None, None].expand_as(every)
    words = encoded.mask.sum(1).cpu() - counts
    shares = []
    for row, n in enumerate(counts.tolist()):
        read = [int(words[row]) + tokens for tokens in layers[row].tolist()]
        all_read = [int(words[row]) + n] * len(read)
        made = tower_flops(vision, ran[row]) + decoder_flops(text, read, read)
        shares.append(made / (tower_flops(vision, every[row]) + decoder_flops(text, all_read, all_read)))
    return torch.tensor(shares, dtype=torch.double)


def tower_flops(config: Any, blocks: Tensor) -> int:
    """Operations of a plain ViT on one picture.

    Args:
        config: Of the vision model.
        blocks: ``(blocks, 2)`` long: patches in attention and MLP.
    """
    return sum(attention_cost(config, looking) + mlp_cost(config, left) for looking, left in blocks.tolist())


def planned_tower_share(pruner: Pruner, keep: int, tokens: int, tower: Tower) -> float:
    """Operations of a plain ViT under a pruner that keeps to its schedule, as a share of those on all patches.

    Args:
        pruner: Of the vision stage.
        keep: Tokens that its last block leaves.
        tokens: Patches of the picture.
        tower: The tower.
    """
    asked, found = torch.tensor([keep]), torch.tensor([tokens])
    left = dict(zip(pruner.stages(tower.depth), pruner.steps(asked, found, tower.depth), strict=True))
    blocks, before = [], tokens
    for block in range(tower.depth):
        after = int(left[block]) if block in left else before
        blocks.append((before, before if pruner.after_block else after))
        before = after
    every = torch.full((tower.depth, 2), tokens)
    return tower_flops(tower.model.config, torch.tensor(blocks)) / tower_flops(tower.model.config, every)
