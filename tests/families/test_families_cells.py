"""The vision stage on families whose towers are pruned by whole cells, ids ``vision-FAMILY-CHECK``.

A pruner keeps what receives most in each block. The oracle is the bare model, in whose tower nobody looks at patches of
cells that have gone, and which works out itself which these are; its language model looks at no column of them.
"""

from contextlib import contextmanager

import pytest
import torch
from cell_oracle import WHY, Chooser, Stopping, Watched, WatchedBehind, by_cells
from families import ALL, CLIPS, FAMILIES, LARGE, MIXED, ONE_EACH, SMALL, TALL, Sample, tiny_family
from input_oracle import features_equal, pictures
from prompt_oracle import CLOSE, blind, write

from prunezoo import PruneZooError, attach, encode
from prunezoo.core.budgets import counts_of
from prunezoo.host.families import find_family
from prunezoo.host.families.base import TAKES_FEATURES
from prunezoo.host.stages.cell_runs import choose_by_cells
from prunezoo.host.stages.cut import Timer


def choosing(tiny, batch, samples, keep, pruner):
    """The bare batch, and who decides by hand."""
    encoded = encode(tiny.vlm, batch)
    counts = torch.tensor(counts_of(keep, encoded.inputs.counts))
    depth = find_family(tiny.vlm).tower().depth
    return encoded, Chooser(tiny, batch, samples, encoded, pruner, counts, depth)


def equals_oracle(tiny, samples, keep=0.5, side="left", cls=Watched):
    """Which cells stay, their features in all levels, the prompt's last logits, and six steps of decoding."""
    vlm, samples, pruner = tiny.vlm, pictures(tiny, samples), cls().eval()
    batch = tiny.batch(samples, side)
    bare, chooser = choosing(tiny, batch, samples, keep, pruner)
    with by_cells(vlm, chooser):
        masked = encode(vlm, batch)
    dropped = chooser.dropped(bare, batch["input_ids"])
    assert dropped.any()
    encoded, output = choose_by_cells(vlm, bare, pruner, keep, Timer(vlm.device))
    for row, own in enumerate(chooser.left.values() if len(chooser.runs) == 1 else map(chooser.left.get, range(4))):
        slots = bare.slots[row][output.index[row][output.valid[row]]] + bare.sample[row] * dropped.shape[1]
        assert slots.tolist() == own
    features_equal(encoded, output, bare, masked)
    last = bare.mask.shape[1] - 1 - bare.mask.flip(1).int().argmax(1)
    with by_cells(vlm, chooser), blind(vlm, dropped):
        expected = vlm(**batch).logits[torch.arange(len(samples)), last]
        written = write(vlm, batch) if side == "left" else None
    with attach(vlm, pruner, keep) as run:
        torch.testing.assert_close(vlm(**batch).logits[:, -1], expected, **CLOSE)
        assert sum(run.stats.before) - sum(run.stats.after) == int(dropped.sum())
        if written is None:  # `generate` itself reads wrong positions behind padding on the right
            return
        again = write(vlm, batch)
    assert torch.equal(again.sequences, written.sequences)
    torch.testing.assert_close(torch.stack(again.logits), torch.stack(written.logits), **CLOSE)


def keep_all(tiny):
    """Logits and generated tokens bit for bit."""
    samples = MIXED + (CLIPS if tiny.videos and tiny is not FAMILIES["llava_onevision"] else [])
    batch = tiny.batch(pictures(tiny, samples))
    bare, written = tiny.vlm(**batch).logits, write(tiny.vlm, batch)
    for pruner in (Watched(), Stopping()):
        with attach(tiny.vlm, pruner.eval(), keep=1.0) as run:
            assert torch.equal(tiny.vlm(**batch).logits, bare)
            again = write(tiny.vlm, batch)
        assert run.stats.before == run.stats.after and len(run.stats.before) >= 8
        assert torch.equal(again.sequences, written.sequences)
        assert all(torch.equal(a, b) for a, b in zip(again.logits, written.logits, strict=True))


def half(tiny):
    """Four samples, padded on the left; inside of blocks, and behind them."""
    equals_oracle(tiny, ONE_EACH)
    equals_oracle(tiny, ONE_EACH, cls=WatchedBehind)


