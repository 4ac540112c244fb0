"""The input stage on every family: a matrix of families and checks, ids ``input-FAMILY-CHECK``.

What stays must be as in the bare model, whose tower looks at no patch of what is gone and whose language model looks at
no column of it.
"""

import pytest
import torch
from families import ALL, CLIPS, FAMILIES, LARGE, MIXED, NEWER, ONE_EACH, SMALL, TALL, Sample, tiny_family
from input_oracle import alive_by_run, blind_tower, choose, features_equal, pictures
from prompt_oracle import CLOSE, blind, drops, write

from prunezoo import PruneZooError, attach, encode
from prunezoo.host.families import find_family
from prunezoo.host.families.base import TAKES_FEATURES
from prunezoo.host.stages.packed import PackedGap
from prunezoo.host.stages.plain import PlainGap

POOLED = {
    "llava_onevision": "a cell that is left out before the tower would leak into others: use a pruner of the prompt",
    "llava_next_video": "pools the patches of a frame by a kernel of its config: for clips use a pruner of the prompt",
}
"""Families that mix the cells of clips."""

MISDEALT = ("glm4v", "glm46v", "glm4v_moe", "glm_ocr")
"""The bare model gives two images of a prompt to the wrong beams."""


def equals_oracle(tiny, samples, keep=0.5, side="left", **options):
    """Features of what stays, the prompt's last logits, six steps of decoding."""
    vlm, samples = tiny.vlm, pictures(tiny, samples)
    batch = tiny.batch(samples, side)
    bare = encode(vlm, batch)
    encoded, output = choose(vlm, batch, keep)
    dropped = drops(bare, output)
    assert dropped.any()
    runs = alive_by_run(tiny, batch, dropped, samples)
    with blind_tower(vlm, runs, len(samples)):
        features_equal(encoded, output, bare, encode(vlm, batch))
    last = bare.mask.shape[1] - 1 - bare.mask.flip(1).int().argmax(1)
    with blind_tower(vlm, runs, len(samples)), blind(vlm, dropped):
        expected = vlm(**batch).logits[torch.arange(len(samples)), last]
        written = write(vlm, batch, **options) if side == "left" else None
    with attach(vlm, "random_input?seed=3", keep) as run:
        torch.testing.assert_close(vlm(**batch).logits[:, -1], expected, **CLOSE)
        assert sum(run.stats.before) - sum(run.stats.after) == int(dropped.sum())
        if written is None:  # `generate` itself reads wrong positions behind padding on the right
            return
        again = write(vlm, batch, **options)
    assert torch.equal(again.sequences, written.sequences)
    # Experts scale what is rounded: beams of GLM-4.5V differ by 1.3e-5 of logits of order 1.
    close = {"rtol": 0, "atol": 3e-5} if tiny is ALL.get("glm4v_moe") else CLOSE
    torch.testing.assert_close(torch.stack(again.logits), torch.stack(written.logits), **close)


def keep_all(tiny):
    """Logits and generated tokens bit for bit; and the features, where hooks are on and nothing is left out."""
    samples = MIXED + (CLIPS if tiny.videos and tiny not in map(ALL.get, POOLED) else [])
    batch = tiny.batch(pictures(tiny, samples))
    bare, written = tiny.vlm(**batch).logits, write(tiny.vlm, batch)
    with attach(tiny.vlm, "random_input", keep=1.0) as run:
        assert torch.equal(tiny.vlm(**batch).logits, bare)
        again = write(tiny.vlm, batch)
    assert run.stats.before == run.stats.after
    assert torch.equal(again.sequences, written.sequences)
    assert all(torch.equal(a, b) for a, b in zip(again.logits, written.logits, strict=True))
    short = find_family(tiny.vlm).short()

    def gaps(_kind, _batch):
        find = lambda rows, patches: torch.ones(rows, patches, dtype=torch.bool)  # noqa: E731
        return PackedGap(short, find) if short.packed else PlainGap(short, find)

    hooked = encode(tiny.vlm, batch, gaps=gaps)
    plain = encode(tiny.vlm, batch)
    assert torch.equal(hooked.inputs.features, plain.inputs.features)
    assert all(torch.equal(a, b) for a, b in zip(hooked.deep, plain.deep, strict=True))


