"""HoloV against a slow reading of its definition, and what neither that nor the shared tests show."""

import math
from dataclasses import replace

import pytest
import torch
from made_inputs import make_inputs
from tiny_llava import LONG, SHORT, make_image

from prunezoo import PruneZooError, attach, build_pruner

CLS = "cls_attention"


def skewed(inputs, first=0.0, seed=3):
    """With attention as of a softmax, and tokens whose first ones get more of it; uneven tokens in the last crops."""
    random = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(inputs.valid.shape, generator=random)
    logits[:, :9] += first
    attention = logits.masked_fill(~inputs.valid, -torch.inf).softmax(1)
    attention = attention.masked_fill(~inputs.valid, 7.0)  # padding does not matter
    features = inputs.features + 2 * torch.arange(inputs.valid.shape[1])[:, None].gt(12)
    return replace(inputs, features=features, signals={**inputs.signals, CLS: attention})


def variances(tokens):
    """Of the tokens ``(M, D)`` of a crop, one by one."""
    unit = tokens / (tokens.norm(dim=1, keepdim=True) + 1e-6)
    likeness = (unit @ unit.T).tolist()
    found = []
    for i, row in enumerate(likeness):
        row[i] = 0.0
        mean = sum(row) / max(len(row) - 1, 1)
        found.append(sum((value - mean) ** 2 for value in row) / max(len(row) - 1, 1))
    return found


def mean(values):
    return sum(values) / len(values)


def slow(inputs, row, keep, crops=16, by="attention", scale="crop", factor=0.09, power=1.0, lose=False):
    """One image, crop by crop."""
    count = int(inputs.valid[row].sum())
    crops = min(16 * count // (9 * keep) if crops == "auto" else crops, count)
    crops = max(crops, 1)
    parts = [own.tolist() for own in torch.arange(count).tensor_split(crops)]  # the first ones longer
    attention = inputs.signal(CLS)[row, :count].double().tolist()
    variance = [value for part in parts for value in variances(inputs.features[row, part].double())]
    scores = [0.0] * count
    for part in parts:
        over = part if scale == "crop" else range(count)
        level = 1000 * mean([attention[i] for i in over]) / (mean([variance[i] for i in over]) + 1e-6)
        for i in part:
            scores[i] = 1000 * attention[i] + factor * level * variance[i]
    worth = [mean([scores[i] for i in part]) ** power for part in parts]
    weights = [value / (sum(worth) + 1e-6) for value in worth]
    quotas = [math.floor(weight * keep) for weight in weights]
    heaviest = sorted(range(crops), key=lambda crop: -weights[crop])
    for crop in heaviest[: keep - sum(quotas)]:
        quotas[crop] += 1
    quotas = [min(quota, len(part)) for quota, part in zip(quotas, parts, strict=True)]
    while not lose and sum(quotas) < keep:
        room = [crop for crop in range(crops) if quotas[crop] < len(parts[crop])]
        quotas[max(room, key=lambda crop: weights[crop] / (quotas[crop] + 1))] += 1
    key = attention if by == "attention" else scores
    ranked = [sorted(part, key=lambda i: -key[i]) for part in parts]
    return sorted(i for part, quota in zip(ranked, quotas, strict=True) for i in part[:quota])


OPTIONS: tuple[dict, ...] = (
    {},
    {"by": "score", "factor": 1.0},
    {"scale": "image", "factor": 1.0},
    {"scale": "image", "by": "score", "power": 0.5},
    {"crops": 3},
    {"crops": 1, "by": "score"},
    {"crops": "auto"},
    {"crops": 100},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("first", [0.0, 5.0], ids=["even", "one_crop_earns_more_than_it_has"])
def test_it_is_its_definition(options, first):
    inputs = skewed(make_inputs(pad=3), first)
    fields = {"select_by" if name == "by" else name: value for name, value in options.items()}
    for keep in (1, 2, 7, 13, 20):
        for overflow in ("share", "lose"):
            output = build_pruner("holov", overflow=overflow, **fields)(inputs, keep)
            for row in range(len(inputs.valid)):
                expected = slow(inputs, row, keep, lose=overflow == "lose", **options)
                assert output.index[row, : output.count[row]].tolist() == expected, (keep, overflow, row)


def test_the_options_differ():
    inputs = skewed(make_inputs())
    built = [
        {}, {"select_by": "score", "factor": 1.0}, {"scale": "image", "factor": 1.0}, {"power": 0.5}, {"crops": 3}
    ]  # fmt: skip
    kept = [str(build_pruner("holov", **fields)(inputs, 13).index.tolist()) for fields in built]
    assert len(set(kept)) == len(kept)


def test_as_released_the_variance_does_nothing():
    inputs = skewed(make_inputs())
    with_it, without = (build_pruner("holov", factor=factor)(inputs, 13).index for factor in (0.09, 0.0))
    assert torch.equal(with_it, without)


@torch.no_grad()
def test_with_lose_a_model_reads_what_is_left(deep_llava):
    """Crops of two tokens, of which some earn three."""
    vlm, batch = deep_llava.vlm, deep_llava.batch([LONG, SHORT], [[make_image(0)], [make_image(1)]])
    pruner = build_pruner("holov", overflow="lose", crops=18, power=8.0)
    assert not pruner.exact and build_pruner("holov").exact
    with attach(vlm, pruner, keep=34) as run:
        assert vlm(**batch).logits.isfinite().all()
    assert all(0 < left < 34 for left in run.stats.after)


def test_towers_without_cls_have_received_attention():
    inputs = skewed(make_inputs())
    moved = replace(inputs, signals={"received_attention": inputs.signal(CLS)})
    pruner = build_pruner("holov", attention="received")
    assert torch.equal(pruner(moved, 9).index, build_pruner("holov")(inputs, 9).index)


@pytest.mark.parametrize(
    "bad",
    [{"crops": 0}, {"crops": "many"}, {"select_by": "luck"}, {"attention": "last"}, {"scale": "all"}, {"factor": 11.0},
     {"power": -1.0}, {"overflow": "zeros"}],
    ids=str,
)  # fmt: skip
def test_what_is_out_of_range_is_refused(bad):
    with pytest.raises(PruneZooError, match=f"{next(iter(bad))}=.*holov"):
        build_pruner("holov", **bad)
