"""HoliTom the slow way: every way to cut a clip, clusters and folding token by token; and clips in models."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from families import CLIPS, VIDEO_FAMILIES, tiny_family
from layer_oracle import Watch
from torch.nn import functional

from prunezoo import PruneInputs, PruneZooError, attach, build_pruner, encode
from prunezoo.core.clusters import density_peaks
from prunezoo.host import encode_needs, run_pruned
from prunezoo.training_free.holitom import cut_windows, saved


def partitions(frames, longest):
    if frames == 0:
        yield []
    for length in range(1, min(frames, longest) + 1):
        for before in partitions(frames - length, longest):
            yield [*before, (frames - length, frames - 1)]


@pytest.mark.parametrize("longest", [1, 2, 3, 9])
def test_no_other_windows_save_more(longest):
    random, several = np.random.default_rng(longest), 0
    for _ in range(20):
        still = random.random((6, 10)) < 0.7
        windows = cut_windows(still, longest)
        assert windows[0][0] == 0 and windows[-1][1] == 6 and all(b[0] == a[1] + 1 for a, b in pairwise(windows))
        best = max(sum(saved(still, w) for w in cut) for cut in partitions(7, longest))
        assert sum(saved(still, window) for window in windows) == best
        several += len(windows) < 7
    assert several > 10 or longest == 1


def clip(frames=5, side=4, width=8, seed=0):
    """A clip in which the left half stands still up to a change of scene."""
    random = torch.Generator().manual_seed(seed)
    pictures = [torch.randn(side * side, width, generator=random)]
    left = torch.arange(side * side) % side < side // 2
    for number in range(1, frames):
        noise = torch.randn(side * side, width, generator=random)
        moved = torch.where(left[:, None], pictures[-1] + 0.05 * noise, noise)
        pictures.append(noise if number == 3 else moved)
    count = frames * side * side
    numbers = torch.arange(count)
    cells = torch.stack([numbers // (side * side), numbers % (side * side) // side, numbers % side], -1)[None]
    signals = {
        "frame": cells[..., 0],
        "received_attention": torch.rand(1, count, generator=random),
        "last_attention@previous": torch.rand(1, count, generator=random),
    }
    return PruneInputs(torch.cat(pictures)[None], torch.ones(1, count, dtype=torch.bool), cells, signals=signals)


def dealt(total, weights):
    """In proportion, rests to the largest, the first of equal ones."""
    whole = [total * w // sum(weights) for w in weights]
    rests = sorted(range(len(weights)), key=lambda i: (-(total * weights[i] % sum(weights)), i))
    for i in rests[: total - sum(whole)]:
        whole[i] += 1
    return whole


@pytest.mark.parametrize("keep", [7, 20, 39])
def test_a_clip_by_hand(keep):
    """Two windows, 0 to 2 and 3 to 4; places 0, 1 of each row stand still: 8 in each."""
    inputs, x = clip(), clip().features[0].view(5, 16, 8)
    attention = inputs.signal("received_attention")[0]
    output = build_pruner("holitom").merge(inputs, keep)
    still = [p for p in range(16) if p % 4 < 2]
    parts, tokens = [], {}
    for first, last in ((0, 2), (3, 4)):
        parts.append((first, last))
        parts += [[f * 16 + p for p in range(16) if p % 4 >= 2] for f in range(first, last + 1)]
    quotas = dealt(keep, [8] * len(parts))
    for part, count in zip(parts, quotas, strict=True):
        if isinstance(part, list):
            tokens |= {slot: inputs.features[0, slot] for slot in sorted(part, key=lambda s: -attention[s])[:count]}
            continue
        mean = torch.stack([x[f, still] for f in range(part[0], part[1] + 1)]).mean(0)
        distance = torch.cdist(mean.double(), mean.double()) / 8**0.5
        near = distance.sort(1).values[:, :7]
        density = (-near.square().mean(1)).exp()
        lead = [
            min((float(distance[i, j]) for j in range(8) if density[j] > density[i]), default=float(distance.max()))
            for i in range(8)
        ]
        centres = sorted(range(8), key=lambda i: -float(density[i]) * lead[i])[:count]
        owner = [i if i in centres else min(centres, key=lambda c: float(distance[i, c])) for i in range(8)]
        for c in centres:
            others = [mean[i] for i in range(8) if owner[i] == c and i != c]
            own = 0.6 * mean[c] + 0.4 * torch.stack(others).mean(0) if others else mean[c]
            tokens[part[0] * 16 + still[c]] = own
    assert output.index[0].tolist() == sorted(tokens)
    torch.testing.assert_close(
        output.features[0], torch.stack([tokens[slot] for slot in sorted(tokens)]), rtol=1e-4, atol=1e-5
    )


def test_windows_are_given_up_where_too_many_would_be_gone():
    inputs, pruner = clip(), build_pruner("holitom").merge
    for keep in (56, 57, 64, 65, 79):  # 80 less 16 + 8 saved: 56
        output = pruner(inputs, keep)
        assert output.counts == (keep,)
        changed = (output.features[0] != inputs.features[0, output.index[0]]).any(1)
        first = {int(slot) // 16 for slot in output.index[0, changed]}
        assert first == ({0, 3} if keep <= 56 else {0} if keep <= 64 else set())


def test_density_of_so_many_neighbours():
    tokens = torch.randn(1, 9, 4, generator=torch.Generator().manual_seed(1))
    some, count = torch.ones(1, 9, dtype=torch.bool), torch.tensor([3])
    ours = density_peaks(tokens, some, count, 3, 3)
    plain = density_peaks(tokens, some, count, 3)
    assert torch.equal(ours[0], plain[0]) and torch.equal(ours[1], plain[1])
    assert not torch.equal(density_peaks(tokens, some, count, 3, 9)[0], plain[0])


@pytest.mark.parametrize("keep", [1, 5, 30])
def test_folding_one_after_the_other(keep):
    inputs = clip(frames=3)
    output = build_pruner("holitom").fold(inputs, keep)
    looked, x = inputs.signal("last_attention@previous")[0], inputs.features[0]
    kept = sorted(sorted(range(48), key=lambda i: -looked[i])[:keep])
    tokens = {i: x[i].clone() for i in kept}
    for i in range(48):
        if i not in tokens:
            nearest = max(kept, key=lambda j: functional.cosine_similarity(x[i], x[j], dim=0))
            tokens[nearest] = (tokens[nearest] + x[i]) / 2
    assert output.index[0].tolist() == kept
    torch.testing.assert_close(output.features[0], torch.stack([tokens[i] for i in kept]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
@torch.no_grad()
def test_clips_in_models(name):
    tiny = tiny_family(name)
    batch = tiny.batch(CLIPS)
    pruner = build_pruner("holitom", still=-1.0, layer=2).eval()  # all stands still
    encoded = encode(tiny.vlm, batch, encode_needs(pruner))
    with Watch(pruner) as watch:
        run = run_pruned(tiny.vlm, encoded, pruner, 2)
    assert next(output.counts for _, output in watch.calls) == (2,) * 4
    frame, clips = encoded.inputs.signal("frame"), torch.tensor([False, True, True, False])
    first = frame.gather(1, run.output.index).masked_fill(~run.output.valid, 0)
    assert not first[clips].any()  # at the first frame of the only window
    with attach(tiny.vlm, pruner, keep=2):
        torch.testing.assert_close(tiny.vlm(**batch).logits[:, -1], run.host.logits[:, -1], rtol=1e-4, atol=1e-4)


def test_bad_fields_are_refused():
    for field, value in (
        ("still", 1.5),
        ("centre", -0.1),
        ("window", 0),
        ("neighbours", 0),
        ("enter", 0.9),
        ("layer", 0),
    ):
        with pytest.raises(PruneZooError, match=f"{field}="):
            build_pruner("holitom", **{field: value})
