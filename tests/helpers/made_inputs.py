"""Made-up images for pruners that are called without a model, and comparisons of what they leave."""

import dataclasses
from zlib import crc32

import torch

from prunezoo import PruneInputs, list_pruners
from prunezoo.core.registry import pruner_class
from prunezoo.core.signals import parse_signal

DIM, TEXT = 32, 32
GRIDS = ((6, 6), (4, 5), (3, 7))


ALL = list_pruners()


def build(name, seed=0, vlm=None):
    """The smallest instance of a method, for made inputs, or for the tower of a model whose tokens are as wide."""
    torch.manual_seed(seed)
    cls = pruner_class(name)
    config = cls.tiny_config(DIM, TEXT)
    if vlm is not None and "tower_width" in config:
        config["tower_width"] = vlm.config.vision_config.hidden_size
    return cls(**config).eval()


SIGNALS = sorted({name for pruner in ALL for name in build(pruner).needs})


LENGTHS = {"H": 2, "d": DIM // 2, "D": DIM, "F": 24, "C": 3, "p": 4, "2": 2}
"""Of the axes of signals besides tokens and words."""

HEADS = {"prompt_head_attention": 4}  # as the tiny model
"""H of kinds where it is another."""


STATES = {"vision_inputs": DIM, "vision_states": DIM}
"""C of kinds that are as wide as the tower: in the vision stage the tokens themselves are."""


def lengths(name, **others):
    """Of the axes of a signal, behind that of images."""
    kind = parse_signal(name).kind
    known = {**LENGTHS, "H": HEADS.get(kind, LENGTHS["H"]), "C": STATES.get(kind, LENGTHS["C"]), **others}
    return [known[axis] for axis in parse_signal(name).axes[1:]]


def make_inputs(grids=GRIDS, seed=0, pad=0, text_pad=0):
    """Ragged images in front of decoder layer 1; what stands on padding is large and different each time."""
    random = torch.Generator().manual_seed(seed)
    rows, width = len(grids), max(h * w for h, w in grids) + pad
    words = 5 + text_pad
    noise = torch.Generator().manual_seed(1000 + pad)
    features = 100 * torch.randn(rows, width, DIM, generator=noise)
    maps = {name: 100 * torch.rand(rows, *lengths(name, N=width, T=words), generator=noise) for name in SIGNALS}
    text = 100 * torch.randn(rows, words, TEXT, generator=noise)
    valid, text_valid = torch.zeros(rows, width, dtype=torch.bool), torch.zeros(rows, words, dtype=torch.bool)
    cells = torch.full((rows, width, 3), -1)
    for i, (h, w) in enumerate(grids):
        n, t = h * w, 5 - i
        valid[i, :n], text_valid[i, :t] = True, True
        row, column = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        cells[i, :n] = torch.stack([torch.zeros_like(row), row, column], -1).flatten(0, 1)
        features[i, :n] = torch.randn(n, DIM, generator=random)
        for name in SIGNALS:
            # Of its own, so that what a new method needs changes nothing for the others.
            alone = torch.Generator().manual_seed(crc32(f"{name} {i} {seed}".encode()))
            real = torch.rand(lengths(name, N=n, T=t), generator=alone)
            real = real - 0.5 if "activations" in name else real
            maps[name][i][tuple(slice(length) for length in real.shape)] = real
        text[i, :t] = torch.randn(t, TEXT, generator=random)
    return PruneInputs(features, valid, cells, text, text_valid, maps, layer=1)


def take_rows(inputs, rows, tokens=None, words=None):
    """Some rows, cut to so many tokens and words."""
    cut = {"N": tokens, "T": words}
    signals = {
        name: values[rows][(slice(None), *(slice(cut.get(axis)) for axis in parse_signal(name).axes[1:]))]
        for name, values in inputs.signals.items()
    }
    features, valid, cells = (part[rows, :tokens] for part in (inputs.features, inputs.valid, inputs.cells))
    text, text_valid = inputs.text[rows, :words], inputs.text_valid[rows, :words]
    return dataclasses.replace(
        inputs, features=features, valid=valid, cells=cells, text=text, text_valid=text_valid, signals=signals
    )


def same(one, two, row_one, row_two, tokens_one, tokens_two):
    """The two rows keep the same slots and hand on the same tokens."""
    k = int(one.count[row_one])
    assert k == int(two.count[row_two])
    assert torch.equal(one.index[row_one, :k], two.index[row_two, :k])
    # Other batch shapes take other paths through BLAS: last bits may differ.
    torch.testing.assert_close(tokens_one[row_one, :k], tokens_two[row_two, :k], rtol=1e-5, atol=1e-5)