def half(tiny):
    equals_oracle(tiny, ONE_EACH)


def one_sample(tiny):
    equals_oracle(tiny, [Sample((LARGE,), 5)], keep=0.25)


def two_tokens(tiny):
    """So that tiles, crops and windows are without any."""
    equals_oracle(tiny, MIXED, keep=2)


def ragged_counts(tiny):
    equals_oracle(tiny, MIXED, keep=torch.tensor([3, 1, 5, 1000]))


def two_images(tiny):
    equals_oracle(tiny, [Sample((LARGE, TALL), 4), Sample((SMALL, SMALL), 7)])


def right_padding(tiny):
    equals_oracle(tiny, MIXED, side="right")


def beams(tiny):
    misdealt = any(tiny is ALL.get(name) for name in MISDEALT)
    samples = MIXED if TAKES_FEATURES and not misdealt else [Sample((SMALL,), words) for words in (5, 3, 6, 4)]
    equals_oracle(tiny, samples, keep=torch.tensor([3, 1, 5, 7]), num_beams=2)


def video(tiny):
    if not tiny.videos:
        encode(tiny.vlm, {**tiny.batch([Sample()]), "pixel_values_videos": torch.zeros(1, 2, 3, 24, 24)})
    if tiny in map(ALL.get, POOLED):
        with attach(tiny.vlm, "random_input", keep=0.5):
            tiny.vlm(**tiny.batch(CLIPS))
    equals_oracle(tiny, CLIPS)
    equals_oracle(tiny, CLIPS, keep=torch.tensor([2, 5, 3, 4]))


def detach(tiny):
    """Nothing is left behind, also when a call failed."""
    vlm, batch = tiny.vlm, tiny.batch(pictures(tiny, MIXED))
    bare, written = vlm(**batch).logits, write(vlm, batch).sequences
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in vlm.modules()]
    with attach(vlm, "random_input", keep=2):
        assert vlm(**batch).logits.shape != bare.shape
        with pytest.raises(ValueError, match="typo"):
            vlm.generate(**batch, typo=1)
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in vlm.modules()]
    assert torch.equal(vlm(**batch).logits, bare) and torch.equal(write(vlm, batch).sequences, written)


QWENS = ("qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
MORE = (
    "qwen2_5_omni_thinker", "glm4v", "glm46v", "glm4v_moe", "glm_ocr", "llava_next_video", "vipllava", "aya_vision",
    "cohere2_vision",
)  # fmt: skip
CHECKS = [
    keep_all, half, one_sample, two_tokens, ragged_counts, two_images, right_padding, beams, video, detach
]  # fmt: skip
SUPPORTED = (*FAMILIES, *(name for name in (*QWENS, *MORE) if name in NEWER))
CELLS = [pytest.param(name, check, id=f"input-{name}-{check.__name__}") for name in SUPPORTED for check in CHECKS]
CELLS += [pytest.param(name, half, id=f"input-{name}-half") for name in NEWER if name not in SUPPORTED]


@pytest.mark.parametrize(("name", "check"), CELLS)
@torch.no_grad()
def test_matrix(name, check, record_property):
    outcome = "yes"
    try:
        check(tiny_family(name) if name in SUPPORTED else ALL[name])
    except PruneZooError as error:
        outcome = f"refused: {error}"
    record_property("outcome", outcome)
    if name not in SUPPORTED:
        assert "use a pruner of the prompt or layer stage" in outcome
    elif check is video and not ALL[name].videos:
        assert "pass a clip's frames as images" in outcome
    elif check is video and name in POOLED:
        assert POOLED[name] in outcome
    else:
        assert outcome == "yes" or (not TAKES_FEATURES and "transformers 5.19 or later" in outcome)
