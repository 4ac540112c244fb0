"""ToDRE: the greedy choice token by token, and images that leave a model when nobody looks at them."""

import pytest
import torch
from made_inputs import make_inputs
from tiny_llava import LONG, TWO, make_image
from torch.nn import functional

from prunezoo import PruneZooError, attach, build_pruner, encode
from prunezoo.host import encode_needs, run_pruned


def by_hand(tokens, attention, keep, version):
    chosen = [max(range(len(tokens)), key=lambda i: attention[i])]
    combine = sum if version == "v2" else max
    while len(chosen) < keep:
        rest = [i for i in range(len(tokens)) if i not in chosen]
        alike = {i: [float(functional.cosine_similarity(tokens[i], tokens[j], dim=0)) for j in chosen] for i in rest}
        chosen.append(min(rest, key=lambda i: combine(alike[i])))
    return sorted(chosen)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("keep", [1, 2, 7, 19])
def test_by_hand(version, keep):
    inputs = make_inputs(pad=2)
    output = build_pruner("todre", version=version).choose_first(inputs, keep)
    for row, valid in enumerate(inputs.valid):
        attention = inputs.signal("cls_attention")[row][valid].tolist()
        assert output.index[row].tolist() == by_hand(inputs.features[row][valid], attention, keep, version)


@torch.no_grad()
def test_an_image_leaves_where_words_give_it_less_than_the_threshold(deep_llava):
    """Between the shares of two prompts one leaves and the other stays; each generates on as if it were alone."""
    batch = deep_llava.batch([LONG, TWO], [[make_image(0)], [make_image(5), make_image(6)]])
    needs = ("prompt_attention@3", "cls_attention")
    inputs = encode(deep_llava.vlm, batch, needs).inputs
    shares = inputs.signal("prompt_attention@3").sum(1).sort().values
    threshold = float(shares[:2].mean())
    assert shares[0] < threshold < shares[1]
    pruner = build_pruner("todre", threshold=threshold).eval()
    run = run_pruned(deep_llava.vlm, encode(deep_llava.vlm, batch, encode_needs(pruner)), pruner, 1.0)
    assert sorted(run.layers.tolist()) == [[36, 36, 36, 0], [36] * 4, [36] * 4]
    never = build_pruner("todre", threshold=0.0).eval()
    run = run_pruned(deep_llava.vlm, encode(deep_llava.vlm, batch, encode_needs(never)), never, 9)
    assert run.layers.tolist() == [[9] * 4] * 3
    with attach(deep_llava.vlm, build_pruner("todre", threshold=1.0).eval(), keep=9) as attached:
        written = deep_llava.vlm.generate(**batch, max_new_tokens=4, min_new_tokens=4)
        assert written.shape[1] == batch["input_ids"].shape[1] + 4 and attached.stats.after == [0, 0, 0]


def test_bad_fields_are_refused():
    for fields in ({"version": "v3"}, {"attention": "all"}, {"threshold": 1.5}, {"layer": 0}):
        with pytest.raises(PruneZooError, match=f"{next(iter(fields))}="):
            build_pruner("todre", **fields)
