"""The vision stage by cells beside other stages, with several heads out, under other kernels, and what is refused."""

from dataclasses import replace

import pytest
import torch
from cell_oracle import Watched
from families import LARGE, MIXED, SMALL, Sample, tiny_family
from input_oracle import is_packed, tower_of

from prunezoo import PruneOutput, PruneZooError, attach, build_pruner, encode
from prunezoo.core.contract import Pruner
from prunezoo.core.plan import gather_rows
from prunezoo.core.signals import INSIDE_SIGNALS, parse_signal
from prunezoo.host.families import find_family
from prunezoo.host.stages.cell_runs import choose_by_cells
from prunezoo.host.stages.cut import Timer


class Asking(Pruner):
    """Keeps every second token in its first block, and looks at all signals in the next."""

    name = "asking"
    stage = "vision"

    def __init__(self, needs, seen):
        super().__init__()
        self.wanted, self.seen = needs, seen

    @property
    def needs(self):
        return self.wanted

    def stages(self, depth):
        return (0, 1)

    def score(self, inputs):
        self.seen.append(inputs)
        return torch.arange(inputs.valid.shape[1]).expand(inputs.valid.shape) % 2.0


class AtFirst(Asking):
    """Looks in the first block only."""

    def stages(self, depth):
        return (0,)


def signals_of(has_cls):
    return tuple(name for name in INSIDE_SIGNALS if has_cls or not name.startswith("cls"))


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "internvl", "gemma3", "llava_next"])
@torch.no_grad()
def test_signals_of_a_whole_tower_are_those_that_encode_reads(name):
    tiny, seen = tiny_family(name), []
    vlm, batch = tiny.vlm, tiny.batch(MIXED)
    needs = signals_of(find_family(vlm).tower().has_cls)
    whole = encode(vlm, batch, tuple(f"{kind}@0" for kind in needs)).inputs
    with attach(vlm, AtFirst(needs, seen).eval(), keep=2):
        vlm(**batch)
    for kind in needs:
        ours, theirs = seen[0].signals[kind], whole.signals[f"{kind}@0"]
        for row, valid in enumerate(whole.valid):
            one, two = ours[row][valid], theirs[row][valid]
            if parse_signal(kind).axes.count("N") > 1:
                one, two = one[:, valid], two[:, valid]
            torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "idefics3", "gemma3"])
@torch.no_grad()
def test_sdpa_and_eager_agree(name):
    tiny, found = tiny_family(name), []
    batch = tiny.batch(MIXED)
    for kernel in ("sdpa", "eager"):
        vlm = tiny.build()
        tower_of(vlm).set_attn_implementation(kernel)
        with attach(vlm, Watched().eval(), keep=torch.tensor([3, 1, 5, 4])):
            found.append(vlm(**batch).logits)
    torch.testing.assert_close(*found, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl", "llava_next"])
@torch.no_grad()
def test_what_an_input_stage_left_out_does_not_come_back(name):
    """Two stages in turn leave what one of them leaves of the tower that was given no more."""
    tiny, seen = tiny_family(name), []
    vlm, batch = tiny.vlm, tiny.batch([Sample((LARGE,), 5), Sample((SMALL, LARGE), 4)])
    before, inside = build_pruner("random_input", seed=3).eval(), Asking(("received_attention",), seen).eval()
    whole = encode(vlm, batch)
    with attach(vlm, [before, inside], keep=[0.5, 3]) as run:
        both = vlm(**batch).logits[:, -1]
        assert vlm.generate(**batch, max_new_tokens=2).shape[0] == 2
    assert seen[0].counts == tuple(round(count / 2) for count in whole.inputs.counts)
    assert [stage.after for stage in run.stats.stages][1] <= run.stats.stages[0].after
    with attach(vlm, [before, build_pruner("uniform").eval()], keep=[0.5, 3]):
        assert (vlm(**batch).logits[:, -1] - both).abs().max() > 1e-4
    bare = vlm(**batch).logits
    with attach(vlm, [before, inside], keep=[1.0, 1.0]):
        assert torch.equal(vlm(**batch).logits, bare)


class OneHead(Watched):
    """Of the first image the second head is out behind the first block, of others the first."""

    name = "one_head"

    def beside(self, inputs, output):
        heads = torch.tensor([[True, False]] + [[False, True]] * (len(inputs.valid) - 1))
        return replace(output, heads=heads)


@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen2_vl", "internvl"])
def test_heads_that_are_out_give_nothing(name):
    tiny = tiny_family(name)
    vlm, batch = tiny.vlm, tiny.batch([Sample((SMALL,), 5), Sample((SMALL,), 4)])
    bare, packed = vlm(**batch).logits, is_packed(vlm)
    blocks = find_family(vlm).tower().blocks

    def silence(_module, args):
        given = args[0].clone()
        half = given.shape[-1] // 2
        many = len(given) // 2  # patches of an image, or one row of them
        given[:many, ..., half:] = 0
        given[many:, ..., :half] = 0
        return (given,)

    joiners = [block.attn.proj if packed else block.attention.projection_layer for block in blocks]
    handles = [joiner.register_forward_pre_hook(silence) for joiner in joiners[1:]]
    expected = vlm(**batch).logits
    for handle in handles:
        handle.remove()
    assert (expected - bare).abs().max() > 0.01
    with attach(vlm, OneHead().eval(), keep=1.0):
        torch.testing.assert_close(vlm(**batch).logits, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_tower_gets_less_and_runs_once():
    tiny, seen = tiny_family("qwen3_vl"), []
    vlm, batch = tiny.vlm, tiny.batch([Sample((LARGE,), 5)])
    handles = [
        block.mlp.register_forward_hook(lambda _m, args, _o: seen.append(len(args[0])))
        for block in tower_of(vlm).blocks
    ]
    try:
        with attach(vlm, Asking(("received_attention",), []).eval(), keep=6):
            vlm(**batch)
    finally:
        for handle in handles:
            handle.remove()
    patches = int(batch["image_grid_thw"].prod())
    assert len(seen) == 3 and patches > seen[0] > seen[1] == seen[2] == 4 * 6


class Merging(Watched):
    """Says nothing of it beforehand."""

    name = "merging"

    def reduce(self, inputs, keep):
        output = super().reduce(inputs, keep)
        return PruneOutput(output.index, output.valid, gather_rows(inputs.features, output.index) * 2)


@torch.no_grad()
def test_what_makes_tokens_is_refused_with_what_works():
    tiny = tiny_family("gemma3")
    vlm, batch = tiny.vlm, tiny.batch([Sample((SMALL,), 4)])
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in vlm.modules()]
    with attach(vlm, Merging().eval(), keep=3), pytest.raises(PruneZooError, match=r"'merging' makes.*as flowcut"):
        vlm(**batch)
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in vlm.modules()]
    encoded = encode(vlm, batch)
    with pytest.raises(PruneZooError, match="a batch as `encode` returned it"):
        choose_by_cells(vlm, type(encoded)(**{**vars(encoded), "source": None}), Watched(), 3, Timer(vlm.device))
