"""SCOPE beside its golden figures: an independent slow choice, copies, and gains that are kept or summed anew."""

from dataclasses import replace

import pytest
import torch
from made_inputs import make_inputs
from torch.nn import functional

from prunezoo import PruneZooError, build_pruner
from prunezoo.core.coverage import cover


def scope_inputs(**options):
    """With states and the attention of four heads, whatever else is registered."""
    inputs = make_inputs(**options)
    random = torch.Generator().manual_seed(7)
    rows, width = inputs.valid.shape
    signals = {
        "vision_states": torch.randn(rows, width, 12, generator=random),
        "cls_head_attention": torch.rand(rows, width, 4, generator=random),
        "received_attention": torch.rand(rows, width, generator=random),
    }
    filler = ~inputs.valid
    signals = {n: s.masked_fill(filler.view(*filler.shape, *[1] * (s.dim() - 2)), 1e3) for n, s in signals.items()}
    return replace(inputs, signals=signals)


def slow(states, saliency, count, alpha, combine):
    """One picture, from the formula."""
    unit = functional.normalize(states.double(), dim=-1)
    cosine, chosen = unit @ unit.T, []
    while len(chosen) < count:
        covered = cosine[:, chosen].clamp_min(0).amax(1) if chosen else torch.zeros(len(cosine)).double()
        gains = (cosine - covered[:, None]).clamp_min(0).sum(0)
        worth = gains * saliency**alpha if combine == "product" else gains + saliency**alpha
        worth[chosen] = -torch.inf
        chosen.append(int(worth.argmax()))
    return chosen


@pytest.mark.parametrize("options", [{}, {"alpha": 0.5}, {"alpha": 0.1}, {"combine": "add"}, {"attention": "received"}])
def test_it_is_the_slow_choice_of_ragged_pictures(options):
    inputs, pruner, keep = scope_inputs(pad=3), build_pruner("scope", **options), torch.tensor([20, 7, 1])
    output = pruner(inputs, keep)
    received = "attention" in options
    saliency = inputs.signal("received_attention") if received else inputs.signal("cls_head_attention").sum(-1)
    for row, count in enumerate(keep.tolist()):
        own = inputs.valid[row]
        how = (options.get("alpha", 1.0), options.get("combine", "product"))
        expected = slow(inputs.signal("vision_states")[row, own], saliency[row, own].double(), count, *how)
        assert output.index[row, :count].tolist() == sorted(expected)
        picks = pruner.picks(replace(inputs, asked=tuple(keep.tolist())))
        assert picks[row, :count].tolist() == expected


def test_copies_are_taken_by_saliency():
    """Three tokens cover all; the authors' code goes on with the lowest slots."""
    inputs = scope_inputs()
    states = inputs.signal("vision_states")[:, torch.arange(inputs.valid.shape[1]) % 3]
    inputs = replace(inputs, signals={**inputs.signals, "vision_states": states})
    saliency = inputs.signal("cls_head_attention").sum(-1).masked_fill(~inputs.valid, -1)
    output = build_pruner("scope")(inputs, 9)
    for row in range(3):
        kept = set(output.index[row].tolist())
        best = {int(saliency[row].masked_fill(torch.arange(36) % 3 != group, -1).argmax()) for group in range(3)}
        rest = [slot for slot in saliency[row].argsort(descending=True).tolist() if slot not in best]
        assert kept == best | set(rest[:6])


@pytest.mark.parametrize("copies", [1, 4])
def test_gains_that_are_kept_are_those_summed_anew(copies):
    """On a host they are lowered by what has changed, elsewhere summed: the same choices, to the last token."""
    random = torch.Generator().manual_seed(copies)
    tokens = functional.normalize(torch.randn(3, 60 // copies, 8, generator=random), dim=-1).repeat(1, copies, 1)
    values = (1024 * tokens @ tokens.mT).round() / 1024  # sums of these are exact: ties are ties
    values[2, 40:] = 0  # rows of padding
    open_ = torch.ones(3, 60, dtype=torch.bool)
    open_[2, 40:] = False
    kept, anew = (cover(values, open_, 60, kept=how) for how in (True, False))
    assert torch.equal(kept[:2], anew[:2]) and torch.equal(kept[2, :40], anew[2, :40])
    assert all(len(set(row.tolist())) == 60 for row in kept[:2]) and set(kept[2, :40].tolist()) == set(range(40))


@pytest.mark.parametrize(("field", "value"), [("alpha", -0.1), ("combine", "sum"), ("attention", "cls_attention")])
def test_fields_out_of_range_are_refused(field, value):
    with pytest.raises(PruneZooError, match=f"{field}='?{value}'? of scope is"):
        build_pruner("scope", **{field: value})


def test_towers_without_cls_are_told_what_works():
    assert build_pruner("scope", attention="received").needs == ("vision_states", "received_attention")
