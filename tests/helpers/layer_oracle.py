"""What the layer stage must equal: nothing gets shorter, and from a layer on nobody looks at the tokens that are gone.

Hooks on the decoder's layers change masks alone, over whole caches; nothing here is shared with the code under test.
"""

from contextlib import contextmanager

import torch
from recurrent_oracle import layers_of, past_length, run_on_what_stays
from torch.nn.functional import pad


class Watch:
    """Records what a pruner is asked and answers, from the first stage on."""

    def __init__(self, pruner):
        self.calls = []  # (inputs, output) by stage, of all parts of a combination
        self.handles = [
            part.register_forward_hook(lambda _, args, output: self.calls.append((args[0], output)))
            for part, _ in pruner.parts(1.0)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def gone(self, encoded):
        """By layer, the columns ``(B, L)`` that nobody looks at from there on; and what merged tokens became."""
        away, made, result = torch.zeros_like(encoded.mask), {}, {}
        left = [valid.nonzero()[:, 0] for valid in encoded.inputs.valid]  # of each image, in its own numbers
        for inputs, output in self.calls:
            away = away.clone()
            left = [own[index[valid]] for own, index, valid in zip(left, output.index, output.valid, strict=True)]
            for row, (sample, own) in enumerate(zip(encoded.sample.tolist(), left, strict=True)):
                slots = encoded.slots[row]
                away[sample, slots[encoded.inputs.valid[row]]] = True
                away[sample, slots[own]] = False
                if output.features is not None:
                    made.setdefault(inputs.layer or 0, []).append(
                        (sample, slots[own], output.features[row][output.valid[row]])
                    )
                if encoded.newlines is not None:  # one lives as long as a patch of its row
                    lines = encoded.newlines
                    ends = lines.ends[row][own]
                    alive = torch.isin(torch.arange(lines.valid.shape[1]), ends) & lines.valid[row]
                    away[sample, lines.slots[row][lines.valid[row]]] = True
                    away[sample, lines.slots[row][alive]] = False
            result[inputs.layer or 0] = away
        return result, made


@contextmanager
def masked(vlm, gone, made=None, compact=False):
    """While it runs, ``vlm`` does not look at columns ``gone``, ``{layer: (B, L) bool}``, from these layers on.

    Merged tokens, ``made``, are written at their columns; ``compact`` numbers what is left anew.
    """
    decoder = vlm.get_decoder()

    def hook(layer):
        first = max((k for k in gone if k <= layer), default=None)

        def change(module, args, kwargs):
            if first is None:
                return None
            hidden, cache = args[0], kwargs.get("past_key_values")
            for sample, columns, features in (made or {}).get(layer, ()):
                if hidden.shape[1] >= gone[first].shape[1]:
                    hidden = hidden.clone()
                    hidden[sample, columns] = features.to(hidden.dtype)
            if not hasattr(module, "self_attn"):
                return (hidden, *args[1:]), kwargs
            past = past_length(module, cache, hidden.shape[1], gone[first].shape[1])
            total = past + hidden.shape[1]
            mask = kwargs["attention_mask"]
            if mask is None:
                mask = (torch.arange(total) <= torch.arange(past, total)[:, None])[None, None]
            away = gone[first].repeat_interleave(len(hidden) // len(gone[first]), 0)
            away = pad(away, (0, max(total - away.shape[1], 0)), value=False)
            filler = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
            blocked = away[:, -mask.shape[-1] :][:, None, None]
            kwargs = {**kwargs, "attention_mask": mask.expand(len(hidden), -1, -1, -1).masked_fill(blocked, filler)}
            if compact:
                moved = away.cumsum(1)[:, past:]
                kwargs["position_embeddings"] = decoder.rotary_emb(hidden, kwargs["position_ids"] - moved)
            return (hidden, *args[1:]), kwargs

        return change

    handles = [
        module.register_forward_pre_hook(hook(layer), with_kwargs=True) for layer, module in enumerate(layers_of(vlm))
    ]
    for layer, module in enumerate(layers_of(vlm)):
        first = max((k for k in gone if k <= layer), default=None)
        handles += run_on_what_stays(module, gone[first]) if first is not None else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
