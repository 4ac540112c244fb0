"""FoPru with lists of rows and tokens."""

from dataclasses import replace

import pytest
import torch
from made_inputs import make_inputs

from prunezoo import PruneZooError, build_pruner


def by_rows(significance, cells, keep):
    rows = {}
    for slot, (tile, row, _) in enumerate(cells.tolist()):
        rows.setdefault((tile, row), []).append(slot)
    kept = []
    for row in sorted(rows.values(), key=lambda row: -sum(significance[slot] for slot in row)):
        kept += sorted(row, key=lambda slot: -significance[slot])[: keep - len(kept)]
    return sorted(kept)


@pytest.mark.parametrize("keep", [1, 4, 6, 11, 18])
def test_whole_rows_and_the_best_of_one_more(keep):
    inputs = make_inputs(pad=3)
    tiles = inputs.cells.clone()
    tiles[0, 15:36, 0] = 1
    inputs = replace(inputs, cells=tiles)
    output = build_pruner("fopru", strategy="row").eval()(inputs, keep)
    for row, valid in enumerate(inputs.valid):
        significance = inputs.signal("received_attention")[row][valid].tolist()
        assert output.index[row].tolist() == by_rows(significance, tiles[row][valid], keep)


def test_the_vector_that_varies_more_is_taken():
    inputs, pruner, seen = make_inputs(pad=2), build_pruner("fopru", significance="larger").eval(), set()
    count = inputs.valid.shape[1]
    maps = torch.rand(3, count, count, generator=torch.Generator().manual_seed(0))
    maps = maps.masked_fill(~(inputs.valid[:, None] & inputs.valid[..., None]), 50.0)
    maps[0] = maps[0] * torch.linspace(0.1, 3, count)  # columns that differ
    maps[1] = maps[1] * torch.linspace(0.1, 3, count)[:, None]
    inputs = replace(inputs, signals={**inputs.signals, "vision_attention": maps})
    output = pruner(inputs, 5)
    for row, valid in enumerate(inputs.valid):
        own = maps[row][valid][:, valid].double()
        received, given = own.mean(0), own.mean(1)
        larger = received if received.var() >= given.var() else given
        seen.add(larger is given)
        assert output.index[row].tolist() == sorted(larger.topk(5).indices.tolist())
    assert seen == {True, False}


def test_by_rank_it_is_the_attention_received():
    inputs = make_inputs()
    received = inputs.signals["received_attention"].masked_fill(~inputs.valid, -1)
    assert torch.equal(build_pruner("fopru").eval()(inputs, 5).index, received.topk(5).indices.sort().values)


def test_bad_fields_are_refused():
    for field in ("strategy", "significance"):
        with pytest.raises(PruneZooError, match=f"{field}='none'"):
            build_pruner("fopru", **{field: "none"})
