"""Images of a prompt as the frames of one clip: one row to pruners, nothing else to the model."""

import pytest
import torch

from prunezoo import attach
from prunezoo.core.errors import PruneZooError
from prunezoo.core.registry import build_pruner
from prunezoo.core.signals import join_images
from prunezoo.host import encode, full_forward
from prunezoo.host.run import run_pruned
from trainers.data.conversation import ConversationCollator
from trainers.data.suite import load_suite
from trainers.evaluation.loading import load_vlm


@pytest.fixture(scope="module")
def loaded(request):
    root = request.config.rootpath
    vlm, processor = load_vlm(str(root / "checkpoints" / "tiny-llava"), "cpu", "float32")
    items = [load_suite("scenes-steps")[0], load_suite("scenes-icl")[0]]  # four pictures, and three with words between
    return vlm, ConversationCollator(processor)(items), ConversationCollator(processor, answers=False)(items)


def test_the_rows_of_a_clip_are_its_images_one_behind_the_other(loaded):
    vlm, batch, _ = loaded
    needs = ("frame", "received_attention", "vision_attention")
    apart, clip = encode(vlm, batch, needs), encode(vlm, batch, needs, clips=True)
    assert apart.rows == (0, 0, 0, 0, 1, 1, 1) and clip.rows == (0, 1) and clip.inputs.counts == (576, 432)
    for row, images in enumerate(((0, 1, 2, 3), (4, 5, 6))):
        own = slice(0, 144 * len(images))
        assert torch.equal(clip.inputs.features[row, own], apart.inputs.features[list(images)].flatten(0, 1))
        assert torch.equal(clip.slots[row, own], apart.slots[list(images)].flatten())
        seen = clip.inputs.signal("received_attention")[row, own]
        assert torch.equal(seen, apart.inputs.signal("received_attention")[list(images)].flatten())
        frames = torch.arange(len(images)).repeat_interleave(144)
        assert torch.equal(clip.inputs.signal("frame")[row, own], frames)
        assert torch.equal(clip.inputs.cells[row, own, 0], frames)
    whole = clip.inputs.signal("vision_attention")[0]
    assert torch.equal(whole[144:288, 144:288], apart.inputs.signal("vision_attention")[1])
    assert not whole[144:288, :144].any()
    assert not apart.inputs.signal("frame").any()


def test_the_model_reads_the_same_whether_images_are_a_clip_or_not(loaded):
    vlm, batch, _ = loaded
    bare = vlm(**{name: values for name, values in batch.items() if name != "labels"}, use_cache=False).logits
    clip = encode(vlm, batch, clips=True)
    assert torch.equal(full_forward(vlm, clip).logits, bare)
    assert torch.equal(run_pruned(vlm, clip, build_pruner("uniform").eval(), 1.0).host.logits, bare)


def test_a_budget_is_of_the_clip_and_may_go_to_one_frame(loaded):
    vlm, _, prompts = loaded
    with attach(vlm, "evs", 144, clips=True) as run:
        vlm.generate(**prompts, max_new_tokens=2)
    assert run.stats.stages[0].after == [144, 144]
    clip = encode(vlm, prompts, ("frame",), clips=True)
    output = build_pruner("evs").eval()(clip.inputs, 144)
    assert output.index.tolist() == [list(range(144))] * 2  # the first frame is whole


def test_where_the_tower_sees_frames_one_by_one_clips_are_refused(loaded):
    vlm, _, prompts = loaded
    for name in ("energy", "tome_unmerge"):
        with attach(vlm, name, 0.5, clips=True), pytest.raises(PruneZooError, match="leave `clips` out"):
            vlm.generate(**prompts, max_new_tokens=1)


def test_signals_of_images_are_joined_by_their_axes():
    rows = [torch.full((2, 3), 1.0), torch.full((3, 3), 2.0)]
    assert join_images("prompt_head_attention", rows).shape == (5, 3)
    maps = [torch.ones(2, 2, 4), torch.ones(1, 1, 4)]
    whole = join_images("vision_head_attention", maps)
    assert whole.shape == (3, 3, 4) and whole.sum() == 20 and not whole[2, :2].any()
    text = torch.ones(7)
    assert join_images("text_features", [text, text]) is text
