"""What the input stage must equal: the bare model, whose tower and language model do not look at what is gone.

Nothing gets shorter: each attention of the tower is computed anew with a dense mask. Which patches a token is made of
is worked out here from sizes, by other code than that under test.
"""

from contextlib import contextmanager
from itertools import cycle

import torch
from families import ALL, FAMILIES, IMAGE, LARGE, VIDEO, WIDE, Sample
from families.base import SIDE
from prompt_oracle import CLOSE

from prunezoo import build_pruner, encode
from prunezoo.core.plan import gather_rows
from prunezoo.host.stages.cut import Timer
from prunezoo.host.stages.input import choose_by_pixels

JOINED = {
    "internvl": 2,
    "idefics3": 2,
    "smolvlm": 2,
    "gemma3": 2,
    "aya_vision": 2,
    "cohere2_vision": 2,
}  # patches along a token


def tower_of(vlm):
    places = [(part, name) for part in (vlm.model, vlm) for name in ("visual", "vision_tower", "vision_model")]
    return next(getattr(part, name) for part, name in places if hasattr(part, name))


def is_packed(vlm):
    return hasattr(tower_of(vlm), "blocks")


def choose(vlm, batch, keep, pruner=None):
    """The batch encoded by the stage, at full length, and what a pruner, that scatters its choice, leaves."""
    pruner = pruner or build_pruner("random_input", seed=3).eval()
    return choose_by_pixels(vlm, encode(vlm, batch, run_tower=False), pruner, keep, (), True, Timer(vlm.device))


def name_of(tiny):
    return next(name for name, own in ALL.items() if own is tiny)


def window_order(vlm, grids):
    """The order in which Qwen2.5-VL's tower has the tokens, by the model's own code."""
    visual = tower_of(vlm)
    if hasattr(visual, "get_window_index"):
        return torch.as_tensor(visual.get_window_index(grids)[0])
    from transformers.vision_utils import get_vision_window_index

    return get_vision_window_index(grids, visual.spatial_merge_size, visual.window_size, visual.patch_size)[0]


def of_grid(tiny, values, size, margin, side=4):
    """LLaVA-NeXT's pictures: the thumbnail, then crops; a token is a place of the unpadded grid, or ends its row."""
    rows, columns = tiny.grid(size)
    high, wide = tiny.tiles(size)
    grid = torch.full((high * side, wide * side), margin, dtype=values.dtype)
    top, left = (high * side - rows) // 2, (wide * side - columns) // 2
    grid[top : top + rows, left : left + columns] = values[side**2 :].view(rows, columns + 1)[:, :-1]
    crops = grid.view(high, side, wide, side).transpose(1, 2).reshape(-1, side**2)
    return torch.cat([values[None, : side**2], crops])


def alive_by_run(tiny, batch, dropped, samples):
    """Of each run of the tower, which patches stay: ``(patches,)`` bool in its own order, or ``(R, N)``."""
    return by_run(tiny, batch, ~dropped, samples, True)


