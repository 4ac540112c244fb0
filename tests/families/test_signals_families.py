"""Signals of every family's tower and decoder, against what an attention function that we put in gets to see."""

from contextlib import contextmanager

import pytest
import torch
from families import FAMILIES, IMAGE, VIDEO_FAMILIES, Sample, tiny_family
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from prunezoo import PruneZooError, encode
from prunezoo.host.families import find_family

WITH_CLS = ("llava", "llava_next", "internvl")
PICTURES = [Sample(((48, 40),), 4), Sample(((24, 24), (24, 48)), 5), Sample((), 3)]
CLIPS = [Sample((), 4, (4,)), Sample((), 3), Sample((), 5, (4,))]
SEEN: dict[torch.nn.Module, list[torch.Tensor]] = {}


def spy(module, query, key, value, attention_mask, scaling=None, **options):
    """What sdpa computes, and the weights noted: ``(R, heads, rows, S)`` a call."""
    groups = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(groups, 1).transpose(-1, -2) * scaling
    if attention_mask is None and getattr(module, "is_causal", False) and query.shape[2] > 1:
        attention_mask = torch.ones(logits.shape[-2:], dtype=torch.bool).tril()
    if attention_mask is not None:
        floats = attention_mask.is_floating_point()
        logits = logits + attention_mask if floats else logits.masked_fill(~attention_mask, torch.finfo().min)
    SEEN.setdefault(module, []).append(logits.softmax(-1))
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)


AttentionInterface.register("spy", spy)
AttentionMaskInterface.register("spy", sdpa_mask)


@contextmanager
def watching(vlm, part):
    """Within the block the tower ("vision_config") or the decoder ("text_config") attends by `spy`."""
    SEEN.clear()
    vlm.set_attn_implementation({part: "spy"})
    try:
        yield SEEN
    finally:
        vlm.set_attn_implementation({part: "sdpa"})


@contextmanager
def recording(attention):
    """Keys and values ``(R, S, H, d)`` by the name of their signal, as the block's linear maps give them."""
    made, heads = {}, attention.num_heads

    def together(_module, _args, output):
        made["vision_keys"], made["vision_values"] = output[None].unflatten(-1, (3, heads, -1)).unbind(2)[1:]

    def apart(name):
        return lambda _module, _args, output: made.update({name: output.unflatten(-1, (heads, -1))})

    if hasattr(attention, "qkv"):
        handles = [attention.qkv.register_forward_hook(together)]
    else:
        parts = {"vision_keys": attention.k_proj, "vision_values": attention.v_proj}
        handles = [module.register_forward_hook(apart(name)) for name, module in parts.items()]
    try:
        yield made
    finally:
        for handle in handles:
            handle.remove()


def patches_of(tiny, batch):
    """Which patch goes into which token, by the gradient of each token's features to the projected state.

    Returns:
        ``(patches, R, N)`` bool; patches of all pictures that the tower sees, in its order.
    """
    tower, states = find_family(tiny.vlm).tower(), []

    def begin(_module, _args, output):
        states.append(output.detach().requires_grad_())
        return states[0]

    # In front of the hooks by which transformers records hidden states.
    handle = tower.blocks[tower.depth - 1].register_forward_hook(begin, prepend=True)
    try:
        inputs = encode(tiny.vlm, batch).inputs
    finally:
        handle.remove()
    route = []
    for row, slot in inputs.valid.nonzero().tolist():
        (moved,) = torch.autograd.grad(inputs.features[row, slot].square().sum(), states[0], retain_graph=True)
        moved = moved if moved.dim() == 3 else moved[None]
        route.append((moved[:, tower.prefix :] != 0).any(-1).flatten())
    found = torch.zeros(len(route[0]), *inputs.valid.shape, dtype=torch.bool)
    found[:, inputs.valid] = torch.stack(route, 1)
    return found


@pytest.fixture(scope="module")
def routes():
    """`patches_of`, by family and samples."""
    made = {}

    def get(name, samples):
        if (name, id(samples)) not in made:
            tiny = tiny_family(name)
            with torch.enable_grad():
                made[name, id(samples)] = patches_of(tiny, tiny.batch(samples))
        return made[name, id(samples)]

    return get


SIGNALS = ("cls_attention", "received_attention", "received_attention@0", "vision_keys", "vision_values@0")
CELLS = [
    *(pytest.param(name, signal, PICTURES, id=f"signals-{name}-{signal}") for name in FAMILIES for signal in SIGNALS),
    *(pytest.param(n, s, CLIPS, id=f"signals-{n}-{s}-video") for n in VIDEO_FAMILIES for s in SIGNALS[2:4]),
]


