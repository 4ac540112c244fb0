"""No token at all, and tokens that come back, between the layers of every family.

The oracle is the bare model, called as ever, whose layers do not look at what is away, and in which what comes back is
written in front of the layer where it does, in the state that an earlier call of it has shown.
"""

import pytest
import torch
from families import MIXED, NEWER, tiny_family
from layer_oracle import Watch, masked
from layer_runs import CLOSE, NOW, PAST, Scattered, last_logits, stages
from prompt_oracle import write
from return_oracle import away_by_layer

from prunezoo import PruneZooError, attach, build_pruner, encode
from prunezoo.core.contract import PruneOutput
from prunezoo.core.plan import mask_to_index


class FewAll(Scattered):
    """As many as a hash of the cells says, also none; then all."""

    name, exact = "few_all", False
    comes_back = "last"

    def reduce(self, inputs, keep):
        keep = (self.score(inputs) > 0.5) & inputs.valid
        keep[0] = False  # of the first image none
        return PruneOutput(*mask_to_index(inputs.valid if inputs.step else keep))


def states(vlm, batch, gone, layer):
    """What enters a layer while nobody looks at what is away."""
    seen = []
    module = vlm.get_decoder().layers[layer]
    with masked(vlm, gone):
        handle = module.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
        try:
            vlm(**batch)
        finally:
            handle.remove()
    return seen[0]


CASES = [(name, mode) for name in NOW for mode in ("raw", "last")]
CASES += [(name, "last") for name in ("qwen3_5", "gemma4_shared", "kimi_k25") if name in NEWER]


@pytest.mark.parametrize(("name", "mode"), CASES)
@torch.no_grad()
def test_what_comes_back_equals_the_oracle(name, mode):
    tiny = tiny_family(name)
    vlm, batch = tiny.vlm, tiny.batch(MIXED)
    few, all_ = layers = stages(name, vlm)
    pruner = FewAll(*layers)
    pruner.comes_back = mode
    if name in PAST and mode == "raw":
        with pytest.raises(PruneZooError, match=r"deepstack.*: let them come back as they left"):
            attach(vlm, pruner, keep=1.0)
        return
    encoded = encode(vlm, batch)
    bare = last_logits(vlm(**batch).logits, encoded)
    with Watch(pruner) as watch, attach(vlm, pruner, keep=1.0):
        logits, again = last_logits(vlm(**batch).logits, encoded), write(vlm, batch)
    away = away_by_layer(watch.calls[:2], encoded)
    assert away[few].any(1).sum() == len(set(encoded.sample.tolist())) and not away[all_].any()
    waiting = states(vlm, batch, away, 0 if mode == "raw" else few)
    columns = [(row, gone.nonzero()[:, 0]) for row, gone in enumerate(away[few])]
    back = {all_: [(row, own, waiting[row, own]) for row, own in columns]}
    with masked(vlm, away, back):
        expected, written = last_logits(vlm(**batch).logits, encoded), write(vlm, batch)
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert (expected - bare)[encoded.sample].abs().amax(1).min() > 1e-4
    assert torch.equal(again.sequences, written.sequences)
    torch.testing.assert_close(torch.stack(again.logits), torch.stack(written.logits), **CLOSE)


@pytest.mark.parametrize("name", [*NOW, *(name for name in ("qwen3_5", "lfm2_vl", "kimi_k25") if name in NEWER)])
@torch.no_grad()
def test_without_any_token_behind_a_layer(name):
    tiny = tiny_family(name)
    vlm, batch, layer = tiny.vlm, tiny.batch(MIXED), stages(name, tiny.vlm)[0]
    pruner = build_pruner("withdraw", layer=layer)
    with Watch(pruner) as watch, attach(vlm, pruner, keep=1.0) as run:
        again = write(vlm, batch)
    gone, _ = watch.gone(encode(vlm, batch))
    with masked(vlm, gone):
        written = write(vlm, batch)
    assert run.stats.after == [0] * 4
    torch.testing.assert_close(torch.stack(again.logits), torch.stack(written.logits), **CLOSE)