def by_run(tiny, batch, columns, samples, margin):
    """What ``columns (B, L)`` of the prompt say of each run's patches, and ``margin`` of those of no column."""
    vlm, name, runs = tiny.vlm, name_of(tiny), []
    for token, pixels, grids in ((IMAGE, "pixel_values", "image"), (VIDEO, "pixel_values_videos", "video")):
        if pixels not in batch:
            continue
        kept = columns[batch["input_ids"] == token]
        if is_packed(vlm):
            if name in ("qwen2_5_vl", "qwen2_5_omni_thinker"):
                kept = kept[window_order(vlm, batch[f"{grids}_grid_thw"])]
            runs.append(kept.repeat_interleave(4))
        elif name in ("llava_next", "llava_onevision", "llava_next_video"):
            images = [(size, len(own.images) > 1) for own in samples for size in own.images]
            alone = [name == "llava_onevision" and several for _, several in images]
            sizes = [len(tiny.image_ids(size, several)) for size, several in images]
            parts = zip(kept.split(sizes), images, alone, strict=True)
            runs.append(
                torch.cat(
                    [own[None, :16] if single else of_grid(tiny, own, size, margin) for own, (size, _), single in parts]
                )
            )
        else:
            factor = JOINED.get(name, 1)
            side = SIDE // vlm.config.vision_config.patch_size if factor == 1 else 6
            tiles = kept.view(-1, side // factor, side // factor)
            runs.append(tiles.repeat_interleave(factor, 1).repeat_interleave(factor, 2).flatten(1))
    return runs


def rotate(x):
    one, two = x.chunk(2, -1)
    return torch.cat([-two, one], -1)


@contextmanager
def blind_tower(vlm, runs, samples=1, watch=None):
    """Within the block no patch of the tower attends to one that is gone, but to itself.

    Args:
        vlm: The model.
        runs: From :func:`alive_by_run`; over again where the tower runs more often.
        samples: How many have the pictures of a run, as many each: older transformers give them to each beam of theirs.
        watch: Is given the number of the run, that of the block, what each patch has received in it, as the mean over
            heads and over the rows that are not gone, and what is alive; says what is alive behind it. Of prompts
            without beams.
    """
    tower = tower_of(vlm)
    coming, state = cycle(enumerate(runs)), {}

    def begin(_module, _args, _kwargs):
        state["run"], state["alive"] = next(coming)
        state["block"] = 0

    def tell(received, alive):
        if watch is not None:
            state["alive"] = watch(state["run"], state["block"], received, alive)
        state["block"] += 1

    def of_beams(alive, count):
        return (
            alive
            if len(alive) == count
            else alive.unflatten(0, (samples, -1)).repeat_interleave(count // len(alive), 0).flatten(0, 1)
        )

    def packed(module, args, kwargs, _output):
        hidden, seams = args[0], kwargs["cu_seqlens"]
        count = len(hidden)
        alive = of_beams(state["alive"], count)
        if hasattr(module, "qkv"):
            query, key, value = module.qkv(hidden).view(count, 3, module.num_heads, -1).unbind(1)
        else:
            query, key, value = (
                part(hidden).view(count, module.num_heads, -1) for part in (module.q, module.k, module.v)
            )
        if hasattr(module, "q_norm"):
            query, key = module.q_norm(query), module.k_norm(key)
        cos, sin = (part.float()[:, None] for part in kwargs["position_embeddings"])
        query, key = (part.float() * cos + rotate(part.float()) * sin for part in (query, key))  # as the model does
        query, key = query.to(value.dtype), key.to(value.dtype)
        segment = torch.bucketize(torch.arange(count), seams[1:].long(), right=True)
        seen = (segment[:, None] == segment[None]) & (alive[None] | torch.eye(count, dtype=torch.bool))
        logits = torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1).to(value)
        rows = torch.bincount(segment[alive], minlength=len(seams))[segment]
        tell(weights[:, alive].sum((0, 1)) / (len(weights) * rows), alive)
        return module.proj(torch.einsum("hqk,khd->qhd", weights, value).reshape(count, -1))

    def plain(module, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        alive = of_beams(state["alive"], len(hidden))
        keys = torch.cat([alive.new_ones(len(hidden), hidden.shape[1] - alive.shape[1]), alive], 1)
        seen = keys[:, None, None] | torch.eye(hidden.shape[1], dtype=torch.bool)
        own = kwargs.get("attention_mask")
        if own is not None:
            seen = seen & (own if own.dtype == torch.bool else own == 0)
        query, key, value = (getattr(module, part)(hidden) for part in ("q_proj", "k_proj", "v_proj"))
        if hasattr(module, "q_norm"):
            query, key = module.q_norm(query), module.k_norm(key)
        query, key, value = (part.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for part in (query, key, value))
        logits = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)
        weights = logits.softmax(-1)
        prefix = keys.shape[1] - alive.shape[1]
        tell((weights * keys[:, None, :, None]).sum(2).mean(1)[:, prefix:] / keys.sum(1, keepdim=True), alive)
        made = (weights @ value).transpose(1, 2).flatten(2)
        made = (module.out_proj if hasattr(module, "out_proj") else module.projection_layer)(made)
        return (made, *output[1:]) if isinstance(output, tuple) else made

    handles = [tower.register_forward_pre_hook(begin, with_kwargs=True)]
    if is_packed(vlm):
        handles += [block.attn.register_forward_hook(packed, with_kwargs=True) for block in tower.blocks]
    else:
        blocks = tower.encoder.layers if hasattr(tower.encoder, "layers") else tower.encoder.layer
        attentions = [block.self_attn if hasattr(block, "self_attn") else block.attention for block in blocks]
        handles += [attention.register_forward_hook(plain, with_kwargs=True) for attention in attentions]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def pictures(tiny, samples):
    """Those that this family can take."""
    if tiny is not FAMILIES["llava_onevision"]:
        return samples
    fit = {LARGE: WIDE}
    return [
        Sample(tuple(fit.get(size, size) for size in own.images), own.words) if len(own.images) == 1 else own
        for own in samples
    ]


def features_equal(encoded, output, bare, want):
    """Survivors', in all levels; and that dropping changed them."""
    index, valid = output.index, output.valid
    effect = 0.0
    levels = [(whole.inputs.features, *whole.deep) for whole in (encoded, bare, want)]
    for ours, before, theirs in zip(*levels, strict=True):
        ours, before, theirs = (gather_rows(part, index)[valid] for part in (ours, before, theirs))
        torch.testing.assert_close(ours, theirs, **CLOSE)
        effect = max(effect, float((ours - before).abs().max()))
    assert effect > 0.01
