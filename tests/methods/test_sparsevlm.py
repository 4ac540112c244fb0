"""SparseVLM against plain loops on ragged batches: raters, scores, clusters, counts; the lists as shares; refusals."""

from dataclasses import replace

import pytest
import torch
from layer_oracle import Watch
from made_inputs import make_inputs
from tiny_llava import LONG, TWO, make_image

from prunezoo import PruneZooError, attach, build_pruner, encode
from prunezoo.core.clusters import density_peaks
from prunezoo.host import encode_needs, run_pruned
from prunezoo.training_free.sparsevlm import LISTS, find_raters

PLUS = ("word_head_attention@previous", "word_rotation@previous")


def given(behind=(2, 0, 1), seed=0):
    """Ragged images whose prompts, of 5, 4 and 3 words, have so many words in front of the image."""
    inputs = make_inputs(((9, 9), (4, 5), (6, 7)), seed=seed, pad=2, text_pad=1)
    random = torch.Generator().manual_seed(seed)
    places, shape = torch.arange(inputs.text_valid.shape[1]), (*inputs.valid.shape, inputs.text_valid.shape[1])
    signals = {
        "word_behind": (places >= torch.tensor(behind)[:, None]).float(),
        "word_match": torch.rand(inputs.text_valid.shape, generator=random),
        "word_attention@previous": torch.rand(shape, generator=random),
        "word_head_attention@previous": torch.rand(*shape, 7, generator=random),
        "word_rotation@previous": torch.rand(shape, generator=random) - 0.3,
    }
    return replace(inputs, signals=signals)


def slow_raters(inputs, row):
    words = [t for t in range(int(inputs.text_valid[row].sum())) if inputs.signal("word_behind")[row, t]]
    match = {t: float(inputs.signal("word_match")[row, t]) for t in words}
    return [t for t in words if match[t] > sum(match.values()) / len(words)] or words


def slow_scores(inputs, row, version):
    n, raters = int(inputs.valid[row].sum()), slow_raters(inputs, row)
    if version == "v1.5":
        return [float(inputs.signal("word_attention@previous")[row, i, raters].mean()) for i in range(n)]
    heads, turned = (inputs.signal(name)[row, :n][:, raters].double() for name in PLUS)
    heads = heads / turned[..., None]
    best = sorted(range(7), key=lambda h: -float(heads[..., h].sum()))[:3]  # 14 of 32
    return heads[..., best].mean((1, 2)).tolist()


def slow_peaks(tokens, count):
    """Centres in order, and the cluster of each token."""
    n, tokens = len(tokens), tokens.double()
    far = [[float((a - b).norm()) / tokens.shape[1] ** 0.5 for b in tokens] for a in tokens]
    dense = [float(torch.tensor([-(sum(d * d for d in sorted(own)[:count]) / count)]).exp()) for own in far]
    most = max(map(max, far))
    lead = [min([far[i][j] for j in range(n) if (dense[j], -j) > (dense[i], -i)], default=most) for i in range(n)]
    centres = sorted(range(n), key=lambda i: -lead[i] * dense[i])[:count]
    nearest = [min(range(count), key=lambda c, i=i: far[centres[c]][i]) for i in range(n)]
    return centres, [centres.index(i) if i in centres else nearest[i] for i in range(n)]


def slow(inputs, row, keep, count):
    """Slots of what stays, of the centres in order, and the features, those of clusters last."""
    n, features = int(inputs.valid[row].sum()), inputs.features[row].double()
    scores = slow_scores(inputs, row, "v1.5")
    order = sorted(range(n), key=lambda i: -scores[i])
    for stay in range(min(keep, n - (count == "lists")), 0, -1):  # the most that leaves room for its clusters
        gone = n - stay
        taken = int(gone * 0.3) + 1 if gone else 0
        clusters = taken // 10 + 1 if gone else 0
        if count == "lists" or stay + clusters <= keep:
            break
    kept, pool = sorted(order[:stay]), order[stay : stay + taken]
    clusters = clusters if count == "lists" else min(clusters, keep - stay)
    centres, own = slow_peaks(features[pool], clusters) if clusters else ([], [])
    means = [features[[slot for slot, c in zip(pool, own, strict=True) if c == number]].mean(0)
             for number in range(clusters)]  # fmt: skip
    return kept, [pool[i] for i in centres], [*features[kept], *means]


@pytest.mark.parametrize("place", ["centre", "behind"])
@pytest.mark.parametrize("count", ["exact", "lists"])
def test_it_is_what_plain_loops_leave(count, place):
    inputs, pruner = given(), build_pruner("sparsevlm", count=count, place=place)
    for keep in (2, 3, 10, 19, 41, 80):
        output = pruner(inputs, keep)
        for row in range(3):
            n = int(inputs.valid[row].sum())
            kept, centres, features = slow(inputs, row, min(keep, n), count)
            there = output.valid[row]
            assert output.index[row, there].tolist() == sorted(kept + centres)
            assert int(there.sum()) == min(keep, n) or count == "lists"
            order = range(len(features)) if place == "behind" else torch.tensor(kept + centres).argsort().tolist()
            expected = torch.stack([features[i] for i in order])
            torch.testing.assert_close(output.features[row][there].double(), expected, rtol=1e-4, atol=1e-5)
            assert output.counts[row] == int(there.sum())


def test_one_token_is_no_cluster():
    output = build_pruner("sparsevlm")(given(), 1)
    for row in range(3):
        scores = slow_scores(given(), row, "v1.5")
        assert output.index[row].tolist() == [scores.index(max(scores))]
    assert output.features is None


