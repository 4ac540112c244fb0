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
SMALL_PICTURES = [Sample(((24, 24), (24, 48)), 5), Sample((), 3)]
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


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_maps_cls_and_heads_reach_the_tokens_made_of_their_patches(name, routes):
    """In both directions of a map; nothing passes between pictures, or between windows."""
    tiny, samples = tiny_family(name), SMALL_PICTURES if name == "llava_onevision" else PICTURES
    vlm, batch, tower = tiny.vlm, tiny.batch(samples), find_family(tiny.vlm).tower()
    cls = ("cls_head_attention", "cls_value") if name in WITH_CLS else ()
    plain = ("vision_outputs", "vision_states", *cls)
    needs = tuple(f"{kind}@1" for kind in ("vision_attention", "vision_head_attention", *plain))
    encoded, attention = encode(vlm, batch, needs).inputs, tower.attention(1).module
    states = []
    handle = tower.blocks[1].register_forward_hook(lambda _module, _args, output: states.append(output))
    with watching(vlm, "vision_config") as seen, recording(attention) as made:
        encode(vlm, batch)
    handle.remove()
    pictures = [picture.movedim(0, -1) for weights in seen[attention] for picture in weights]  # (S, S, H) each
    sizes = [len(picture) - tower.prefix for picture in pictures]
    patches = torch.zeros(sum(sizes), sum(sizes), pictures[0].shape[2])
    for picture, end, size in zip(pictures, torch.tensor(sizes).cumsum(0).tolist(), sizes, strict=True):
        patches[end - size : end, end - size : end] = picture[tower.prefix :, tower.prefix :]
    values = list(made["vision_values"])
    wanted = {"vision_states": states[0] if states[0].dim() == 2 else states[0][:, tower.prefix :].flatten(0, 1)}
    if len(values) == len(pictures):  # each in a row of its own
        outputs = [torch.einsum("qkh,khd->qhd", *pair) for pair in zip(pictures, values, strict=True)]
        wanted["vision_outputs"] = torch.cat([own[tower.prefix :] for own in outputs])
        wanted["cls_head_attention"] = torch.cat([own[0, tower.prefix :] for own in pictures])
        wanted["cls_value"] = torch.cat([own[:1].expand(len(own) - tower.prefix, -1, -1) for own in values])
    else:
        outputs = torch.einsum("qkh,khd->qhd", patches, made["vision_values"][0])
        wanted["vision_outputs"] = outputs
    route, valid = routes(name, samples), encoded.valid
    weight = route.float() / route.sum(0).clamp_min(1)  # (P, R, N)
    close = {"rtol": 1e-4, "atol": 1e-6}
    for row in range(len(valid)):
        own = weight[:, row, valid[row]]
        expected = torch.einsum("pm,pqh,qn->mnh", own, patches, own)
        got = encoded.signal("vision_head_attention@1")[row][valid[row]][:, valid[row]]
        torch.testing.assert_close(got, expected, **close)
        got = encoded.signal("vision_attention@1")[row][valid[row]][:, valid[row]]
        torch.testing.assert_close(got, expected.mean(-1), **close)
        for kind in plain:
            got = encoded.signal(f"{kind}@1")[row, valid[row]]
            torch.testing.assert_close(got, torch.einsum("pm,p...->m...", own, wanted[kind]), **close)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_pixels_are_those_of_the_place_that_a_token_is_from(name):
    """Every pixel of a picture says where it is: the squares of the tokens lie as their cells do, without gaps."""
    tiny, samples = tiny_family(name), SMALL_PICTURES if name == "llava_onevision" else PICTURES
    batch = tiny.batch(samples)
    conv = find_family(tiny.vlm).tower().patch_embedding
    squares = isinstance(conv, torch.nn.Conv3d)
    given = batch["pixel_values"]
    if squares:  # patches, those of a token one after the other
        merge = tiny.vlm.config.vision_config.spatial_merge_size
        given = given.unflatten(1, (conv.in_channels, *conv.kernel_size)).transpose(1, 2).flatten(1, 2)
        tokens = given.unflatten(0, (-1, merge, merge)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    inputs = encode(tiny.vlm, batch, ("pixels",)).inputs
    got = inputs.signal("pixels")
    size, seen, start = got.shape[-1], given.flatten(0, -4), 0
    for row in range(len(got)):
        count = int(inputs.valid[row].sum())
        if squares:
            assert torch.equal(got[row, :count], tokens[start : start + count])
            start += count
            continue
        for square, (tile, line, column) in zip(got[row, :count], inputs.cells[row, :count].tolist(), strict=True):
            top, left = line * size, column * size
            if name.startswith(("llava_next", "llava_onevision")) and tile == 1:  # a grid of crops, cut to the picture
                found = [picture.unfold(1, size, size).unfold(2, size, size) for picture in seen]
                assert any((own.movedim(0, 2) == square).flatten(2).all(2).any() for own in found)
                continue
            crops = seen[:, :, top : top + size, left : left + size]
            assert (crops == square).flatten(1).all(1).any(), (row, tile, line, column)
    assert got.std() > 0


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


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_changes_and_maps_equal_what_the_model_itself_does(name):
    """Whatever stands around attention and MLP: norms on one side or both, deepstack, windows, masks."""
    tiny = tiny_family(name)
    vlm, batch, made = tiny.vlm, tiny.batch(PICTURES), {}
    block, kinds = find_family(vlm).decoder().layers[1], ("attention_change", "mlp_change", "mlp_activations")
    needs = tuple(f"{kind}@1" for kind in (*kinds, "layer_head_attention", "word_attention"))
    encoded = encode(vlm, batch, needs)

    def enter(key):
        return lambda _, args, kwargs: made.update({key: args[0] if args else kwargs["hidden_states"]})

    def leave(key):
        return lambda _, args, output: made.update({key: output[0] if isinstance(output, tuple) else output})

    parts = (("attention", block.self_attn), ("mlp", block.mlp), ("neurons", block.mlp.down_proj))
    handles = [part.register_forward_pre_hook(enter(f"{key} in"), with_kwargs=True) for key, part in parts]
    handles += [part.register_forward_hook(leave(f"{key} out")) for key, part in parts]
    with watching(vlm, "text_config") as seen:
        vlm(**batch)
    for handle in handles:
        handle.remove()
    inputs = encoded.inputs
    for row, (sample, slots) in enumerate(zip(encoded.sample.tolist(), encoded.slots, strict=True)):
        valid = inputs.valid[row]
        at = {key: value[sample, slots[valid]] for key, value in made.items()}
        close = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(inputs.signal("mlp_activations@1")[row, valid], at["neurons in"], **close)
        for half in ("attention", "mlp"):
            before, after = at[f"{half} in"], at[f"{half} out"]
            ratio = after.norm(dim=-1) / before.norm(dim=-1)
            expected = torch.stack([ratio, torch.cosine_similarity(before, after, dim=-1)], -1)
            torch.testing.assert_close(inputs.signal(f"{half}_change@1")[row, valid], expected, **close)
        weights, own = seen[block.self_attn][0][sample].movedim(0, -1), slots[valid]
        got = inputs.signal("layer_head_attention@1")[row][valid][:, valid]
        torch.testing.assert_close(got, weights[own][:, own], **close)
        words = encoded.mask[sample] & (batch["input_ids"][sample] != IMAGE)
        got = inputs.signal("word_attention@1")[row][valid][:, inputs.text_valid[row]]
        torch.testing.assert_close(got, weights[words][:, own].mean(-1).T, **close)
