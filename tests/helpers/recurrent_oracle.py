"""The oracle for layers that keep a state instead of keys: they run on the columns that stay, put together.

A masked column would still fade their state, and be a zero in a convolution instead of absent.
"""

import torch

MIXERS = ("linear_attn", "conv")  # what stands in a layer in place of `self_attn`


def layers_of(vlm):
    """The layers of the language model."""
    decoder = vlm.get_decoder()
    return decoder.layers if hasattr(decoder, "layers") else decoder.model.layers


def past_length(module, cache, queries, whole):
    """Columns in front of the queries of a layer, which may attend to the keys of another.

    Args:
        module: The layer.
        cache: Or None.
        queries: Columns that it is given.
        whole: Columns of the prompt, for a forward without cache.
    """
    if getattr(module.self_attn, "is_kv_shared_layer", False):  # others have read the queries' columns by now
        return (whole if cache is None else cache.get_seq_length()) - queries
    return 0 if cache is None else cache.get_seq_length(module.self_attn.layer_idx)


def run_on_what_stays(layer, dropped):
    """Put hooks on the mixer of a layer, by which it reads a prompt less its columns ``dropped (B, L)``.

    Returns:
        The handles of the hooks; none where the layer has attention.
    """
    if hasattr(layer, "self_attn"):
        return []
    mixer, held = next(getattr(layer, name) for name in MIXERS if hasattr(layer, name)), []

    def gather(_, args, kwargs):
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if hidden.shape[1] != dropped.shape[1]:
            return None
        mask = kwargs.get("attention_mask")
        real = torch.ones(hidden.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        stay = real & ~dropped.repeat_interleave(len(hidden) // len(dropped), 0)
        most = int(stay.sum(1).max())
        rows = [own.nonzero()[:, 0] for own in stay]
        index = torch.stack([torch.nn.functional.pad(own, (most - len(own), 0)) for own in rows])
        valid = torch.arange(most) >= most - torch.tensor([len(own) for own in rows])[:, None]
        held.append((index.masked_fill(~valid, hidden.shape[1]), hidden.shape))
        less = hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[2]))
        kwargs = {**kwargs, "hidden_states": less, "attention_mask": None if valid.all() else valid.long()}
        return (), kwargs

    def scatter(_, _args, output):
        if not held:
            return None
        index, (rows, length, _) = held.pop()
        whole = output.new_zeros(rows, length + 1, output.shape[2])
        return whole.scatter(1, index[..., None].expand_as(output), output)[:, :-1]

    return [mixer.register_forward_pre_hook(gather, with_kwargs=True), mixer.register_forward_hook(scatter)]
