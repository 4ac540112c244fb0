"""Hourglass beyond the shared contract: representative frames, what is gathered and recovered, and its training."""

from dataclasses import replace

import pytest
import torch
from tiny_llava import make_image

from prunezoo import PruneInputs, PruneZooError
from prunezoo.core.clusters import density_peaks
from prunezoo.core.registry import build_pruner
from prunezoo.host import encode, full_forward
from prunezoo.host.stages.prompt import shorten_prompt
from prunezoo.learned.hourglass import Hourglass, clip_times, represent
from prunezoo.training_free._grid import share as dealt
from trainers.training.hourglass import HourglassModule
from trainers.training.losses import unexplained

WIDTH, SIDE = 32, 3


def clip(frames, rows=1, pad=0, seed=0):
    """Inputs of clips of so many frames of 3 × 3 patches."""
    torch.manual_seed(seed)
    cells = torch.cartesian_prod(torch.arange(frames), torch.arange(SIDE), torch.arange(SIDE))
    cells = torch.cat([cells, torch.full((pad, 3), -1)]).expand(rows, -1, -1)
    valid = cells[..., 0] >= 0
    features = torch.randn(rows, len(cells[0]), WIDTH)
    return PruneInputs(features, valid, cells, signals={"frame": cells[..., 0].clamp_min(0)})


def tiny(**options):
    torch.manual_seed(1)
    return Hourglass(**{**Hourglass.tiny_config(WIDTH, WIDTH), **options}).eval()


def trained(**options):
    """One whose weights are none of them at their start."""
    pruner = tiny(**options)
    with torch.no_grad():
        for parameter in pruner.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return pruner


def frames_kept(inputs, output):
    return inputs.cells[0, output.index[0, output.valid[0]], 0].tolist()


def test_whole_frames_represent_those_like_them():
    """Six frames of two kinds and one that is like none: with all of a frame, three of them stay, one of each."""
    inputs = clip(7)
    kinds = torch.randn(3, SIDE**2, WIDTH)
    kind = torch.tensor([0, 0, 1, 1, 1, 0, 2])
    features = (kinds[kind] + 0.01 * torch.randn(7, SIDE**2, WIDTH)).flatten(0, 1)[None]
    inputs = replace(inputs, features=features)
    frames = frames_kept(inputs, tiny(share=1.0)(inputs, 3 * SIDE**2))
    assert sorted({int(kind[frame]) for frame in frames}) == [0, 1, 2] and len(set(frames)) == 3
    assert all(frames.count(frame) == SIDE**2 for frame in frames)


@pytest.mark.parametrize(("share", "keep", "frames"), [(1.0, 9, 1), (1 / 3, 9, 3), (1 / 9, 7, 7), (1 / 9, 20, 7)])
def test_as_few_frames_as_hold_the_share(share, keep, frames):
    inputs = clip(7, pad=2)
    counts = torch.bincount(torch.tensor(frames_kept(inputs, tiny(share=share)(inputs, keep))), minlength=7)
    assert (counts > 0).sum() == frames and counts[counts > 0].max() - counts[counts > 0].min() <= 1


def alone(tokens, frame, count, of_frame, neighbours):
    """One image without padding, frame by frame: (n,) bool."""
    numbers = frame.unique().tolist()
    means = torch.stack([tokens[frame == number].mean(0) for number in numbers])
    every = torch.ones(1, len(numbers), dtype=torch.bool)
    order = density_peaks(means[None], every, torch.tensor([len(numbers)]), len(numbers), neighbours)[0][0]
    few, given = [], 0.0
    for place in order.tolist():
        if given < count - 1e-6:
            few.append(numbers[place])
            given += of_frame * float((frame == numbers[place]).sum())
    few.sort()
    kept = torch.zeros_like(frame, dtype=torch.bool)
    for number, quota in zip(few, dealt(count, [int((frame == n).sum()) for n in few]), strict=True):
        slots = (frame == number).nonzero()[:, 0]
        every = torch.ones(1, len(slots), dtype=torch.bool)
        best = density_peaks(tokens[slots][None], every, torch.tensor([quota]), max(quota, 1), neighbours)[0][0]
        kept[slots[best[:quota]]] = True
    return kept


def test_frames_of_other_sizes_give_exactly_what_is_asked():
    torch.manual_seed(0)
    frame = torch.tensor([[0] * 5 + [1] * 2 + [2] * 8, [0] * 4 + [3] * 6 + [0] * 5])
    valid = torch.arange(15) < torch.tensor([15, 10])[:, None]
    tokens = torch.randn(2, 15, WIDTH)
    for share in (0.1, 0.5, 1.0):
        for counts in zip(range(1, 16), [*range(10, 0, -1)] * 2, strict=False):
            kept = represent(tokens, frame, valid, counts, share, 2)
            assert kept.sum(1).tolist() == list(counts)
            for row, count in enumerate(counts):
                own = valid[row]
                wanted = alone(tokens[row][own], frame[row][own], count, share, 2)
                assert torch.equal(kept[row][own], wanted) and not kept[row][~own].any()


