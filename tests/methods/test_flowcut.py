"""FlowCut beyond the authors' figures: what it does in towers of other depths, without CLS, and in uneven batches."""

import pytest
import torch
from golden.flowcut import TOKENS, WIDTH, patches, tower_of
from reads import counted_reads
from towers import small_tower
from vision_runs import TOWERS, N, run

from prunezoo import PruneZooError, build_pruner
from prunezoo.core.checks import deferred
from prunezoo.core.registry import pruner_class
from prunezoo.host.parts.tower import Tower
from prunezoo.host.stages.cut import Timer
from prunezoo.host.stages.vision import VisionStage

RECEIVED = {"clip": {}, "siglip": {"attention": "received"}}


def pixels_of(seed, rows=3):
    return torch.randn(rows, 3, 20, 20, generator=torch.Generator().manual_seed(seed))


def in_tables(keep, **options):
    """Lengths behind each block, and what is kept, of the tower of a golden case with 576 tokens."""
    model, lengths = tower_of(3, len(keep)), []
    states = torch.zeros(len(keep), TOKENS, WIDTH)
    states[..., 0] = torch.arange(TOKENS)
    pruner = build_pruner("flowcut", **options).eval()
    timer = Timer(torch.device("cpu"))
    handles = [
        block.register_forward_hook(lambda _module, _args, output: lengths.append(output.shape[1]))
        for block in model.encoder.layers
    ]
    with torch.no_grad(), VisionStage(Tower(model, -2), pruner, patches(len(keep)), keep, timer) as stage:
        states = model.encoder(inputs_embeds=states).last_hidden_state
    for handle in handles:
        handle.remove()
    return lengths, stage.output(states[:, 1:])


@pytest.mark.parametrize(("kind", "layer"), TOWERS)
def test_images_do_not_know_of_each_other(kind, layer):
    """The running score goes with the tokens of an image though others of the batch leave at another pace."""
    model, pixels = small_tower(kind), pixels_of(0)
    tower, pruner = Tower(model, layer, has_cls=kind == "clip"), build_pruner("flowcut", **RECEIVED[kind])
    batch = run(model, tower, pruner, pixels, (2, 13, N))
    for row, keep in enumerate((2, 13, N)):
        alone = run(model, tower, pruner, pixels[row : row + 1], (keep,))
        assert torch.equal(alone.index[0], batch.index[row, :keep])
        torch.testing.assert_close(alone.features[0], batch.features[row, :keep], rtol=1e-4, atol=1e-5)


def test_a_batch_may_share_the_count_as_the_authors_batches_do():
    """Then the shortest of all is as long as the longest; alone, each has its own."""
    lengths, own = in_tables((64, 64))
    shared, theirs = in_tables((64, 64), count="batch")
    assert all(one >= two for one, two in zip(lengths, shared, strict=True)) and lengths != shared
    assert own.counts == theirs.counts == (64, 64) and not torch.equal(own.index, theirs.index)


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_a_short_tower_keeps_what_it_is_asked(depth):
    model, pixels = small_tower("clip"), pixels_of(1)
    output = run(model, Tower(model, depth), build_pruner("flowcut"), pixels, (1, 9, 24))
    assert output.counts == (1, 9, 24)


def test_keeping_everything_is_the_bare_tower():
    model, pixels = small_tower("clip"), pixels_of(2)
    bare = model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    output = run(model, Tower(model, -2), build_pruner("flowcut"), pixels, (N, N, N))
    assert torch.equal(output.features, bare)


def test_the_host_waits_once_in_each_block_that_drops_but_the_last(monkeypatch):
    """Of 22 blocks every second one drops. Only a count that is not the scheduled one is to be read of the device."""
    pruner, asked = pruner_class("flowcut"), []
    pace = pruner.pace

    def watch(self, inputs, keep, to_go):
        count = pace(self, inputs, keep, to_go)
        asked.append(count is not keep)
        return count

    monkeypatch.setattr(pruner, "pace", watch)
    with deferred(), counted_reads() as seen:
        in_tables((64, 100))
    assert asked == [*[False, True] * 10, False, False] and not seen["aten._local_scalar_dense"]
    asked.clear()
    in_tables((576, 576))
    assert not any(asked), "nothing is to be counted where all stay"


def test_a_tower_without_cls_is_told_what_works():
    model = small_tower("siglip")
    tower = Tower(model, -1, has_cls=False)
    with pytest.raises(PruneZooError, match=r"no CLS token.*'received_attention'"):
        run(model, tower, build_pruner("flowcut"), pixels_of(0), (3, 3, 3))


def test_a_class_token_that_is_like_nothing_else_leaves_the_attention_to_decide():
    """Its product with itself alone can be so large that nothing is left of the softmax for others."""
    pruner = build_pruner("flowcut").eval()
    inputs = patches(1)
    values = torch.randn(1, 576, 2, 8, generator=torch.Generator().manual_seed(0))
    attention = torch.rand(1, 576, generator=torch.Generator().manual_seed(1))
    of_cls = torch.full((1, 576, 2, 8), 30.0)
    signals = {"cls_attention": attention, "vision_values": values, "cls_value": of_cls}
    score = pruner.score(type(inputs)(inputs.features, inputs.valid, inputs.cells, signals=signals))
    expected = attention / attention.sum() * values.mean(2).abs().sum(-1)
    torch.testing.assert_close(score, expected)


@pytest.mark.parametrize("bad", [{"attention": "mean"}, {"count": "all"}])
def test_unknown_words_are_refused(bad):
    with pytest.raises(PruneZooError, match=f"{next(iter(bad))}=.*flowcut"):
        build_pruner("flowcut", **bad)
