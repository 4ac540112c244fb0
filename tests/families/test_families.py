"""The prompt stage on every family: a matrix of families and checks.

Ids read ``prompt-FAMILY-CHECK``; each cell records its outcome, "yes" or "refused: why", from which the README's table
of support is made.
"""

import pytest
import torch
from families import ALL, CLIPS, LARGE, MIXED, NEWER, ONE_EACH, SMALL, TALL, Sample, tiny_family
from prompt_oracle import CLOSE, blind, choose, drops, write

from prunezoo import PruneZooError, attach, build_pruner, encode, full_forward, gated_forward, pruned_forward
from prunezoo.host.families.base import TAKES_FEATURES


def equals_oracle(tiny, samples, keep=0.5, side="left", **options):
    """Six steps of decoding; the prompt's last logits of a direct call, with and without a cache."""
    vlm, batch = tiny.vlm, tiny.batch(samples, side)
    encoded, output = choose(vlm, batch, keep)
    dropped = drops(encoded, output)
    assert dropped.any(1).sum() == len(set(encoded.sample.tolist()))
    last = encoded.mask.shape[1] - 1 - encoded.mask.flip(1).int().argmax(1)
    with blind(vlm, dropped):
        expected = vlm(**batch).logits[torch.arange(len(samples)), last]
        written = write(vlm, batch, **options) if side == "left" else None
    pruner = build_pruner("random", seed=3)
    with attach(vlm, pruner, keep) as run:
        for use_cache in (True, False):
            torch.testing.assert_close(vlm(**batch, use_cache=use_cache).logits[:, -1], expected, **CLOSE)
        assert sum(run.stats.before) - sum(run.stats.after) == 2 * int(dropped.sum())
        if written is None:  # `generate` itself reads wrong positions behind padding on the right
            return
        again = write(vlm, batch, **options)
    assert torch.equal(again.sequences, written.sequences)
    torch.testing.assert_close(torch.stack(again.logits), torch.stack(written.logits), **CLOSE)


# The matrix


def keep_all(tiny):
    """Logits and generated tokens bit for bit."""
    batch = tiny.batch(MIXED)
    bare, written = tiny.vlm(**batch).logits, write(tiny.vlm, batch)
    with attach(tiny.vlm, "random", keep=1.0) as run:
        assert torch.equal(tiny.vlm(**batch).logits, bare)
        again = write(tiny.vlm, batch)
    assert run.stats.before == run.stats.after and len(run.stats.before) == 8
    assert torch.equal(again.sequences, written.sequences)
    assert all(torch.equal(a, b) for a, b in zip(again.logits, written.logits, strict=True))
    assert torch.equal(full_forward(tiny.vlm, encode(tiny.vlm, batch)).logits, bare)


def half(tiny):
    equals_oracle(tiny, ONE_EACH)


def one_sample(tiny):
    """No padding, so no mask: where gaps in the positions could be read as the seams of packed sequences."""
    equals_oracle(tiny, [Sample((LARGE,), 5)])


def ragged_counts(tiny):
    equals_oracle(tiny, MIXED, keep=torch.tensor([3, 1, 5, 7]))


def two_images(tiny):
    equals_oracle(tiny, [Sample((LARGE, TALL), 4), Sample((SMALL, SMALL), 7)])


def none_one_two(tiny):
    equals_oracle(tiny, MIXED)


def right_padding(tiny):
    equals_oracle(tiny, MIXED, side="right")


# Where TAKES_FEATURES is not, the bare model itself gives the tiles and images of a prompt to the wrong beams.
ONE_IMAGE = [Sample((SMALL,), words) for words in (5, 3, 6, 4)]
BEAMS = MIXED if TAKES_FEATURES else ONE_IMAGE


MISDEALT = {NEWER[name] for name in ("glm4v", "glm46v", "glm4v_moe", "glm_ocr", "granite4_vision") if name in NEWER}
"""The bare model gives two images of a prompt to the wrong beams; see test_families_newer.py."""


def beams(tiny):
    equals_oracle(tiny, ONE_IMAGE if tiny in MISDEALT else BEAMS, num_beams=2)


def two_sequences(tiny):
    samples = ONE_IMAGE if tiny in MISDEALT else BEAMS
    equals_oracle(tiny, samples, keep=torch.tensor([3, 1, 5, 7]), num_beams=2, num_return_sequences=2)


