"""MMTok beside its golden figures: an independent slow choice of ragged pictures, words, padding."""

from dataclasses import replace

import pytest
import torch
from made_inputs import make_inputs
from torch.nn import functional

from prunezoo import PruneZooError, build_pruner
from prunezoo.core.roles import Role


def with_states(inputs):
    """States and pixels, whatever else is registered; what stands on padding is large."""
    random = torch.Generator().manual_seed(7)
    rows, width = inputs.valid.shape
    states = torch.randn(rows, width, 12, generator=random).masked_fill(~inputs.valid[..., None], 1e3)
    pixels = torch.rand(rows, width, 3, 2, 2, generator=random) + 0.1
    return replace(inputs, signals={"vision_states": states, "pixels": pixels})


def slow(words, tokens, states, count, alpha=0.5, barred=()):
    """One picture, from the formula."""

    def shares(rows, columns, temperature):
        cosine = functional.normalize(rows.double(), dim=-1) @ functional.normalize(columns.double(), dim=-1).T
        return (cosine / temperature).softmax(1) / len(rows)

    values = torch.cat([shares(words, tokens, 0.02), alpha * shares(states, states, 0.2)])
    best, chosen = torch.zeros(len(values)).double(), []
    while len(chosen) < count:
        gains = (values - best[:, None]).clamp_min(0).sum(0)
        gains[[*chosen, *barred]] = -1
        chosen.append(int(gains.argmax()))
        best = best.maximum(values[:, chosen[-1]])
    return sorted(chosen)


@pytest.mark.parametrize("alpha", [0.5, 0.0, 3.0])
def test_it_is_the_slow_choice_of_ragged_pictures(alpha):
    inputs, keep = with_states(make_inputs(pad=3, text_pad=2)), torch.tensor([18, 7, 1])
    # without the picture few tokens cover the words, and the rest gains nothing
    keep = keep.clamp_max(4) if alpha == 0 else keep
    output = build_pruner("mmtok", alpha=alpha)(inputs, keep)
    for row, count in enumerate(keep.tolist()):
        own, asked = inputs.valid[row], inputs.text_valid[row]
        states = inputs.signal("vision_states")[row, own]
        expected = slow(inputs.text[row, asked], inputs.features[row, own], states, count, alpha)
        assert output.index[row, :count].tolist() == expected


def test_only_words_that_are_asked_are_covered():
    inputs = with_states(make_inputs())
    roles = torch.full(inputs.text_valid.shape, int(Role.QUESTION))
    roles[:, 1:] = Role.INSTRUCTION
    told = build_pruner("mmtok")(replace(inputs, text_roles=roles), 8).index
    alone = build_pruner("mmtok")(replace(inputs, text=inputs.text[:, :1], text_valid=inputs.text_valid[:, :1]), 8)
    assert torch.equal(told, alone.index) and not torch.equal(told, build_pruner("mmtok")(inputs, 8).index)
    nothing = replace(inputs, text_roles=torch.full_like(roles, Role.TEMPLATE))
    assert build_pruner("mmtok")(nothing, 8).count.tolist() == [8, 8, 8]


def test_padding_of_a_square_comes_last_but_is_covered():
    inputs = with_states(make_inputs())
    inputs.signals["pixels"][:, :12] = 0.011  # the mean colour, as processors round it
    pruner = build_pruner("mmtok", padding=False)
    output = pruner(inputs, 8)
    for row, n in enumerate(inputs.valid.sum(1).tolist()):
        words, tokens = inputs.text[row, inputs.text_valid[row]], inputs.features[row, :n]
        expected = slow(words, tokens, inputs.signal("vision_states")[row, :n], 8, barred=range(12))
        assert output.index[row].tolist() == expected
    most = pruner(inputs, 20).index
    assert set(range(12, 20)) <= set(most[1].tolist()) and most.shape == (3, 20), "where no others are left"
    assert pruner.needs == ("vision_states", "pixels") and build_pruner("mmtok").needs == ("vision_states",)


@pytest.mark.parametrize(("field", "value"), [("alpha", -0.1), ("text_temperature", 0.0), ("vision_temperature", -1.0)])
def test_fields_out_of_range_are_refused(field, value):
    with pytest.raises(PruneZooError, match=f"{field}={value} of mmtok is out of range"):
        build_pruner("mmtok", **{field: value})


def test_no_prompt_is_refused():
    with pytest.raises(PruneZooError, match="'mmtok' reads the prompt and got none"):
        build_pruner("mmtok")(replace(with_states(make_inputs()), text=None), 3)