def one_sample(tiny):
    equals_oracle(tiny, [Sample((LARGE,), 5)], keep=3)


def ragged_counts(tiny):
    """So few that tiles, windows and frames are without any."""
    equals_oracle(tiny, MIXED, keep=torch.tensor([3, 1, 5, 1000]))
    equals_oracle(tiny, MIXED, keep=2, cls=WatchedBehind)


def two_images(tiny):
    equals_oracle(tiny, [Sample((LARGE, TALL), 4), Sample((SMALL, SMALL), 7)])


def right_padding(tiny):
    equals_oracle(tiny, MIXED, side="right")


@contextmanager
def in_double(tiny):
    """Where rounding alone is more than the tests allow."""
    before = tiny.dtype
    tiny.vlm.double()
    tiny.dtype = torch.float64
    try:
        yield
    finally:
        tiny.vlm.to(before)
        tiny.dtype = before


def video(tiny):
    """A clip is one row beside the images."""
    if tiny is FAMILIES["llava_onevision"]:
        with attach(tiny.vlm, Watched().eval(), keep=0.5):
            tiny.vlm(**tiny.batch(CLIPS))
    with in_double(tiny):
        equals_oracle(tiny, CLIPS)
        equals_oracle(tiny, CLIPS, keep=torch.tensor([2, 5, 3, 4]))


def restored(tiny):
    """What has stopped is put out as it was, and the language model reads all."""
    vlm, samples, pruner = tiny.vlm, pictures(tiny, MIXED), Stopping().eval()
    batch = tiny.batch(samples)
    _, chooser = choosing(tiny, batch, samples, 0.5, pruner)
    with by_cells(vlm, chooser, stop=True):
        expected, written = vlm(**batch).logits[:, -1], write(vlm, batch)
    assert (expected - vlm(**batch).logits[:, -1]).abs().max() > 0.01
    with attach(vlm, pruner, keep=0.5) as run:
        torch.testing.assert_close(vlm(**batch).logits[:, -1], expected, **CLOSE)
        again = write(vlm, batch)
    assert run.stats.before == run.stats.after
    assert torch.equal(again.sequences, written.sequences)
    torch.testing.assert_close(torch.stack(again.logits), torch.stack(written.logits), **CLOSE)


def detach(tiny):
    """Nothing is left behind, also when a call failed."""
    vlm, batch = tiny.vlm, tiny.batch(pictures(tiny, MIXED))
    bare, written = vlm(**batch).logits, write(vlm, batch).sequences
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in vlm.modules()]
    with attach(vlm, Watched().eval(), keep=2):
        assert vlm(**batch).logits.shape != bare.shape
        with pytest.raises(ValueError, match="typo"):
            vlm.generate(**batch, typo=1)
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in vlm.modules()]
    assert torch.equal(vlm(**batch).logits, bare) and torch.equal(write(vlm, batch).sequences, written)


def merging(tiny):
    """Of the stage: a method that merges, which has no cell to put its tokens in."""
    attach(tiny.vlm, "tome", keep=0.5)


CHECKS = [keep_all, half, one_sample, ragged_counts, two_images, right_padding, restored, detach, merging]
NAMES = [name for name in WHY if name in ALL]
CELLS = [pytest.param(name, check, id=f"vision-{name}-{check.__name__}") for name in NAMES for check in CHECKS]
CELLS += [pytest.param(name, video, id=f"vision-{name}-video") for name in NAMES if ALL[name].videos]


@pytest.mark.parametrize(("name", "check"), CELLS)
@torch.no_grad()
def test_matrix(name, check, record_property):
    outcome = "yes"
    try:
        check(tiny_family(name))
    except PruneZooError as error:
        outcome = f"refused: {error}"
    record_property("outcome", outcome)
    if not TAKES_FEATURES and "transformers 5.19 or later" in outcome:
        return
    if check is merging:
        assert f"it merges tokens, and {WHY[name]}; use one that only drops, as flowcut" in outcome
    elif check is video and name == "llava_onevision":
        assert "would leak into others: use a pruner of the prompt" in outcome
    else:
        assert outcome == "yes"