def test_plus_counts_the_heads_that_look_at_the_image_without_the_rotation():
    inputs, pruner = given(), build_pruner("sparsevlm", version="plus")
    assert pruner.needs == ("word_match", "word_behind", *PLUS)
    for keep in (1, 5, 20):
        output = pruner(inputs, keep)
        assert output.features is None and output.counts == (keep,) * 3
        for row in range(3):
            scores = slow_scores(inputs, row, "plus")
            best = sorted(range(len(scores)), key=lambda i: -scores[i])[:keep]
            assert output.index[row].tolist() == sorted(best)


def test_the_first_release_goes_by_rank():
    inputs, pruner = given(), build_pruner("sparsevlm", version="v1.0")
    ranks = [len(slow_raters(inputs, row)) for row in range(3)]  # of random numbers: as many as there are rows
    assert len(set(ranks)) > 1
    for step, (slope, more) in enumerate(((13.5, 0), (9, 6), (0.8, 0))):
        output = pruner(replace(inputs, step=step), 3)
        for row, n in enumerate((81, 20, 42)):
            stay = max(1, min(int(ranks[row] * slope + more), n - 1))
            assert output.counts[row] == stay + (int((n - stay) * 0.3) + 1) // 10 + 1
    signals = {**inputs.signals, "word_attention@previous": torch.ones_like(inputs.signal("word_attention@previous"))}
    assert pruner.ranks(replace(inputs, signals=signals), find_raters(inputs)) == [1, 1, 1]


def test_raters_are_all_words_behind_where_none_is_above_the_mean():
    inputs = given()
    signals = {**inputs.signals, "word_match": torch.ones_like(inputs.signal("word_match"))}
    same = find_raters(replace(inputs, signals=signals))
    assert same.sum(1).tolist() == [3, 4, 2]
    assert find_raters(inputs).sum(1).tolist() == [len(slow_raters(inputs, row)) for row in range(3)]


@pytest.mark.parametrize("version", LISTS)
def test_stages_leave_the_published_lists_and_what_lies_between(version):
    pruner = build_pruner("sparsevlm", version=version)
    assert [pruner.stages(depth) for depth in (4, 5, 28, 32)] == [(1, 2, 3), (1, 2, 3), (3, 6, 14), (3, 7, 16)]
    for total in (576, 2880, 1152):
        for row in LISTS[version]:
            wanted = [part * total // 576 for part in row]
            steps = pruner.schedule(torch.tensor(wanted[-1:]), torch.tensor([total]), 32)
            assert [int(step) for step in steps] == wanted
    for total in (1, 7, 144, 576):
        keep = torch.arange(1, total + 1)
        first, second, last = pruner.schedule(keep, torch.full_like(keep, total), 32)
        assert torch.equal(last, keep) and (first >= second).all() and (second >= last).all() and first.max() == total
    assert build_pruner("sparsevlm", layers=(1, 2, 4)).stages(8) == (1, 2, 4)


@pytest.mark.parametrize("version", ["v1.5", "plus", "v1.0"])
@torch.no_grad()
def test_raters_are_chosen_once_on_a_model(deep_llava, version):
    pruner = build_pruner("sparsevlm", version=version).eval()
    batch = deep_llava.batch([LONG, TWO], [[make_image(0)], [make_image(1), make_image(2)]])
    with Watch(pruner) as watch:
        run = run_pruned(deep_llava.vlm, encode(deep_llava.vlm, batch, encode_needs(pruner)), pruner, 4)
    raters = [find_raters(inputs) for inputs, _ in watch.calls]
    assert len(raters) == 3 and raters[0].any(1).all()
    assert torch.equal(raters[0], raters[1]) and torch.equal(raters[0], raters[2])
    if pruner.exact:
        steps = pruner.schedule(torch.tensor([4]), torch.tensor([36]), 4)
        assert run.layers.tolist() == [[36, *(int(step) for step in steps)]] * 3
    with attach(deep_llava.vlm, pruner, keep=4, positions="compact") as attached:
        assert deep_llava.vlm(**batch).logits.isfinite().all()
    assert attached.stats.after[:3] == run.layers[:, -1].tolist()


def test_density_peaks_find_what_lies_together():
    random = torch.Generator().manual_seed(0)
    heaps = torch.randn(2, 3, 1, 8, generator=random) * 5
    tokens = (heaps + 0.1 * torch.randn(2, 3, 6, 8, generator=random)).flatten(1, 2)
    valid = torch.arange(18) < torch.tensor([[18], [12]])  # of the second, two heaps
    tokens = tokens.masked_fill(~valid[..., None], 1e4)
    centres, cluster = density_peaks(tokens, valid, torch.tensor([3, 2]), 3)
    assert sorted((centres[0] // 6).tolist()) == [0, 1, 2] and sorted((centres[1, :2] // 6).tolist()) == [0, 1]
    for row, count in ((0, 3), (1, 2)):
        for number in range(count):
            heap = int(centres[row, number]) // 6
            assert (cluster[row, heap * 6 : heap * 6 + 6] == number).all()


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"version": "2"}, "version='2' of sparsevlm is unknown; "),
        ({"count": "most"}, "count='most' of sparsevlm is unknown; "),
        ({"place": "front"}, "place='front' of sparsevlm is unknown; "),
        ({"layers": (1, 2)}, r"layers=\[1, 2\] of sparsevlm: name three"),
        ({"layers": (0, 2, 3)}, r"layers=\[0, 2, 3\] of sparsevlm"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_that_names_it(wrong, named):
    with pytest.raises(PruneZooError, match=named):
        build_pruner("sparsevlm", **wrong)


def test_a_shallow_decoder_is_told_what_to_set():
    with pytest.raises(PruneZooError, match="a decoder of 3 layers has no room for three stages: set layers"):
        build_pruner("sparsevlm").stages(3)
