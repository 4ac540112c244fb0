"""EVS and VidCom² beyond what their authors' functions chose: exact counts, still pictures, batches, real clips."""

import pytest
import torch
from families import CLIPS, here
from golden.evs import clip

from prunezoo import attach, build_pruner
from prunezoo.training_free.evs import published_count
from prunezoo.training_free.vidcom2 import fill


def moving(frames=4, rows=3, columns=5, seed=0):
    """A clip ``(frames * cells, 8)`` in which one cell of each later frame changes, another one each time."""
    still = torch.randn(rows * columns, 8, generator=torch.Generator().manual_seed(seed))
    x = still.repeat(frames, 1, 1)
    for frame in range(1, frames):
        x[frame, 2 * frame] += 3
    return clip(x.flatten(0, 1).numpy(), frames, rows, columns)


def test_counts_as_published():
    """As floating point has it, not as arithmetic would."""
    assert [published_count(10, 10, rate) for rate in (0.7, 0.8, 0.9)] == [30, 19, 10]
    assert published_count(3, 20, 0.7) == 20  # a short clip keeps one frame


def test_evs_keeps_the_first_frame_and_what_changed():
    kept = build_pruner("evs").eval()(moving(), 15 + 5).index[0].tolist()
    assert kept[:15] == list(range(15))
    # a cell that changed, and, in the next frame, changed back
    assert set(kept[15:]) <= {17, 32, 34, 49, 51}


def test_less_than_a_frame_is_of_the_first_one():
    inputs = moving()
    few = build_pruner("evs").eval()(inputs, 4).index[0].tolist()
    first = inputs.features[0, :15]
    far = 1 - torch.nn.functional.cosine_similarity(first, first.mean(0), dim=-1)
    assert set(few) == set(far.topk(4).indices.tolist())


@pytest.mark.parametrize("total", [1, 3, 17, 24, 59, 60])
def test_vidcom2_is_exact(total):
    inputs = moving()
    output = build_pruner("vidcom2").eval()(inputs, total)
    assert output.count.tolist() == [total]


@pytest.mark.parametrize(("total", "frames"), [(15, [2]), (30, [1, 3]), (45, [0, 2, 3]), (60, [0, 1, 2, 3])])
def test_uniform_frames_are_whole_and_spread_in_time(total, frames):
    kept = build_pruner("uniform", frames=True).eval()(moving(), total).index[0].tolist()
    assert kept == [15 * frame + cell for frame in frames for cell in range(15)]


def test_of_too_many_uniform_frames_some_of_each_leave():
    kept = build_pruner("uniform", frames=True).eval()(moving(), 20).index[0]
    frame = kept.div(15, rounding_mode="floor")
    assert frame.unique().tolist() == [1, 3] and frame.bincount().tolist() == [0, 10, 0, 10]
    few = build_pruner("uniform", frames=True).eval()(moving(), 4).index[0]
    assert few.div(15, rounding_mode="floor").unique().tolist() == [2] and len(few.unique()) == 4


def test_filling_up_and_taking_away():
    sizes, wanted = torch.tensor([4, 4, 4]), torch.tensor([3.4, 1.3, 0.2])
    counts = torch.tensor([3, 1, 1])
    assert fill(counts, wanted, sizes, 5).tolist() == [3, 1, 1]
    assert fill(counts, wanted, sizes, 7).tolist() == [4, 2, 1]
    assert fill(counts, wanted, sizes, 4).tolist() == [3, 1, 0]
    assert fill(counts, wanted, sizes, 12).tolist() == [4, 4, 4]


@pytest.mark.parametrize("name", ["evs", "vidcom2"])
@torch.no_grad()
def test_on_clips_and_pictures(name):
    tiny = here("qwen2_5_vl")
    batch = tiny.batch(CLIPS)
    with attach(tiny.vlm, name, 0.5) as run:
        assert tiny.vlm(**batch).logits.isfinite().all()
    assert all(after == max(round(0.5 * n), 1) for n, after in zip(run.stats.before, run.stats.after, strict=True))
