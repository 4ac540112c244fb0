"""DART against a plain loop over pivots, on ragged batches; counts, few words, ties, refusals."""

from dataclasses import replace

import pytest
import torch
from made_inputs import make_inputs
from tiny_llava import LONG, TWO, make_image

from prunezoo import PruneZooError, attach, build_pruner, encode
from prunezoo.host import encode_needs, run_pruned


def given(behind=(2, 0, 5), seed=0):
    """Ragged images whose prompts, of 5, 4 and 3 words, have so many words in front of the image."""
    inputs = make_inputs(seed=seed, pad=2, text_pad=1)
    random = torch.Generator().manual_seed(seed)
    signals = {name: torch.randn(values.shape, generator=random) for name, values in inputs.signals.items()}
    places = torch.arange(inputs.text_valid.shape[1])
    signals["word_behind"] = (places >= torch.tensor(behind)[:, None]).float()
    return replace(inputs, signals=signals)


def norms(inputs, name, row, count):
    return {i: float(inputs.signal(name)[row, i].double().abs().sum()) for i in range(count)}


def slow(inputs, row, keep, image_pivots=4, text_pivots=4, words="behind", order="norm"):
    """One image, pivot by pivot, token by token."""
    n, t = int(inputs.valid[row].sum()), int(inputs.text_valid[row].sum())
    ahead = int(sum(inputs.signal("word_behind")[row, :t] == 0))
    keys, asking = norms(inputs, "layer_keys@previous", row, n), norms(inputs, "word_layer_keys@previous", row, t)
    tokens = sorted(keys, key=keys.get, reverse=True)[: min(image_pivots, keep)]
    able = [i for i in sorted(asking, key=asking.get, reverse=True) if words == "all" or i >= ahead][:text_pivots]
    pivots = [("normed_states", i, ahead + i) for i in tokens]
    pivots += [("word_normed_states", i, i + n * (i >= ahead)) for i in able]
    if order == "set":
        run = list({number for *_, number in pivots}.copy())
        pivots = sorted(pivots, key=lambda pivot: run.index(pivot[2]))
    kept, left = set(tokens), keep - len(tokens)
    each = -(-left // len(pivots))
    states = inputs.signal("normed_states")[row, :n].double()
    for name, i, _ in pivots:
        alike = torch.cosine_similarity(inputs.signal(name)[row, i].double()[None], states).tolist()
        takes = sorted(set(range(n)) - kept, key=lambda j, alike=alike: alike[j])[: min(each, left)]
        kept |= set(takes)
        left -= len(takes)
    return sorted(kept)


@pytest.mark.parametrize("order", ["norm", "set"])
@pytest.mark.parametrize("words", ["behind", "all"])
@pytest.mark.parametrize("pivots", [(4, 4), (2, 6), (1, 0)], ids=str)
def test_it_is_what_a_plain_loop_takes(order, words, pivots):
    inputs, options = given(), {"order": order, "words": words, "image_pivots": pivots[0], "text_pivots": pivots[1]}
    for keep in (1, 3, 5, 11, 19, 20):
        output = build_pruner("dart", **options)(inputs, keep)
        for row in range(3):
            expected = slow(inputs, row, keep, *pivots, words, order)
            assert output.index[row, output.valid[row]].tolist() == expected and len(expected) == keep


def test_the_count_of_the_authors():
    inputs, pruner = given(behind=(0, 0, 0)), build_pruner("dart", count="floor", text_pivots=2)
    for keep, each in ((5, 0), (6, 1), (15, 2), (21, 3)):
        # six pivots, four of them of the image; the second picture has 20 tokens, no more are to be had
        assert pruner(inputs, keep).counts == tuple(min(4 + 6 * min(each, n // 6), n) for n in (36, 20, 21))
    assert not pruner.exact and build_pruner("dart").exact


def test_equal_tokens_are_taken_from_the_first_on():
    inputs = given()
    signals = {name: torch.ones_like(values) for name, values in inputs.signals.items()}
    for order in ("norm", "set"):
        output = build_pruner("dart", order=order)(replace(inputs, signals=signals), 9)
        assert output.index.tolist() == [list(range(9))] * 3


@torch.no_grad()
def test_on_a_model_it_stands_in_front_of_layer_two_of_thirty_two(deep_llava):
    pruner = build_pruner("dart").eval()
    assert [pruner.stages(depth) for depth in (4, 28, 32, 40, 80)] == [(1,), (2,), (2,), (2,), (5,)]
    assert build_pruner("dart", layer=3).stages(4) == (3,)
    batch = deep_llava.batch([LONG, TWO], [[make_image(0)], [make_image(1), make_image(2)]])
    run = run_pruned(deep_llava.vlm, encode(deep_llava.vlm, batch, encode_needs(pruner)), pruner, 8)
    assert run.tokens.tolist() == [(36 + 3 * 8) / 4] * 3
    with attach(deep_llava.vlm, build_pruner("dart", count="floor", order="set"), keep=8) as attached:
        deep_llava.vlm(**batch)
    assert attached.stats.after == [12] * 3


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"layer": 0}, "layer=0 of dart"),
        ({"image_pivots": 0}, "image_pivots=0 of dart must be at least 1"),
        ({"text_pivots": -1}, "text_pivots=-1 of dart must be at least 0"),
        ({"order": "size"}, "order='size' of dart is unknown; "),
        ({"count": "most"}, "count='most' of dart is unknown; "),
        ({"words": "none"}, "words='none' of dart is unknown; "),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_that_names_it(wrong, named):
    with pytest.raises(PruneZooError, match=named):
        build_pruner("dart", **wrong)
