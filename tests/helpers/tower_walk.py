"""A plain ViT walked by hand, one picture at a time, for methods that change more than which tokens are there."""

from dataclasses import dataclass, field

import torch
from tower_oracle import embed
from vision_runs import SIDE


@dataclass
class Seen:
    """What there is inside a block, of S tokens, P of them before the patches."""

    block: int
    prefix: int
    entered: torch.Tensor  # (S, D) what the block was given
    states: torch.Tensor  # (S, D) behind its attention, or behind its MLP
    weights: torch.Tensor  # (H, S, S)
    keys: torch.Tensor  # (H, S, d)
    given: torch.Tensor  # (H, S, d) what the heads give, before they are joined
    alive: list[int]  # the patches that are there, in their numbers in the picture
    sizes: list[float]  # how often each of them counts


@dataclass
class Done:
    """What a method makes of it."""

    kept: list[int]  # places in `alive`, ascending
    states: torch.Tensor | None = None  # (K, D); None: as they were
    sizes: list[float] | None = None
    heads: list[bool] | None = field(default=None)  # False: it gives 0 from here on


def walk(model, tower, pixels, act, after_block=False):
    """One picture ``(3, side, side)`` through the tower: the patches that are left, and their states."""
    hidden, prefix = embed(model, pixels[None])[0], tower.prefix
    alive = list(range(len(hidden) - prefix))
    sizes, heads = [1.0] * len(alive), None
    for number in range(tower.depth):
        block = model.encoder.layers[number]
        attention, normed, entered = block.self_attn, block.layer_norm1(hidden), hidden
        query, key, value = (
            part(normed).unflatten(-1, (attention.num_heads, -1)).transpose(0, 1)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        bias = torch.tensor([1.0] * prefix + sizes).log()
        weights = (query @ key.transpose(1, 2) * attention.scale + bias).softmax(-1)
        given = weights @ value
        for head, counts in enumerate(heads or []):
            given[head] *= counts
        hidden = hidden + attention.out_proj(given.transpose(0, 1).flatten(1))
        if after_block:
            hidden = hidden + block.mlp(block.layer_norm2(hidden))
        done = act(Seen(number, prefix, entered, hidden, weights, key, given, alive, sizes))
        states = hidden[prefix:][done.kept] if done.states is None else done.states
        sizes = [sizes[i] for i in done.kept] if done.sizes is None else done.sizes
        alive, heads = [alive[i] for i in done.kept], done.heads
        hidden = torch.cat([hidden[:prefix], states])
        if not after_block:
            hidden = hidden + block.mlp(block.layer_norm2(hidden))
    return alive, hidden[prefix:]


def best(scores, count):
    """Places of the ``count`` highest, the first of equals, ascending."""
    return sorted(sorted(range(len(scores)), key=lambda i: -float(scores[i]))[:count])


def touch(one, two):
    """Whether two patches of the square are neighbours, corners too."""
    (a, b), (c, d) = divmod(one, SIDE), divmod(two, SIDE)
    return one != two and abs(a - c) <= 1 and abs(b - d) <= 1