def detach(tiny):
    """What was attached leaves nothing behind, also when a call failed."""
    vlm, batch = tiny.vlm, tiny.batch(MIXED)
    bare, written = vlm(**batch).logits, write(vlm, batch).sequences
    with attach(vlm, "random", keep=2):
        assert vlm(**batch).logits.shape != bare.shape
        assert not torch.equal(write(vlm, batch).logits[0], bare[:, -1])
        with pytest.raises(ValueError, match="typo"):
            vlm.generate(**batch, typo=1)
    assert not vlm._forward_pre_hooks and not vlm._forward_hooks and "generate" not in vars(vlm)
    assert torch.equal(vlm(**batch).logits, bare) and torch.equal(write(vlm, batch).sequences, written)


def gates(tiny):
    """Closed gates equal the tokens dropped, open ones the model; every gate gets a gradient."""
    vlm, batch = tiny.vlm, tiny.batch(MIXED)
    encoded, output = choose(vlm, batch, 0.5)
    value = torch.zeros(encoded.inputs.valid.shape).scatter_add(1, output.index, output.valid.float())
    value.requires_grad_()
    gated = gated_forward(vlm, encoded, value, log_eps=1e-9).logits[:, -1]
    torch.testing.assert_close(gated, pruned_forward(vlm, encoded, output).logits[:, -1], rtol=0, atol=5e-5)
    ones = gated_forward(vlm, encoded, torch.ones_like(value), log_eps=1e-9).logits[:, -1]
    torch.testing.assert_close(ones, vlm(**batch).logits[:, -1], rtol=0, atol=5e-5)
    gated_forward(vlm, encoded, value).logits[:, -1].square().sum().backward()
    assert (value.grad[encoded.inputs.valid] != 0).all()


def video(tiny):
    """A clip is one row beside the images."""
    if tiny.videos:
        batch = tiny.batch(CLIPS)
        bare, written = tiny.vlm(**batch).logits, write(tiny.vlm, batch)
        with attach(tiny.vlm, "random", keep=1.0):
            assert torch.equal(tiny.vlm(**batch).logits, bare)
            assert torch.equal(write(tiny.vlm, batch).sequences, written.sequences)
        equals_oracle(tiny, CLIPS)
        if tiny is not NEWER.get("video_llama_3"):  # whose bare model has no beams then; see test_families_newer.py
            equals_oracle(tiny, CLIPS, keep=torch.tensor([2, 5, 3, 4]), num_beams=2)
    else:
        encode(tiny.vlm, {**tiny.batch([Sample()]), "pixel_values_videos": torch.zeros(1, 2, 3, 24, 24)})


CHECKS = [
    keep_all, half, one_sample, ragged_counts, two_images, none_one_two, right_padding, beams, two_sequences, detach,
    gates, video,
]  # fmt: skip
RECURRENT = ("qwen3_5", "qwen3_5_moe", "minicpmv4_6", "lfm2_vl")
REFUSED = {(name, "video"): "pass a clip's frames as images" for name, tiny in ALL.items() if not tiny.videos}
FEW = {"deepseek_ocr2": [one_sample], "llama4": [check for check in CHECKS if check not in (beams, two_sequences)]}
"""The first reads pictures of a million pixels; the second has no beams, see test_families_newer.py."""
CELLS = [
    pytest.param(name, check, id=f"prompt-{name}-{check.__name__}") for name in ALL for check in FEW.get(name, CHECKS)
]


@pytest.mark.parametrize(("name", "check"), CELLS)
def test_matrix(name, check, record_property):
    tiny = tiny_family(name)
    outcome = "yes"
    try:
        with torch.set_grad_enabled(check is gates):
            check(tiny)
    except PruneZooError as error:
        outcome = f"refused: {error}"
    record_property("outcome", outcome)
    if check is gates and name in RECURRENT:
        assert "with recurrent layers, from which no mask hides tokens" in outcome
    elif (name, check.__name__) in REFUSED:
        assert REFUSED[name, check.__name__] in outcome
    else:  # older releases may refuse more
        assert outcome == "yes" or (not TAKES_FEATURES and "transformers 5.19 or later" in outcome)
