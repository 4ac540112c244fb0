"""AIM the slow way: lists of tokens that are matched, and a walk over the graph of attention."""

from itertools import pairwise

import pytest
import torch
from made_inputs import make_inputs
from tiny_llava import LONG, TWO, make_image
from torch.nn import functional

from prunezoo import PruneZooError, attach, build_pruner, encode
from prunezoo.host import encode_needs, run_pruned
from prunezoo.training_free.aim import Rank


def merged_by_hand(tokens, metric, keep):
    """The list of (what it stands for, token, metric) in the end."""
    listed = [({i}, token, own) for i, (token, own) in enumerate(zip(tokens, metric, strict=True))]
    while len(listed) > keep:
        even, odd = listed[::2], listed[1::2]
        best = []
        for members, _, own in even:
            alike = [float(functional.cosine_similarity(own, other, dim=0)) for _, _, other in odd]
            best.append((max(alike), alike.index(max(alike)), members))
        falling = sorted(range(len(even)), key=lambda i: -best[i][0])
        count = min(len(listed) // 2, len(listed) - keep)
        made = []
        for i, (members, token, own) in enumerate(odd):
            joined = [even[j] for j in falling[:count] if best[j][1] == i]
            members = members.union(*(part[0] for part in joined))
            token = torch.stack([token, *(part[1] for part in joined)]).mean(0)
            own = torch.stack([own, *(part[2] for part in joined)]).mean(0)
            made.append((members, token, own))
        listed = [even[j] for j in falling[count:]] + made
    return listed


@pytest.mark.parametrize("metric", ["features", "keys"])
@pytest.mark.parametrize("keep", [1, 3, 8, 15])
def test_matching_by_hand(metric, keep):
    inputs = make_inputs(pad=2)
    output = build_pruner("aim", metric=metric).merge(inputs, keep)
    for row, valid in enumerate(inputs.valid):
        tokens = inputs.features[row][valid]
        own = tokens if metric == "features" else inputs.signal("vision_keys@next")[row][valid].flatten(1)
        for members, token, _ in merged_by_hand(tokens, own, keep):
            (column,) = output.groups[row][sorted(members)].unique().tolist()
            assert (output.groups[row] == column).sum() == len(members) and int(output.index[row, column]) in members
            torch.testing.assert_close(output.features[row, column], token, rtol=1e-5, atol=1e-5)


def test_importance_is_a_walk_over_words_and_tokens():
    inputs, pruner = make_inputs(pad=2, text_pad=1), Rank(build_pruner("aim", steps=3, temperature=0.5).config)
    scores = pruner.importance(inputs)
    names = ("layer_head_attention", "seen_word_head_attention", "word_head_attention", "among_words_head_attention")
    for row in range(3):
        n, t = int(inputs.valid[row].sum()), int(inputs.text_valid[row].sum())
        among, seen, looked, words = (inputs.signal(name)[row].double() for name in names)
        total = torch.zeros(n + t, dtype=torch.double)
        for head in range(2):
            share = [1 / (n + t)] * (n + t)
            graph = [
                [float(among[i, j, head]) for j in range(n)] + [float(seen[i, j, head]) for j in range(t)]
                for i in range(n)
            ] + [
                [float(looked[j, i, head]) for j in range(n)] + [float(words[i, j, head]) for j in range(t)]
                for i in range(t)
            ]
            graph = [[weight**2 / sum(w**2 for w in edges) for weight in edges] for edges in graph]
            for _ in range(3):
                share = [sum(share[i] * graph[i][j] for i in range(n + t)) for j in range(n + t)]
            total += torch.tensor(share).double() ** 2
        expected = (total / 2).sqrt().float()
        found = torch.cat([scores[row, :n], scores[row, inputs.valid.shape[1] :][:t]])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("depth", [4, 28, 32])
@pytest.mark.parametrize("keep", [20, 60, 180, 360, 500, 576])
def test_the_mean_over_layers_is_what_was_asked_for(depth, keep):
    pruner = build_pruner("aim")
    (_, enter), (rank, _) = pruner.parts(torch.tensor([keep]))
    found = enter.clamp_max(576)
    stages, left = rank.stages(depth), [found, *rank.schedule(torch.tensor([keep]), found, depth)]
    mean = sum(int(left[sum(at <= layer for at in stages)][0]) for layer in range(depth)) / depth
    assert abs(mean - keep) <= 1 and all(two <= one for one, two in pairwise(left))
    assert (int(left[-1][0]) == 0) is (keep * 1.6 <= 576)
    if depth == 28 and keep == 360:  # the published rates
        assert stages == tuple(range(14, 22))
        assert [int(count[0]) for count in left[1:]] == [int(576 * (1 - i / 8)) for i in range(1, 9)]


@torch.no_grad()
def test_in_a_model_all_are_gone_in_the_end(deep_llava):
    batch = deep_llava.batch([LONG, TWO], [[make_image(0)], [make_image(5), make_image(6)]])
    pruner = build_pruner("aim").eval()
    run = run_pruned(deep_llava.vlm, encode(deep_llava.vlm, batch, encode_needs(pruner)), pruner, 10)
    assert run.layers.tolist() == [[16, 16, 8, 0]] * 3 and not run.output.valid.any()
    with attach(deep_llava.vlm, pruner, keep=10):
        assert torch.equal(deep_llava.vlm(**batch).logits[:, -1], run.host.logits[:, -1])
    with attach(deep_llava.vlm, pruner, keep=1.0):
        assert torch.equal(deep_llava.vlm(**batch).logits, deep_llava.vlm(**batch).logits)


def test_bad_fields_are_refused():
    for fields in ({"metric": "rows"}, {"enter": 0.5}, {"first": 0}, {"first": 4, "last": 3}, {"temperature": 0.0}):
        with pytest.raises(PruneZooError, match=f"{list(fields)[-1]}="):
            build_pruner("aim", **fields)
