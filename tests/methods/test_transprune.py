"""TransPrune on a model, against what its layers take and give, seen by hooks; golden figures are in test_golden.py."""

import math

import pytest
import torch
from layer_oracle import Watch
from tiny_llava import LONG, make_image
from torch.nn import functional

from prunezoo import PruneZooError, build_pruner, encode
from prunezoo.host import encode_needs, run_pruned


def changes(taken, gave, turn):
    """Of each token of a sequence: what it is longer, times the softmax of what it turned."""
    cosines = [float(functional.cosine_similarity(t, g, dim=0)) for t, g in zip(taken, gave, strict=True)]
    weights = [math.exp(1 - (abs(c) if turn == "absolute" else c)) for c in cosines]
    return [
        float(g.norm() / t.norm()) * w / sum(weights) for t, g, w in zip(taken, gave, weights, strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize("turn", ["cosine", "absolute"])
@torch.no_grad()
def test_on_a_model_it_keeps_what_its_layers_changed(turn, deep_llava):
    vlm, weight, seen = deep_llava.vlm, 0.3, []
    batch = deep_llava.batch([LONG], [[make_image(0)]])
    pruner = build_pruner("transprune", layers=(1, 2, 3), turn=turn, instruction=weight).eval()
    encoded = encode(vlm, batch, encode_needs(pruner))

    def write(_module, args, kwargs, output):
        taken = args[0] if args else kwargs["hidden_states"]
        seen.append((taken[0], (output[0] if isinstance(output, tuple) else output)[0]))

    layers = vlm.model.language_model.layers
    handles = [
        part.register_forward_hook(write, with_kwargs=True) for layer in layers for part in (layer.self_attn, layer.mlp)
    ]
    with Watch(pruner) as watch:
        run_pruned(vlm, encoded, pruner, 8)
    for handle in handles:
        handle.remove()
    first, alive, total = int(encoded.slots[0, 0]), list(range(36)), {}
    for number, (count, (inputs, output)) in enumerate(zip((32, 24, 8), watch.calls, strict=True)):
        for taken, gave in seen[2 * number : 2 * number + 2]:
            own = changes(taken, gave, turn)
            for place, token in enumerate(alive):
                total[token] = total.get(token, 0) + own[first + place]
        looked = dict(zip(alive, inputs.signal("prompt_attention")[0].tolist(), strict=True))
        change, look = sum(total[token] for token in alive), sum(looked.values())
        scores = {t: (1 - weight) * total[t] / change + weight * looked[t] / look for t in alive}
        torch.testing.assert_close(output.scores[0], torch.tensor(list(scores.values())), rtol=1e-4, atol=1e-7)
        kept = sorted(sorted(alive, key=lambda t: -scores[t])[:count])
        assert [alive[place] for place in output.index[0].tolist()] == kept
        alive = kept


def test_the_published_shares_and_what_lies_between_cuts():
    pruner = build_pruner("transprune")
    assert pruner.cuts(32) == (7, 9, 12) and pruner.stages(32) == tuple(range(7, 13))
    steps = pruner.schedule(torch.tensor([72, 576, 300]), torch.tensor([576, 576, 576]), 32)
    shares = [504, 504, 360, 360, 360, 72]
    assert [step.tolist() for step in steps] == [
        [n, 576, m] for n, m in zip(shares, [537] * 2 + [458] * 3 + [300], strict=True)
    ]


def test_bad_fields_are_refused():
    for fields in (
        {"turn": "left"},
        {"instruction": 1.5},
        {"layers": (1, 2)},
        {"layers": (0, 1, 2)},
        {"layers": (3, 2, 4)},
    ):
        with pytest.raises(PruneZooError, match=f"{next(iter(fields))}="):
            build_pruner("transprune", **fields)
    with pytest.raises(PruneZooError, match="no room for three cuts"):
        build_pruner("transprune").stages(3)
