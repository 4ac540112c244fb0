"""VisPruner against a slow reading of its definition, and what neither that nor the shared tests show."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from made_inputs import make_inputs

from prunezoo import PruneZooError, build_pruner

CLS, STATES = "cls_attention", "vision_states"


def with_signals(inputs, alike=0.3, seed=0):
    """With tokens of seven kinds, more or less alike within each."""
    random = torch.Generator().manual_seed(seed)
    rows, width = inputs.valid.shape
    kinds = torch.randn(7, 10, generator=random)[torch.arange(width) % 7]
    states = kinds + alike * torch.randn(rows, width, 10, generator=random)
    attention = torch.rand(rows, width, generator=random)
    states, attention = states.masked_fill(~inputs.valid[..., None], 9.0), attention.masked_fill(~inputs.valid, 9.0)
    return replace(inputs, signals={**inputs.signals, CLS: attention, STATES: states})


def slow(inputs, row, keep, important=0.5, at_once=8):
    """One image, round by round, cosines computed anew in each."""
    count = int(inputs.valid[row].sum())
    attention, states = (inputs.signal(name)[row, :count].double().numpy() for name in (CLS, STATES))
    unit = states / np.linalg.norm(states, axis=1, keepdims=True)
    order, own = np.argsort(-attention, kind="stable"), int(keep * important)
    chosen, rest = order[:own], order[own:]
    while len(rest) > keep - own > 0:
        even, odd = rest[::2], rest[1::2]
        nearest = (unit[even] @ unit[odd].T).round(12).max(1)
        gone = min(at_once, len(rest) - (keep - own))
        rest = np.concatenate([even[np.argsort(-nearest, kind="stable")[gone:]], odd])
    return sorted([*chosen.tolist(), *rest[: keep - own].tolist()])


@pytest.mark.parametrize("important", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("at_once", [1, 3, 8, 100])
def test_it_is_its_definition(important, at_once):
    """Even and odd numbers of others, since budgets and images differ; 36, 20 and 21 tokens of which as many go."""
    inputs, pruner = with_signals(make_inputs(pad=3)), build_pruner("vispruner", important=important, at_once=at_once)
    for keep in (1, 2, 5, 12, 19, torch.tensor([30, 1, 18])):
        output = pruner(inputs, keep)
        for row, asked in enumerate(keep.tolist() if isinstance(keep, torch.Tensor) else [keep] * 3):
            expected = slow(inputs, row, asked, important, at_once)
            assert output.index[row, : output.count[row]].tolist() == expected, (keep, row)


def test_the_odd_case_that_the_authors_code_refuses():
    inputs = with_signals(make_inputs(grids=((24, 24),)))
    output = build_pruner("vispruner")(inputs, 66)
    assert output.index[0].tolist() == slow(inputs, 0, 66) and (576 - 33) % 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tokens_that_are_equal_are_chosen_by_their_place_in_any_batch(dtype):
    """No noise of a product of matrices decides, however many images it has."""
    one = with_signals(make_inputs(grids=((12, 13),)), alike=0.0)
    one = replace(one, signals={name: values.to(dtype) for name, values in one.signals.items()})
    many = {name: values.repeat(3, *[1] * (values.dim() - 1)) for name, values in one.signals.items()}
    three = replace(make_inputs(grids=((12, 13),) * 3), signals=many)
    kept = build_pruner("vispruner")(one, 21).index[0].tolist()
    assert kept == slow(one, 0, 21)
    assert build_pruner("vispruner")(three, 21).index.tolist() == [kept] * 3


def test_duplicates_go_first():
    """Of seven kinds, all but equal within each, and seven places: one each, however much attention the others get."""
    inputs = with_signals(make_inputs(grids=((6, 7),)), alike=1e-3)
    kept = build_pruner("vispruner", important=0.0, at_once=1)(inputs, 7).index[0]
    by_attention = build_pruner("vispruner", important=1.0)(inputs, 7).index[0]
    assert len(set((kept % 7).tolist())) == 7 > len(set((by_attention % 7).tolist()))


def test_towers_without_cls_have_received_attention():
    inputs = with_signals(make_inputs())
    moved = replace(inputs, signals={"received_attention": inputs.signal(CLS), STATES: inputs.signal(STATES)})
    pruner = build_pruner("vispruner", attention="received")
    assert torch.equal(pruner(moved, 9).index, build_pruner("vispruner")(inputs, 9).index)


@pytest.mark.parametrize("bad", [{"important": 1.5}, {"attention": "last"}, {"at_once": 0}], ids=str)
def test_what_is_out_of_range_is_refused(bad):
    with pytest.raises(PruneZooError, match=f"{next(iter(bad))}=.*vispruner"):
        build_pruner("vispruner", **bad)