@pytest.mark.parametrize(("name", "signal", "samples"), CELLS)
@torch.no_grad()
def test_vision_signals_reach_the_tokens_made_of_their_patches(name, signal, samples, routes, record_property):
    tiny = tiny_family(name)
    vlm, batch, tower = tiny.vlm, tiny.batch(samples), find_family(tiny.vlm).tower()
    if signal == "cls_attention" and name not in WITH_CLS:
        with pytest.raises(PruneZooError, match=r"no CLS token.*'received_attention'") as refusal:
            encode(vlm, batch, (signal,))
        record_property("outcome", f"refused: {refusal.value}")
        return
    kind, _, block = signal.partition("@")
    attention = tower.attention(int(block) if block else tower.depth - 1).module
    with watching(vlm, "vision_config") as seen, recording(attention) as made:
        encode(vlm, batch)
    if kind.startswith("vision"):
        values = made[kind][:, tower.prefix :].flatten(0, 1)
    else:
        maps = [weights.mean(1) for weights in seen[attention]]  # (R, S, S) each
        rows = [weights[:, 0] if kind == "cls_attention" else weights.mean(1) for weights in maps]
        values = torch.cat([row[:, tower.prefix :].flatten() for row in rows])
    encoded = encode(vlm, batch, (signal,))
    got, valid, route = encoded.inputs.signal(signal), encoded.inputs.valid, routes(name, samples)
    assert len(route) == len(values) and got.shape[:2] == valid.shape and route[:, valid].any(0).all()
    for row, slot in valid.nonzero().tolist():
        own = values[route[:, row, slot]]
        if name == "llava_onevision" and len(own) > 1:  # grids made smaller bilinearly
            assert (got[row, slot] >= own.amin(0) - 1e-6).all() and (got[row, slot] <= own.amax(0) + 1e-6).all()
        else:
            torch.testing.assert_close(got[row, slot], own.mean(0), rtol=1e-4, atol=1e-6)
    assert got[valid].float().std() > 0
    record_property("outcome", "yes")


def test_images_and_clips_of_one_batch_do_not_mix():
    """The tower makes two passes: each gives the signals of its own."""
    tiny = tiny_family("qwen2_5_vl")
    both, alone = [Sample(((48, 40),), 4, (4,))], [Sample(((48, 40),), 4)]
    mixed = encode(tiny.vlm, tiny.batch(both), ("received_attention",)).inputs
    single = encode(tiny.vlm, tiny.batch(alone), ("received_attention",)).inputs
    length = single.valid.shape[1]
    torch.testing.assert_close(mixed.signal("received_attention")[0, :length], single.signal("received_attention")[0])
    assert mixed.signal("received_attention").shape == mixed.valid.shape and len(mixed.valid) == 2


DECODER = ("last_attention@0", "prompt_attention@1", "last_attention@2", "self_attention@1", "hidden_states@2")


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_decoder_signals_equal_what_the_model_itself_attends_to(name):
    """Whatever its rotary embedding, masks in both directions, sliding windows; images of several sizes, padding."""
    tiny = tiny_family(name)
    vlm, batch = tiny.vlm, tiny.batch(PICTURES)
    encoded, layers, states = encode(vlm, batch, DECODER), find_family(vlm).decoder().layers, []
    # The model's own output_hidden_states is without what deepstack adds.
    handle = layers[2].register_forward_pre_hook(lambda _module, args: states.append(args[0]))
    with watching(vlm, "text_config") as seen:
        vlm(**batch)
    handle.remove()
    for row, (sample, slots, valid) in enumerate(
        zip(encoded.sample.tolist(), encoded.slots, encoded.inputs.valid, strict=True)
    ):
        ids, own = batch["input_ids"][sample], slots[valid]
        words = encoded.mask[sample] & (ids != IMAGE)
        behind = words & (torch.arange(len(ids)) > own.max())
        assert behind.sum() > 1
        for signal in DECODER:
            kind, _, layer = signal.partition("@")
            got = encoded.inputs.signal(signal)[row, valid]
            if kind == "hidden_states":
                torch.testing.assert_close(got, states[0][sample, own], rtol=1e-4, atol=1e-5)
                continue
            weights = seen[layers[int(layer)].self_attn][0][sample].mean(0)  # (L, L)
            if kind == "self_attention":
                among = weights[own][:, own]
                torch.testing.assert_close(got, among.sum(0) / (among > 0).sum(0), rtol=1e-4, atol=1e-6)
                continue
            rows = weights[behind] if kind == "prompt_attention" else weights[words][-1:]
            torch.testing.assert_close(got, rows[:, own].mean(0), rtol=1e-4, atol=1e-6)