def test_what_stays_is_as_it_was_until_it_has_learnt_to_gather():
    inputs = clip(4, rows=2)
    output = tiny()(inputs, 6)
    torch.testing.assert_close(
        output.features, inputs.features.gather(1, output.index[..., None].expand(-1, -1, WIDTH))
    )
    pruner = trained(neighbours=2)
    before = pruner(inputs, 6)
    gone = torch.ones(36, dtype=torch.bool).index_fill(0, before.index[0], False).nonzero()[0, 0]
    changed = inputs.features.clone()
    changed[0, gone] += 0.01  # so little that the same tokens stay
    after = pruner(replace(inputs, features=changed), 6)
    assert torch.equal(before.index, after.index)
    assert (after.features[0] - before.features[0]).abs().amax(1).min() > 0
    torch.testing.assert_close(after.features[1], before.features[1])


@torch.no_grad()
def test_states_are_recovered_of_every_place_and_time():
    pruner, inputs = trained(), clip(4, pad=3)
    output = pruner(inputs, 5)
    states = torch.randn(1, 5, WIDTH)
    made = pruner.recovered(inputs, output, states)
    assert made.shape == inputs.features.shape
    assert torch.pdist(made[0, inputs.valid[0]]).min() > 1e-4  # no two are the same
    other = pruner.recovered(inputs, output, states + torch.randn(1, 5, 1))
    assert (made - other)[0, inputs.valid[0]].abs().amax(1).min() > 1e-4
    wider = clip(4, pad=9)
    wider = replace(wider, features=torch.cat([inputs.features, 100 * torch.randn(1, 6, WIDTH)], 1))
    again = pruner.recovered(wider, pruner(wider, 5), states)
    torch.testing.assert_close(again[:, :36], made[:, :36], rtol=1e-4, atol=1e-5)


def test_time_is_of_the_clip():
    assert clip_times(clip(3, pad=1))[0, [0, 9, 18, 27]].tolist() == [0, 0.5, 1, 0]
    assert clip_times(clip(1)).max() == 0


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"share": 0.0}, r"share must lie in \(0, 1\], got 0.0"),
        ({"slots": 0}, "slots must be at least 1"),
        ({"hidden": 30, "heads": 4}, "hidden=30 must be a multiple of heads=4"),
    ],
)
def test_sizes_that_cannot_be_are_refused(wrong, said):
    with pytest.raises(PruneZooError, match=said):
        build_pruner("hourglass", **wrong)


def test_another_width_is_refused():
    with pytest.raises(PruneZooError, match=r"built for tokens of width 64, .* build it with width=32"):
        build_pruner("hourglass", width=64, hidden=16, heads=2)(clip(2), 3)


def test_what_is_unexplained_is_of_the_spread():
    torch.manual_seed(0)
    states, valid = torch.randn(2, 6, 4), torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    assert unexplained(states, states, valid) == 0
    mean = states[valid].mean(0).expand_as(states)
    torch.testing.assert_close(unexplained(mean, states, valid), torch.tensor(1.0))
    far = states.masked_fill(~valid[..., None], 1e4)
    assert unexplained(far, states, valid) == 0


# Training


def module_of(tiny_llava, **options):
    torch.manual_seed(0)
    pruner = build_pruner("hourglass", **{**Hourglass.tiny_config(WIDTH, WIDTH), "width": 4096, "share": 0.5})
    return HourglassModule(str(tiny_llava.folder), pruner, vlm_dtype="float32", keep=(0.1, 0.3), **options)


def batch_of(tiny_llava):
    prompts = ["<s> USER: <image> <image> <image> what color ? ASSISTANT: red"] * 2
    batch = tiny_llava.batch(prompts, [[make_image(3 * row + i) for i in range(3)] for row in range(2)])
    labels = batch["input_ids"].masked_fill(torch.arange(batch["input_ids"].shape[1]) < 112, -100)
    return {**batch, "labels": labels}


def test_it_learns_to_answer_and_to_recover(tiny_llava):
    module, batch = module_of(tiny_llava), batch_of(tiny_llava)
    logged = {}
    module.log = lambda name, value, **_: logged.setdefault(name, []).append(float(value))
    module.log_dict = lambda values, **_: [module.log(*item) for item in values.items()]
    optimizer = torch.optim.Adam(module.pruner.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        module.training_step(dict(batch), 0).backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.pruner.parameters())
    hidden, kl = logged["train/hidden"], logged["train/kl"]
    assert hidden[-1] < 0.9 * hidden[0] and sum(kl[-5:]) < sum(kl[:5])
    assert logged["train/loss"][0] == pytest.approx(hidden[0] + kl[0], rel=1e-4)


@torch.no_grad()
def test_states_are_those_behind_a_layer(tiny_llava):
    """Behind the embeddings of the shorter prompt, for a start, they are the tokens that it was given."""
    module, batch = module_of(tiny_llava), batch_of(tiny_llava)
    assert module.behind == 1
    module.behind = 0
    encoded = encode(module.vlm, batch, module.pruner.needs, clips=True)
    assert len(encoded.sample) == 2  # a row for each clip
    output = module.pruner.eval()(encoded.inputs, 5)
    shorter, _ = shorten_prompt(module.vlm, encoded, output)
    said = full_forward(module.vlm, shorter, output_hidden_states=True)
    torch.testing.assert_close(module.states(said, shorter), output.features)


@pytest.mark.parametrize(
    ("wrong", "said"), [({"behind": 9}, "behind=9: the decoder has layers 1 to 2"), ({"keep": (0, 1)}, "two shares")]
)
def test_a_training_that_cannot_be_is_refused(tiny_llava, wrong, said):
    pruner = build_pruner("hourglass", **Hourglass.tiny_config(WIDTH, WIDTH))
    with pytest.raises(PruneZooError, match=said):
        HourglassModule(str(tiny_llava.folder), pruner, **wrong)
