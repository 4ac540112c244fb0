"""The prompt stage on every family: a matrix of families and checks, and what is special about some.

Ids read ``prompt-FAMILY-CHECK``; each cell records its outcome, "yes" or "refused: why", from which the README's table
of support is made.
"""

from contextlib import contextmanager

import pytest
import torch
from families import FAMILIES, IMAGE, VIDEO, Sample, tiny_family
from torch.nn.functional import pad

from modules import PruneZooError, attach, build_pruner, encode, full_forward, gated_forward, pruned_forward
from modules.host.families.base import TAKES_FEATURES

STEPS = 6
LARGE, WIDE, TALL, SMALL = (48, 40), (24, 48), (48, 24), (24, 24)
ONE_EACH = [Sample((size,), words) for size, words in ((LARGE, 5), (WIDE, 3), (TALL, 6), (SMALL, 4))]
MIXED = [Sample((LARGE,), 5), Sample((), 3), Sample((WIDE, SMALL), 6), Sample((TALL,), 4)]
CLIPS = [Sample((LARGE,), 5, (4,)), Sample((), 4, (4,)), Sample((), 3), Sample((SMALL,), 4)]
# The same sums over fewer terms are taken in another order; logits are of order 1.
CLOSE = {"rtol": 0, "atol": 1e-5}


@contextmanager
def blind(vlm, dropped):
    """The oracle: within the block the bare model, called as ever, looks at no ``dropped (B, L)`` column.

    Its own masks, of whatever shape they are at a layer and a step, lose these columns; nothing else is touched, and
    nothing of this comes from the code under test.
    """

    def hide(layer, args, kwargs):
        hidden, mask = args[0], kwargs["attention_mask"]
        rows, length = hidden.shape[:2]
        cache = kwargs.get("past_key_values")
        if mask is None:  # causal, as the kernel reads it
            total = length + (0 if cache is None else cache.get_seq_length(layer.self_attn.layer_idx))
            mask = torch.ones(rows, 1, length, total, dtype=torch.bool).tril(total - length)
        away = pad(dropped, (0, mask.shape[-1] - dropped.shape[1])).repeat_interleave(rows // len(dropped), 0)
        hidden_columns = away[:, None, None]
        worst = torch.finfo(hidden.dtype).min
        mask = mask & ~hidden_columns if mask.dtype == torch.bool else mask.masked_fill(hidden_columns, worst)
        return args, {**kwargs, "attention_mask": mask}

    handles = [layer.register_forward_pre_hook(hide, with_kwargs=True) for layer in vlm.get_decoder().layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def choose(vlm, batch, keep):
    """What the pruner of these tests, which scatters its choice by content, leaves: the encoding and the choice."""
    encoded = encode(vlm, batch)
    return encoded, build_pruner("random", seed=3).eval()(encoded.inputs, keep)


def drops(encoded, output):
    """``(B, L)`` bool: the columns of the prompt that go."""
    ids = encoded.batch["input_ids"]
    dropped = (ids == IMAGE) | (ids == VIDEO)
    for row, slots, index, valid in zip(encoded.sample, encoded.slots, output.index, output.valid, strict=True):
        dropped[row, slots[index[valid]]] = False
    lines = encoded.newlines
    if lines is not None:  # which of them live is tested by hand below
        alive = lines.alive(output.index, output.valid)
        for row, slots, own in zip(encoded.sample, lines.slots, alive, strict=True):
            dropped[row, slots[own]] = False
    return dropped


def write(vlm, batch, **options):
    options = {"max_new_tokens": STEPS, "return_dict_in_generate": True, "output_logits": True, **options}
    return vlm.generate(**batch, **options)


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
BEAMS = MIXED if TAKES_FEATURES else [Sample((SMALL,), words) for words in (5, 3, 6, 4)]


def beams(tiny):
    equals_oracle(tiny, BEAMS, num_beams=2)


def two_sequences(tiny):
    equals_oracle(tiny, BEAMS, keep=torch.tensor([3, 1, 5, 7]), num_beams=2, num_return_sequences=2)


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
        equals_oracle(tiny, CLIPS, keep=torch.tensor([2, 5, 3, 4]), num_beams=2)
    else:
        encode(tiny.vlm, {**tiny.batch([Sample()]), "pixel_values_videos": torch.zeros(1, 2, 3, 24, 24)})


CHECKS = [
    keep_all, half, one_sample, ragged_counts, two_images, none_one_two, right_padding, beams, two_sequences, detach,
    gates, video,
]  # fmt: skip
REFUSED = {(name, "video"): "pass a clip's frames as images" for name, tiny in FAMILIES.items() if not tiny.videos}
CELLS = [pytest.param(name, check, id=f"prompt-{name}-{check.__name__}") for name in FAMILIES for check in CHECKS]


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
    if (name, check.__name__) in REFUSED:
        assert REFUSED[name, check.__name__] in outcome
    else:  # older releases may refuse more
        assert outcome == "yes" or (not TAKES_FEATURES and "transformers 5.19 or later" in outcome)
