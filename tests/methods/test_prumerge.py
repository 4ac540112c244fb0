"""PruMerge beyond the authors' figures: against lists and loops on uneven images, its options, its own budgets."""

from dataclasses import replace

import pytest
import torch
from families import LARGE, Sample, tiny_family
from made_inputs import GRIDS, make_inputs
from tiny_llava import LONG, SHORT, make_image

from prunezoo import PruneZooError, attach, build_pruner

ATTENTION, KEYS = "cls_joint_attention@next", "vision_keys@next"


def image(inputs, row):
    """Features, attention and unit keys of one image's own tokens."""
    valid = inputs.valid[row]
    keys = inputs.signal(KEYS)[row, valid].flatten(1)
    return inputs.features[row, valid], inputs.signal(ATTENTION)[row, valid], keys / keys.norm(dim=1, keepdim=True)


def middles(count, wanted):
    """So many of ``range(count)``, in the middles of equal stretches."""
    return [(2 * number + 1) * count // (2 * wanted) for number in range(wanted)]


def by_hand(features, attention, keys, keep, spread=0.0, neighbours=32):
    """Slots in raster order, and features: of chosen tokens with their neighbours, and of all others together."""
    if keep >= len(features):
        return list(range(len(features))), list(features)
    alike, weight = (keys @ keys.T).tolist(), attention.tolist()
    order = sorted(range(len(features)), key=lambda token: (-weight[token], token))
    chosen = keep - (keep > 1)
    grid = round(chosen * spread)
    picked = order[: chosen - grid]
    others = sorted(set(order) - set(picked))
    picked += [others[place] for place in middles(len(others), grid)]
    made = {}
    for token in picked:
        near = sorted(set(order) - {token}, key=lambda other: (-alike[token][other], other))
        made[token] = features[token] + sum(weight[other] * features[other] for other in near[:neighbours])
    rest = [token for token in order if token not in made]
    if keep > 1:
        made[rest[0]] = sum(weight[other] * features[other] for other in rest)
    return sorted(made), [made[token] for token in sorted(made)]


@pytest.mark.parametrize("keep", [1, 2, 11, 20, 35, 99])
@pytest.mark.parametrize(("name", "spread"), [("prumerge", 0.0), ("prumerge_plus", 0.5), ("prumerge_plus", 0.75)])
@pytest.mark.parametrize("neighbours", [4, 32])
def test_uneven_images_equal_lists_and_loops(keep, name, spread, neighbours):
    inputs = make_inputs(pad=3)
    options = {"spread": spread} if spread else {}
    output = build_pruner(name, neighbours=neighbours, **options)(inputs, keep)
    for row in range(len(GRIDS)):
        slots, features = by_hand(*image(inputs, row), keep, spread, neighbours)
        assert output.index[row][output.valid[row]].tolist() == slots
        found = output.features[row][output.valid[row]]
        torch.testing.assert_close(found, torch.stack(features), rtol=1e-5, atol=1e-5)


def test_groups_say_where_each_token_went():
    """A chosen one to itself, all others to the one that stands for them; nowhere, if there is none."""
    inputs = make_inputs(pad=3)
    output = build_pruner("prumerge")(inputs, 6)
    for row, (height, width) in enumerate(GRIDS):
        groups = output.groups[row].tolist()
        sizes = sorted(groups.count(column) for column in range(6))
        assert sizes == [1, 1, 1, 1, 1, height * width - 5]
        assert all(groups[slot] == column for column, slot in enumerate(output.index[row].tolist()))
    alone = build_pruner("prumerge", rest="none")(inputs, 6)
    assert [(row >= 0).sum().item() for row in alone.groups] == [6, 6, 6]


def test_tokens_of_one_key_are_near_in_raster_order():
    """As on an empty wall: which of them are added does not hang on how a batch is padded."""
    inputs = make_inputs(grids=((6, 6),))
    signals = {**inputs.signals, KEYS: torch.ones_like(inputs.signal(KEYS))}
    output = build_pruner("prumerge", neighbours=3, rest="none")(replace(inputs, signals=signals), 1)
    features, attention, _ = image(inputs, 0)
    first = int(attention.argmax())
    near = [token for token in range(36) if token != first][:3]
    expected = features[first] + sum(attention[token] * features[token] for token in near)
    torch.testing.assert_close(output.features[0, 0], expected, rtol=1e-5, atol=1e-5)


def test_half_types_choose_as_single_ones_and_add_up_in_it():
    inputs = make_inputs().to(torch.bfloat16)
    rough, exact = build_pruner("prumerge")(inputs, 7), build_pruner("prumerge")(inputs.to(torch.float32), 7)
    assert torch.equal(rough.index, exact.index) and rough.features.dtype == torch.bfloat16
    torch.testing.assert_close(rough.features, exact.features.bfloat16(), rtol=0, atol=0)


def test_the_rest_stands_within_beside_or_nowhere():
    inputs = make_inputs(pad=3)
    for rest, counts in (("within", (8, 8, 8)), ("beside", (9, 9, 9)), ("none", (8, 8, 8))):
        pruner = build_pruner("prumerge", rest=rest)
        assert pruner(inputs, 8).counts == counts and pruner.exact == (rest != "beside")
        whole = pruner(inputs, 1.0)
        assert torch.equal(whole.kept_features(inputs)[whole.valid], inputs.features[inputs.valid])


def test_grids_of_the_released_code():
    """What is taken twice stands side by side; the last token is on no grid."""
    inputs = make_inputs(grids=((6, 6), (6, 6)))
    fixed = build_pruner("prumerge", grid="fixed", rest="beside")(inputs, 12)
    adaptive = build_pruner("prumerge", grid="adaptive", rest="none")(inputs, 6)
    for row in range(2):
        top = image(inputs, row)[1].argsort(descending=True).tolist()
        taken = fixed.index[row][fixed.valid[row]].tolist()
        rest = next(slot for slot in top[12:] if slot % 3 != 1)
        assert taken == sorted([*top[:12], *range(1, 35, 3), rest])
        assert adaptive.index[row][adaptive.valid[row]].tolist() == sorted({*top[:6], *range(0, 35, 2)})
    assert any(len(set(row.tolist())) < len(row) for row in fixed.index)
    with pytest.raises(PruneZooError, match="grid='adaptive' of prumerge takes at most a third"):
        build_pruner("prumerge", grid="adaptive", rest="none")(inputs, 13)


@pytest.mark.parametrize(("name", "times", "more"), [("prumerge", 1, 1), ("prumerge_plus", 2, 1)])
def test_an_image_keeps_what_stands_out_in_it(name, times, more):
    inputs, heights = make_inputs(pad=3), (3, 5, 1)
    attention = inputs.signal(ATTENTION).clone()
    for row, count in enumerate(heights):
        attention[row] = attention[row].clamp_max(0.01) + 0.001 * torch.rand(attention.shape[1])
        attention[row, 2 : 2 + count] = 0.5
    inputs = replace(inputs, signals={**inputs.signals, ATTENTION: attention})
    counts = tuple(times * count + more for count in heights)
    assert build_pruner(name)(inputs, "auto").counts == counts
    assert build_pruner(name, rest="none")(inputs, "auto").counts == tuple(count - more for count in counts)
    even = replace(inputs, signals={**inputs.signals, ATTENTION: torch.full_like(attention, 0.02)})
    assert min(build_pruner(name)(even, "auto").counts) >= 1, "where nothing stands out the first does"
    with pytest.raises(PruneZooError, match=f"keep='auto:9': '{name}' counts what stands out"):
        build_pruner(name)(inputs, "auto:9")


@torch.no_grad()
def test_in_a_model_it_sets_its_budgets(tiny_llava):
    batch = tiny_llava.batch([LONG, SHORT], [[make_image(0)], [make_image(1)]])
    with attach(tiny_llava.vlm, "prumerge_plus", keep="auto") as run:
        tiny_llava.vlm(**batch)
    assert all(1 <= left < 36 for left in run.stats.after)


@pytest.mark.parametrize("family", ["llava_siglip", "qwen2_5_vl", "internvl"])
@torch.no_grad()
def test_towers_without_cls_or_without_a_block_behind_are_told_what_works(family):
    tiny = tiny_family(family)
    batch, options = tiny.batch([Sample((LARGE,), 5)]), {"block": "projected"}
    if family != "internvl":
        options["attention"] = "received"
    with (
        pytest.raises(PruneZooError, match=".*".join(f"{key}='{value}'" for key, value in options.items())),
        attach(tiny.vlm, "prumerge", keep=4),
    ):
        tiny.vlm(**batch)
    with attach(tiny.vlm, build_pruner("prumerge", **options), keep=4) as run:
        assert tiny.vlm(**batch).logits[:, -1].isfinite().all()
    assert run.stats.after == [4] * len(run.stats.after) != []


@pytest.mark.parametrize(
    "bad",
    [
        {"grid": "odd"},
        {"rest": "no"},
        {"attention": "mean"},
        {"block": "last"},
        {"spread": 1.0},
        {"neighbours": -1},
    ],
)
def test_what_is_unknown_or_out_of_range_is_refused(bad):
    with pytest.raises(PruneZooError, match=f"{next(iter(bad))}=.*prumerge"):
        build_pruner("prumerge", **bad)
