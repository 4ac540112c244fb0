"""Recoverable Compression the slow way, token by token, with the outliers of scikit-learn."""

from dataclasses import replace

import pytest
import torch
from made_inputs import make_inputs
from sklearn.neighbors import LocalOutlierFactor
from torch.nn import functional

from prunezoo import PruneZooError, build_pruner
from prunezoo.core.outliers import local_outliers


def is_outlier(values, neighbours):
    return LocalOutlierFactor(n_neighbors=neighbours).fit_predict(values.double().numpy()[:, None]) == -1


@pytest.mark.parametrize("neighbours", [1, 3, 10, 200])
@pytest.mark.filterwarnings("ignore:n_neighbors")
def test_outliers_are_those_of_scikit_learn(neighbours):
    random, found = torch.Generator().manual_seed(neighbours), 0
    values = torch.randn(3, 60, generator=random) ** 3
    valid = torch.arange(60) < torch.tensor([60, 41, 7])[:, None]
    ours = local_outliers(values.masked_fill(~valid, 1e6), valid, neighbours)
    for row, count in enumerate((60, 41, 7)):
        assert ours[row, :count].tolist() == is_outlier(values[row, :count], neighbours).tolist()
        found += int(ours[row].sum())
    assert (found or neighbours == 200) and not ours[~valid].any()
    assert not local_outliers(torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool), neighbours).any()


def by_hand(inputs, row, counts, options):
    """One image: slots, tokens. ``counts`` are by attention, by text, centres, and whether the rest has a token."""
    valid, words = inputs.valid[row], inputs.text[row][inputs.text_valid[row]]
    x, a = inputs.features[row][valid], inputs.signal("cls_joint_attention@next")[row][valid]
    keys = inputs.signal("vision_keys@next")[row][valid].flatten(1)
    near = [sum(float(functional.cosine_similarity(t, w, dim=0)) for w in words) / len(words) for t in x]
    looked = sorted(range(len(x)), key=lambda i: -a[i])[: counts[0]]
    read = sorted((i for i in range(len(x)) if i not in looked), key=lambda i: -near[i])[: counts[1]]
    tokens = {i: x[i] for i in (*looked, *read)}
    rest = [i for i in range(len(x)) if i not in tokens]
    centres = sorted(rest, key=lambda i: -a[i])[: counts[2]]
    for i in centres:

        def rank(j, i=i):
            return float(functional.cosine_similarity(keys[i], keys[j], dim=0)) + options["weight"] * near[j]

        others = sorted((j for j in rest if j != i), key=rank, reverse=True)[: options["neighbours"]]
        tokens[i] = x[i] + sum((a[j] * x[j] for j in others), torch.zeros_like(x[i]))
    others = [i for i in rest if i not in centres]
    if counts[3]:
        tokens[max(others, key=lambda i: a[i])] = sum(a[i] * x[i] for i in others)
    return sorted(tokens), torch.stack([tokens[i] for i in sorted(tokens)])


def check(inputs, output, row, counts, options):
    slots, tokens = by_hand(inputs, row, counts, options)
    count = int(output.count[row])
    assert output.index[row, :count].tolist() == slots
    torch.testing.assert_close(output.features[row, :count], tokens, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("keep", "counts"), [(1, (1, 0, 0, 0)), (2, (1, 0, 0, 1)), (9, (4, 4, 0, 1)), (18, (8, 8, 1, 1))]
)
def test_shares_of_the_budget(keep, counts):
    inputs, options = make_inputs(pad=2), {"neighbours": 4, "weight": 1.5}
    output = build_pruner("recoverable", **options).eval()(inputs, keep)
    for row in range(3):
        check(inputs, output, row, counts, options)
        sizes = torch.bincount(output.groups[row][inputs.valid[row]], minlength=keep) if counts[3] else torch.ones(1)
        assert sizes.min() == 1 and (sizes > 1).sum() == counts[3]


def outliers_by_hand(inputs, row):
    valid = inputs.valid[row]
    a, words = inputs.signal("cls_joint_attention@next")[row][valid], inputs.text[row][inputs.text_valid[row]]
    unit = functional.normalize(inputs.features[row][valid], dim=-1)
    near = (unit @ functional.normalize(words, dim=-1).T).mean(1)
    looked = int(is_outlier(a, 20).sum())
    first = a.argsort(descending=True)[:looked]
    lowered = near.clone()
    lowered[first] = near.min()
    read = int((len(a) - looked) * is_outlier(lowered, 20).mean())
    near[first] = -torch.inf
    rest = torch.ones(len(a), dtype=torch.bool)
    rest[first] = False
    rest[near.argsort(descending=True)[:read]] = False
    return looked, read, int(is_outlier(a[rest], 10).sum())


@pytest.mark.filterwarnings("ignore:n_neighbors", "ignore:Duplicate values")
def test_the_image_says_how_many_of_each():
    inputs, options, seen = make_inputs(grids=((12, 12), (9, 10)), pad=3), {"neighbours": 5, "weight": 0.7}, []
    sharp = inputs.signals["cls_joint_attention@next"] ** 12
    inputs = replace(inputs, signals={**inputs.signals, "cls_joint_attention@next": sharp})
    inputs = replace(inputs, features=torch.where(inputs.valid[..., None], inputs.features**3, inputs.features))
    pruner = build_pruner("recoverable", split="outliers", **options).eval()
    output = pruner(inputs, "auto")
    for row in range(2):
        counts = outliers_by_hand(inputs, row)
        seen.append(counts)
        check(inputs, output, row, (*counts, counts[2] > 0), options)
    assert all(sum(kind) > 0 for kind in zip(*seen, strict=True))
    part = pruner(inputs, 20)  # in the same proportion, in whole numbers
    for row, (looked, read, centres) in enumerate(seen):
        total = looked + read + centres
        mine = 19 * looked // total, 19 * centres // total
        check(inputs, part, row, (mine[0], 19 - sum(mine), mine[1], True), options)
    with pytest.raises(PruneZooError, match="give 'auto' alone"):
        pruner(inputs, "auto:20")


def test_bad_fields_are_refused():
    for field, value in (("text", 1.5), ("centres", 1.0), ("neighbours", -1), ("split", "halves")):
        with pytest.raises(PruneZooError, match=f"{field}="):
            build_pruner("recoverable", **{field: value})
