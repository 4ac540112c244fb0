"""A plain ViT run by hand, one picture at a time, with lists where the code under test has masks and hooks."""

from math import isqrt

import torch
from torch.nn import functional


def embed(model, pixels):
    hidden = model.embeddings(pixels)
    return model.pre_layrnorm(hidden) if hasattr(model, "pre_layrnorm") else hidden


def nearest(places, sizes):
    """Which of ``places`` (row, column) is nearest to their mean, weighted by ``sizes``; the first of equals."""
    middle = [sum(p[axis] * s for p, s in zip(places, sizes, strict=True)) / sum(sizes) for axis in (0, 1)]
    far = [(p[0] - middle[0]) ** 2 + (p[1] - middle[1]) ** 2 for p in places]
    return next(i for i, distance in enumerate(far) if distance < min(far) + 1e-9)


def by_hand(model, tower, pixels, decide, after_block=False, kept=None):
    """One picture ``(3, side, side)`` through the tower.

    Args:
        model: Of CLIP's or SigLIP's make.
        tower: Says how far, and whether there is a CLS.
        pixels: The picture.
        decide: Is given the block's number, the states of its tokens, their keys (mean over heads), how many patches
            each stands for, and the attention that each receives; gives lists of tokens that become one.
        after_block: Whether it decides on the output of the block.
        kept: The patches that enter the first block; None: all.

    Returns:
        The patches that each token stands for that is left, and the states of these.
    """
    hidden, prefix = embed(model, pixels[None])[0], tower.prefix
    count = len(hidden) - prefix
    members, places = [[patch] for patch in range(count)], [divmod(patch, isqrt(count)) for patch in range(count)]
    if kept is not None:
        hidden = torch.cat([hidden[:prefix], hidden[prefix:][kept]])
        members, places = [members[patch] for patch in kept], [places[patch] for patch in kept]
    for number in range(tower.depth):
        block = model.encoder.layers[number]
        attention, normed = block.self_attn, block.layer_norm1(hidden)
        query, key, value = (
            part(normed).unflatten(-1, (attention.num_heads, -1)).transpose(0, 1)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        sizes = [len(patches) for patches in members]
        bias = torch.tensor([1] * prefix + sizes).log()
        weights = (query @ key.transpose(1, 2) * attention.scale + bias).softmax(-1)
        hidden = hidden + attention.out_proj((weights @ value).transpose(0, 1).flatten(1))
        if after_block:
            hidden = hidden + block.mlp(block.layer_norm2(hidden))
        received = weights.mean((0, 1))[prefix:]
        groups = [sorted(group) for group in decide(number, hidden[prefix:], key.mean(0)[prefix:], sizes, received)]
        at = {g[nearest([places[t] for t in g], [sizes[t] for t in g])]: g for g in groups}
        states = [sum(hidden[prefix + t] * sizes[t] for t in at[a]) / sum(sizes[t] for t in at[a]) for a in sorted(at)]
        members = [[patch for t in at[a] for patch in members[t]] for a in sorted(at)]
        places = [places[a] for a in sorted(at)]
        hidden = torch.cat([hidden[:prefix], torch.stack(states)])
        if not after_block:
            hidden = hidden + block.mlp(block.layer_norm2(hidden))
    return members, hidden[prefix:]


def slots_of(members, count):
    """For each token the patch nearest to the middle of those it stands for, of a square of ``count``."""
    whole, side = [sorted(patches) for patches in members], isqrt(count)
    return [own[nearest([divmod(patch, side) for patch in own], [1] * len(own))] for own in whole]


def tome_by_hand(left, metric="keys", most=0.5):
    """Token merging with lists, to ``left[block]`` tokens in each block."""

    def decide(block, states, keys, sizes, _received):
        vectors = keys if metric == "keys" else states
        groups = {t: [t] for t in range(len(sizes))}
        while len(groups) > left[block]:
            mean = {t: sum(vectors[i] * sizes[i] for i in g) / sum(sizes[i] for i in g) for t, g in groups.items()}
            tokens, links = sorted(groups), []
            for a in tokens[1::2]:
                near = [float(functional.cosine_similarity(mean[a], mean[b], dim=0)) for b in tokens[::2]]
                links.append((max(near), a, tokens[::2][near.index(max(near))]))
            links.sort(key=lambda link: -link[0])
            for _, a, b in links[: min(len(groups) - left[block], max(int(len(groups) * most), 1))]:
                groups[b] = groups[b] + groups.pop(a)
        return list(groups.values())

    return decide
