"""Merging: the algebra of groups, VisionZip and ToMe, each against the slow way."""

from dataclasses import replace

import pytest
import torch
from made_inputs import make_inputs
from torch.nn import functional

from prunezoo import PruneZooError, build_pruner
from prunezoo.core.merge import group_mean, place_groups


def random_groups(seed, groups=5, tokens=14):
    """Two images; the second has fewer tokens and a token that belongs to no group."""
    random = torch.Generator().manual_seed(seed)
    owner = torch.randint(0, groups, (2, tokens), generator=random)
    owner[:, :groups] = torch.arange(groups)
    owner[1, 9:] = -1
    owner[1, 5] = -1
    sizes = torch.randint(1, 5, (2, tokens), generator=random).float()
    cells = torch.zeros(2, tokens, 3, dtype=torch.long)
    cells[..., 1:] = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(7), indexing="ij"), -1).flatten(0, 1)
    return owner, sizes, cells, torch.randn(2, tokens, 3, generator=random)


@pytest.mark.parametrize("seed", range(4))
def test_groups_average_to_their_weighted_mean_at_the_slot_nearest_to_their_middle(seed):
    owner, sizes, cells, values = random_groups(seed)
    means = group_mean(values, owner, sizes, 5)
    index, valid, renamed = place_groups(owner, cells, sizes, 5)
    for row in range(2):
        slots = []
        for group in range(5):
            members = (owner[row] == group).nonzero()[:, 0]
            weight = (sizes[row, members] / sizes[row, members].sum())[:, None]
            torch.testing.assert_close(means[row, group], (weight * values[row, members]).sum(0))
            place = cells[row, members, 1:].double()
            distance = (place - (weight.double() * place).sum(0)).norm(dim=1)
            slots.append(int(members[(distance < distance.min() + 1e-6).nonzero()[0, 0]]))
        assert index[row].tolist() == sorted(slots) and valid[row].all()
        for group, slot in enumerate(slots):
            assert (renamed[row][owner[row] == group] == sorted(slots).index(slot)).all()
        assert (renamed[row][owner[row] < 0] == -1).all()


def test_a_token_alone_in_its_group_is_not_changed_by_a_bit():
    values, sizes = torch.randn(1, 40, 3), torch.full((1, 40), 3.0)
    owner = torch.arange(40)[None]
    assert torch.equal(group_mean(values, owner, sizes, 40), values)
    assert torch.equal(group_mean(values.bfloat16(), owner, sizes, 40), values.bfloat16())


def zip_by_hand(features, attention, keys, keep, merge):
    """One image, no tensors of several rows: slots, tokens."""
    unit = functional.normalize(keys.mean(1), dim=-1)
    contextual = round(keep * 10 / 64)
    dominant = sorted(range(len(features)), key=lambda i: -float(attention[i]))[: keep - contextual]
    rest = [i for i in range(len(features)) if i not in dominant]
    targets = rest[:: max(len(rest) // max(contextual, 1), 1)][:contextual]
    tokens = {i: features[i] for i in dominant}
    for target in targets:
        near = [max(targets, key=lambda t: float(unit[i] @ unit[t])) for i in rest]
        members = [i for i, t in zip(rest, near, strict=True) if t == target and i not in targets]
        if merge == "mean":
            tokens[target] = torch.stack([features[i] for i in [target, *members]]).mean(0)
        else:
            tokens[target] = features[target] + sum(features[i] for i in members) / max(len(members), 1)
    slots = sorted(tokens)
    return slots, torch.stack([tokens[i] for i in slots])


@pytest.mark.parametrize("merge", ["sum", "mean"])
@pytest.mark.parametrize("keep", [1, 3, 10, 19])
def test_visionzip_by_hand(keep, merge):
    inputs = make_inputs(pad=2)
    output = build_pruner("visionzip", merge=merge).eval()(inputs, keep)
    for row, valid in enumerate(inputs.valid):
        signals = [inputs.signal(name)[row][valid] for name in ("cls_attention", "vision_keys")]
        slots, tokens = zip_by_hand(inputs.features[row][valid], *signals, keep, merge)
        assert output.index[row].tolist() == slots
        torch.testing.assert_close(output.features[row], tokens, rtol=1e-5, atol=1e-5)
        # Each token goes somewhere as soon as there is a contextual one to go to.
        went = output.groups[row] >= 0
        assert torch.equal(went, valid) if round(keep * 10 / 64) else int(went.sum()) == keep


def test_visionzip_keeps_the_papers_split():
    for keep, contextual in ((64, 10), (128, 20), (192, 30)):
        inputs = make_inputs(grids=((24, 24),))
        output = build_pruner("visionzip").eval()(inputs, keep)
        dominant = inputs.signal("cls_attention")[0].topk(keep - contextual).indices
        is_dominant = torch.isin(output.index[0], dominant)
        assert int(is_dominant.sum()) == len(dominant) and int((~is_dominant).sum()) == contextual
        merged = output.groups[0].bincount() > 1
        assert merged.any() and not (merged & is_dominant).any()


def test_visionzip_reads_received_attention_where_there_is_no_cls():
    pruner, inputs = build_pruner("visionzip", attention="received", contextual=0.0).eval(), make_inputs()
    received = torch.rand(inputs.valid.shape, generator=torch.Generator().manual_seed(7))
    inputs = replace(inputs, signals={**inputs.signals, "received_attention": received})
    assert pruner.needs == ("received_attention", "vision_keys")
    best = inputs.signal("received_attention").masked_fill(~inputs.valid, -1).topk(4).indices.sort().values
    assert torch.equal(pruner(inputs, 4).index, best)


@pytest.mark.parametrize("bad", [{"contextual": 1.0}, {"contextual": -0.1}, {"attention": "clip"}, {"merge": "max"}])
def test_visionzip_refuses_what_is_out_of_range(bad):
    with pytest.raises(PruneZooError, match=f"{next(iter(bad))}=.*visionzip"):
        build_pruner("visionzip", **bad)
