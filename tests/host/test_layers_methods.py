"""FastV, PyramidDrop and FEATHER: what they choose, against attention maps of an eager model and counts by hand."""

import pytest
import torch
from layer_oracle import Watch, masked
from layer_pruners import eager_copy, no_rotation
from tiny_llava import LONG, SHORT, make_image

from prunezoo import PruneZooError, attach, build_pruner, encode, full_forward
from prunezoo.host import encode_needs, run_pruned


@pytest.fixture
def batch(deep_llava):
    return deep_llava.batch([LONG, SHORT], [[make_image(0)], [make_image(1)]])


def eager_rows(vlm, encoded, layer, gone=None, rotary=True, left=None, images=False):
    """What the last column attends to of the image tokens ``left``, in eager maps; ``images``: heads weigh alike."""
    left = torch.arange(encoded.slots.shape[1]).expand_as(encoded.slots) if left is None else left
    eager = eager_copy(vlm)
    with masked(eager, gone or {}):
        if not rotary:
            eager.get_decoder().layers[layer].register_forward_pre_hook(no_rotation, with_kwargs=True)
        maps = full_forward(eager, encoded, output_attentions=True).attentions[layer]
    slots = encoded.slots.gather(1, left)
    rows = maps[:, :, -1].gather(2, slots[:, None].expand(-1, maps.shape[1], -1))  # (B, H, N)
    return (rows / rows.sum(2, keepdim=True) if images else rows).mean(1)


def watched(vlm, batch, pruner, keep):
    with torch.no_grad(), Watch(pruner) as watch:
        encoded = encode(vlm, batch, encode_needs(pruner))
        run = run_pruned(vlm, encoded, pruner, keep)
    return encoded, watch, run


def best(rows, count):
    return rows.topk(count, dim=1).indices.sort(1).values


@torch.no_grad()
def test_fastv_keeps_what_the_last_word_saw_in_the_layer_before(deep_llava, batch):
    pruner = build_pruner("fastv").eval()
    assert pruner.stages(32) == (2,)
    encoded, watch, run = watched(deep_llava.vlm, batch, pruner, 9)
    assert torch.equal(run.output.index, best(eager_rows(deep_llava.vlm, encoded, 1), 9))
    assert not torch.equal(run.output.index, best(eager_rows(deep_llava.vlm, encoded, 2), 9))
    assert run.tokens.tolist() == [(2 * 36 + 2 * 9) / 4] * 2 and len(watch.calls) == 1
    # The published ratio: half of the tokens behind layer 2 of 32.
    assert build_pruner("fastv").schedule(torch.tensor([288]), torch.tensor([576]), 32)[0].tolist() == [288]
    with pytest.raises(PruneZooError, match="layer=0"):
        build_pruner("fastv", layer=0)


@torch.no_grad()
def test_pyramiddrop_asks_the_layer_it_stands_in_front_of(deep_llava, batch):
    pruner = build_pruner("pyramiddrop").eval()
    assert pruner.stages(32) == (8, 16, 24) and pruner.stages(4) == (1, 2, 3)
    assert build_pruner("pyramiddrop", layers=(2, 5)).stages(32) == (2, 5)
    for total in (576, 2880):
        counts = pruner.schedule(torch.tensor([total // 8]), torch.tensor([total]), 32)
        assert [int(count) for count in counts] == [total // 2, total // 4, total // 8]
    encoded, watch, run = watched(deep_llava.vlm, batch, pruner, 4)
    left, (gone, _) = torch.arange(36).expand(2, -1), watch.gone(encoded)
    for inputs, output in watch.calls:
        before = {layer: columns for layer, columns in gone.items() if layer < inputs.layer}
        rows = eager_rows(deep_llava.vlm, encoded, inputs.layer, before, left=left)
        assert torch.equal(output.index, best(rows, output.index.shape[1]))
        left = left.gather(1, output.index)
    assert torch.equal(run.output.index, left) and [o.index.shape[1] for _, o in watch.calls] == [17, 8, 4]


@pytest.mark.parametrize("softmax", ["images", "all"])
@torch.no_grad()
def test_feather_joins_grid_and_attention_without_rotation(deep_llava, batch, softmax):
    pruner = build_pruner("feather", softmax=softmax).eval()
    assert pruner.stages(32) == (8, 16)
    encoded, watch, _ = watched(deep_llava.vlm, batch, pruner, 3)
    (first, one), (second, two) = watch.calls
    assert (first.layer, second.layer) == (1, 2)
    alike = {"rotary": False, "images": softmax == "images"}
    rows = eager_rows(deep_llava.vlm, encoded, 0, **alike)
    grid = torch.tensor([row % 3 == 0 and column % 3 == 0 for row in range(6) for column in range(6)])
    count = one.index.shape[1]
    for image, kept in enumerate(one.index):
        others = rows[image].masked_fill(grid, -1).topk(count - 4).indices
        assert set(kept.tolist()) == set(grid.nonzero()[:, 0].tolist()) | set(others.tolist())
    # No protection in the second stage.
    gone, _ = watch.gone(encoded)
    later = eager_rows(deep_llava.vlm, encoded, 1, {1: gone[1]}, left=one.index, **alike)
    assert torch.equal(two.index, best(later, 3))
    assert not grid[one.index.gather(1, two.index)].all()


def test_feathers_counts_follow_from_one_share():
    pruner, total = build_pruner("feather"), torch.tensor([729] * 3)
    share = torch.tensor([0.3, 0.25, 1.0], dtype=torch.double)
    first = 729 * (share + (1 - share) / 9)  # the best, and a ninth of the others
    steps = pruner.schedule((first * share**2).round().long(), total, 32)
    torch.testing.assert_close(steps[0].double(), first, rtol=0.02, atol=1)
    assert steps[1].tolist() == [25, 15, 729] and steps[0][2] == 729
    # Below the grid's own number the best on the grid stay.
    steps = pruner.schedule(torch.tensor([1]), torch.tensor([36]), 32)
    assert int(steps[0]) >= 4
    with pytest.raises(PruneZooError, match="two stages"):
        build_pruner("feather", layers=(1, 2, 3))
    with pytest.raises(PruneZooError, match="stride=0"):
        build_pruner("feather", stride=0)


@pytest.mark.parametrize("name", ["feather", "pyramiddrop"])
def test_a_decoder_too_shallow_for_the_usual_layers_is_refused(name, tiny_llava):
    batch = tiny_llava.batch(["<s> USER: <image> what ? ASSISTANT:"], [[make_image(1)]])
    assert tiny_llava.vlm.config.text_config.num_hidden_layers == 2
    refused = pytest.raises(PruneZooError, match=rf"^{name}: .*decoder of 2.*set layers$")
    with refused, attach(tiny_llava.vlm, name, keep=4):
        tiny_llava.vlm(**batch)
