"""Signals behind the input stage, and the tower given less by its own keywords: the stage's second oracle."""

from contextlib import contextmanager

import pytest
import torch
from families import FAMILIES, IMAGE, LARGE, MIXED, NEWER, SMALL, TALL, WIDE, Sample, here, tiny_family
from input_oracle import alive_by_run, choose
from prompt_oracle import CLOSE, blind, drops
from torch.nn.functional import pad

from prunezoo import build_pruner, encode
from prunezoo.core.plan import gather_rows
from prunezoo.core.signals import follow_tokens
from prunezoo.host.families import find_family
from prunezoo.host.run import reduce_early
from prunezoo.host.signals.vision import watch_tower

# Signals of what is left

SIGLIP = ("received_attention", "vision_keys@0", "vision_attention", "vision_head_attention@0", "vision_states")
CLS = ("cls_attention", *SIGLIP)
SIGNALS = {
    "llava": CLS, "llava_next": CLS, "internvl": CLS, "llava_siglip": SIGLIP, "gemma3": SIGLIP, "idefics3": SIGLIP,
}  # fmt: skip
LATE = ("prompt_attention", "last_attention@1", "hidden_states@1")


def behind_a_cut(vlm, batch, keep, needs):
    """The choice, and what a pruner behind it is given."""
    laid = encode(vlm, batch, run_tower=False)
    early = reduce_early(vlm, laid, [(build_pruner("random_input", seed=3).eval(), keep)], "original", needs=needs)
    return early.outputs[0], early.encoded.inputs


@contextmanager
def masked_tower(vlm, runs):
    """The tower hides what is gone by its own masks, which taps read."""
    (alive,) = runs
    tower = find_family(vlm).tower()
    gone = pad(~alive, (tower.prefix, 0))[:, None, None]

    def hide(_module, args, kwargs):
        low = torch.zeros(gone.shape).masked_fill(gone, torch.finfo(torch.float32).min)
        return args, {**kwargs, "attention_mask": low}

    modules = [tower.attention(number).module for number in range(len(tower.blocks))]
    handles = [module.register_forward_pre_hook(hide, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def follow(kind, found, want, output):
    """``found`` behind a cut are ``want``, of all tokens, at what it left."""
    want = follow_tokens(kind, want, output.index)
    for row, count in enumerate(output.counts):
        maps = kind.partition("@")[0] in ("vision_attention", "vision_head_attention")
        there = (slice(count), slice(count)) if maps else slice(count)
        torch.testing.assert_close(found[row][there], want[row][there], **CLOSE, msg=lambda m: f"{kind}: {m}")


@pytest.mark.parametrize("name", SIGNALS)
@torch.no_grad()
def test_signals_behind_it_are_those_of_the_masked_model(name):
    """A tap that was put on before the stage's hooks would see other masks; decoder signals are of a shorter prompt."""
    tiny = here(name)
    vlm, batch, keep = tiny.vlm, tiny.batch(MIXED), torch.tensor([3, 2, 5, 4])
    wanted = LATE[1:] if name == "idefics3" else LATE  # whose words between tiles are behind what is left of it
    output, found = behind_a_cut(vlm, batch, keep, (*SIGNALS[name], *wanted, "word_match"))
    dropped = drops(encode(vlm, batch), output)
    runs = alive_by_run(tiny, batch, dropped, MIXED)
    with masked_tower(vlm, runs):
        whole = encode(vlm, batch, SIGNALS[name]).inputs
    with masked_tower(vlm, runs), blind(vlm, dropped):
        late = encode(vlm, batch, wanted).inputs
    for kind in SIGNALS[name]:
        follow(kind, found.signals[kind], whole.signals[kind], output)
    for kind in wanted:
        follow(kind, found.signals[kind], late.signals[kind], output)
    tokens, words = found.features[0, : output.counts[0]], found.text[0]
    behind = found.signals["word_match"][0] > 0
    likely = (tokens @ words.T).masked_fill(~behind, -torch.inf).softmax(-1)
    torch.testing.assert_close(found.signals["word_match"][0], likely.mean(0), **CLOSE)


# Transformers' own way


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"])
@torch.no_grad()
def test_the_tower_given_less_by_its_own_keywords(name):
    """Newer towers take seams, positions and windows as keywords: patches can be left out before they are embedded.

    So taps see a shorter tower that nobody changed; what they say of a token is the mean of its four patches.
    """
    vision = pytest.importorskip("transformers.vision_utils")
    if name not in FAMILIES and name not in NEWER:
        pytest.skip(f"this release of transformers has no {name}")
    tiny = tiny_family(name)
    vlm, batch = tiny.vlm, tiny.batch([Sample((LARGE,), 5), Sample((WIDE, SMALL), 4), Sample((TALL,), 3)])
    visual, grid, needs = vlm.model.visual, batch["image_grid_thw"], ("received_attention@0", "vision_states")
    encoded, output = choose(vlm, batch, 0.4)
    kept = ~drops(encode(vlm, batch), output)[batch["input_ids"] == IMAGE]
    rows, merge, order = kept.repeat_interleave(4), visual.spatial_merge_size, torch.arange(int(kept.sum()))

    def shorter(seams, alive):
        before = torch.cat([torch.zeros(1, dtype=torch.long), alive.cumsum(0)])
        return before[seams.long()].unique_consecutive().to(seams.dtype)

    given = {
        "position_ids": vision.get_vision_position_ids(grid, merge)[rows],
        "cu_seqlens": shorter(vision.get_vision_cu_seqlens(grid), rows),
    }
    if name == "qwen2_5_vl":
        index, seams = vision.get_vision_window_index(grid, merge, visual.window_size, visual.patch_size)
        order = given["window_index"] = (kept.cumsum(0) - 1)[index[kept[index]]]
        given["cu_window_seqlens"] = shorter(seams, kept[index].repeat_interleave(4))
        assert len(given["cu_window_seqlens"]) < len(seams)  # windows of which nothing is left
    elif name != "qwen2_vl":
        places, weights = vision.get_vision_interpolation_indices_and_weights(
            grid, visual.num_grid_per_side, visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners, spatial_merge_size=merge,
        )  # fmt: skip
        given |= {"interp_indices": places[rows], "interp_weights": weights[rows]}
    with watch_tower(find_family(vlm).tower, (*needs, "vision_attention")) as seen:
        out = visual(batch["pixel_values"][rows], grid_thw=grid, **given)
    levels = [out.pooler_output, *(getattr(out, "deepstack_features", None) or ())]
    for ours, theirs in zip((encoded.inputs.features, *encoded.deep), levels, strict=True):
        assert torch.equal(gather_rows(ours, output.index)[output.valid], theirs)
    _, found = behind_a_cut(vlm, batch, 0.4, (*needs, "vision_attention"))
    for need in needs:
        theirs = seen[need][0].unflatten(0, (-1, 4)).mean(1)[order.argsort()]
        torch.testing.assert_close(found.signals[need][output.valid], theirs, **CLOSE)
    starts = torch.tensor(output.counts).cumsum(0) - torch.tensor(output.counts)
    for row, whole in enumerate(seen["vision_attention"]):  # of an image each, as the last block has no windows
        count, first = output.counts[row], starts[row]
        own = whole[0].unflatten(1, (-1, 4)).mean(2).unflatten(0, (-1, 4)).mean(1)
        place = (order[first : first + count] - first).argsort()
        theirs = own[place][:, place]
        torch.testing.assert_close(found.signals["vision_attention"][row, :count, :count], theirs, **CLOSE)
