"""What the prompt stage must equal on every family: the bare model, that does not look at the tokens that are gone."""

from contextlib import contextmanager

import torch
from families import IMAGE, VIDEO
from recurrent_oracle import layers_of, past_length, run_on_what_stays
from torch.nn.functional import pad

from prunezoo import build_pruner, encode

STEPS = 6
# The same sums over fewer terms are taken in another order; logits are of order 1.
CLOSE = {"rtol": 0, "atol": 1e-5}


@contextmanager
def blind(vlm, dropped):
    """The oracle: within the block the bare model, called as ever, looks at no ``dropped (B, L)`` column.

    Its own masks, of whatever shape they are at a layer and a step, lose these columns; layers with a state run without
    them; nothing else is touched, and nothing of this comes from the code under test.
    """

    def hide(layer, args, kwargs):
        hidden, mask = args[0], kwargs["attention_mask"]
        if not hasattr(layer, "self_attn"):
            return None
        rows, length = hidden.shape[-3:-1]  # Gemma 3n has streams in front of them
        if mask is None:  # causal, as the kernel reads it
            total = length + past_length(layer, kwargs.get("past_key_values"), length, dropped.shape[1])
            mask = torch.ones(rows, 1, length, total, dtype=torch.bool).tril(total - length)
        away = pad(dropped, (0, mask.shape[-1] - dropped.shape[1])).repeat_interleave(rows // len(dropped), 0)
        hidden_columns = away[:, None, None]
        worst = torch.finfo(hidden.dtype).min
        mask = mask & ~hidden_columns if mask.dtype == torch.bool else mask.masked_fill(hidden_columns, worst)
        return args, {**kwargs, "attention_mask": mask}

    handles = [layer.register_forward_pre_hook(hide, with_kwargs=True) for layer in layers_of(vlm)]
    handles += [handle for layer in layers_of(vlm) for handle in run_on_what_stays(layer, dropped)]
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
    if lines is not None:  # which of them live is tested by hand in test_families_features.py
        alive = lines.alive(output.index, output.valid)
        for row, slots, own in zip(encoded.sample, lines.slots, alive, strict=True):
            dropped[row, slots[own]] = False
    return dropped


def write(vlm, batch, **options):
    options = {"max_new_tokens": STEPS, "return_dict_in_generate": True, "output_logits": True, **options}
    return vlm.generate(**batch, **options)
