"""The input stage: what the matrix of families does not show. Other stages behind it, signals, pixels, refusals."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from families import CLIPS, FAMILIES, IMAGE, LARGE, MIXED, NEWER, ONE_EACH, SMALL, TALL, WIDE, Sample, here, tiny_family
from families.shuffled import Idefics3
from input_oracle import alive_by_run, blind_tower, choose
from prompt_oracle import CLOSE, blind, drops, write
from torch.nn.functional import pad
from tower_oracle import by_hand, slots_of, tome_by_hand

from prunezoo import Pruner, PruneZooError, attach, build_pruner, encode
from prunezoo.core.plan import gather_rows
from prunezoo.core.signals import follow_tokens
from prunezoo.host import encode_needs, run_gated, run_pruned
from prunezoo.host.families import find_family
from prunezoo.host.run import reduce_early
from prunezoo.host.signals.vision import watch_tower
from prunezoo.host.stages.input import see_pixels


def random(**options):
    return build_pruner("random_input", **options).eval()


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
    early = reduce_early(vlm, laid, [(random(seed=3), keep)], "original", needs=needs)
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


# Other stages behind it


@pytest.mark.parametrize("name", ["llava", "llava_siglip", "paligemma"])
@torch.no_grad()
def test_input_then_vision_in_one_pass(name):
    """ToMe behind a cut at random, against a tower by hand that begins with what the cut left."""
    tiny = here(name)
    vlm, batch, tower = tiny.vlm, tiny.batch(ONE_EACH), find_family(tiny.vlm).tower()
    keeps, left = torch.tensor([9, 12, 16, 10]), 5
    bare, (_, output) = encode(vlm, batch), choose(vlm, batch, keeps)
    features, dropped = bare.inputs.features.clone(), batch["input_ids"] == IMAGE
    merging = build_pruner("tome").eval()
    for row, pixels in enumerate(batch["pixel_values"]):
        kept = output.index[row, : output.counts[row]]
        steps = merging.schedule(torch.tensor([left]), torch.tensor([len(kept)]), tower.depth)
        decide = tome_by_hand([int(step) for step in steps])
        members, states = by_hand(vlm.model.vision_tower, tower, pixels, decide, kept=kept.tolist())
        slots = slots_of(members, 16)
        states = vlm.model.vision_tower.post_layernorm(states) if name == "paligemma" else states
        features[row, slots] = vlm.model.multi_modal_projector(states[None])[0]
        dropped[bare.sample[row], bare.slots[row, slots]] = False
    expected = replace(bare, inputs=replace(bare.inputs, features=features))
    with blind(vlm, dropped):
        logits = vlm(**expected.model_inputs(vlm)).logits[:, -1]
    lengths: list[int] = []
    watch = lambda _module, args, _output: lengths.append(args[0].shape[1])  # noqa: E731
    handles = [block.mlp.register_forward_hook(watch) for block in tower.blocks]
    with attach(vlm, [random(seed=3), merging], [keeps, left]) as run:
        torch.testing.assert_close(vlm(**batch).logits[:, -1], logits, rtol=0, atol=5e-5)
    for handle in handles:
        handle.remove()
    assert [(s.stage, s.before[0], s.after[0]) for s in run.stats.stages] == [("input", 16, 9), ("vision", 9, 5)]
    assert len(lengths) == len(tower.blocks) and lengths[0] < 16 + tower.prefix  # one pass, and a shorter one


@pytest.mark.parametrize("name", ["llava_next", "qwen2_5_vl", "internvl"])
@torch.no_grad()
def test_input_then_prompt_then_layer(name):
    tiny = here(name)
    vlm, samples = tiny.vlm, ONE_EACH
    batch, keeps = tiny.batch(samples), [0.75, 0.5]
    bare, (_, first) = encode(vlm, batch), choose(vlm, batch, keeps[0])
    runs = alive_by_run(tiny, batch, drops(bare, first), samples)
    early = reduce_early(vlm, encode(vlm, batch, run_tower=False), [(random(seed=3), keeps[0])], "original")
    second = build_pruner("random", seed=1).eval()(early.encoded.inputs, keeps[1])
    index = gather_rows(first.index, second.index)
    dropped = drops(bare, replace(second, index=index.masked_fill(~second.valid, 0), features=None))
    with blind_tower(vlm, runs), blind(vlm, dropped):
        expected = write(vlm, batch)
    with attach(vlm, [random(seed=3), "random?seed=1"], keeps) as run:
        again = write(vlm, batch)
    assert torch.equal(again.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(again.logits), torch.stack(expected.logits), **CLOSE)
    assert [stage.stage for stage in run.stats.stages] == ["input", "prompt"]
    with attach(vlm, [random(seed=3), "random?seed=1", "withdraw?layer=2"], [*keeps, 0.5]) as run:
        assert write(vlm, batch).sequences.shape == expected.sequences.shape
    assert [stage.stage for stage in run.stats.stages] == ["input", "prompt", "layer"]


@torch.no_grad()
def test_one_forward_is_the_attached_call():
    """From a batch that was encoded with the tower, as measuring does, and from one that was not; with signals."""
    tiny = here("llava")
    vlm, batch = tiny.vlm, tiny.batch(MIXED)
    pruner = build_pruner(
        "combined", methods=("random_input", "fastervlm"), configs=({"seed": 3}, {}), shares=(2.0, 1.0)
    ).eval()
    with attach(vlm, pruner, 4) as run:
        logits = vlm(**batch).logits[:, -1]
    assert [(s.stage, s.before[0], s.after[0]) for s in run.stats.stages] == [("input", 16, 8), ("prompt", 8, 4)]
    for encoded in (encode(vlm, batch, encode_needs(pruner)), encode(vlm, batch, run_tower=False)):
        torch.testing.assert_close(run_pruned(vlm, encoded, pruner, 4).host.logits[:, -1], logits, **CLOSE)


# Pixels


@torch.no_grad()
def test_pixels_are_those_of_the_picture():
    """Of Qwen's patches and of pictures; a still one has one frame, beside clips as many as they have."""
    tiny = here("qwen2_5_vl")
    batch = tiny.batch([Sample((SMALL,), 3)])
    encoded = encode(tiny.vlm, batch, run_tower=False)
    inputs = see_pixels(find_family(tiny.vlm), {**batch}, encoded).inputs
    assert inputs.pixels == (1, 3, 8, 8) and inputs.features.dtype == torch.float32
    cells = batch["pixel_values"].view(-1, 2, 2, 3, 2, 4, 4)[:, :, :, :, 0]  # token, row, column, C, p, p
    assert torch.equal(inputs.features[0].view(-1, 3, 2, 4, 2, 4), cells.permute(0, 3, 1, 4, 2, 5))
    mixed = tiny.batch(CLIPS)
    inputs = see_pixels(find_family(tiny.vlm), mixed, encode(tiny.vlm, mixed, run_tower=False)).inputs
    assert inputs.pixels == (2, 3, 8, 8)
    frames = inputs.features.unflatten(-1, (2, -1))
    assert torch.equal(frames[0, :, 0], frames[0, :, 1]) and not torch.equal(frames[1, :, 0], frames[1, :, 1])

    tiny = here("internvl")
    batch = tiny.batch([Sample((SMALL,), 3)])
    inputs = see_pixels(find_family(tiny.vlm), batch, encode(tiny.vlm, batch, run_tower=False)).inputs
    tile = batch["pixel_values"][0].view(3, 3, 8, 3, 8).permute(1, 3, 0, 2, 4)
    assert inputs.pixels == (1, 3, 8, 8) and torch.equal(inputs.features[0].view(3, 3, 3, 8, 8), tile)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
@torch.no_grad()
def test_an_image_keeps_the_same_alone_and_beside_clips(name):
    """There its frame is repeated, as many times as clips have."""
    tiny = here(name)
    batch, alone = tiny.batch(CLIPS), tiny.batch([Sample((LARGE,), 5)])
    alone["pixel_values"] = batch["pixel_values"][: len(alone["pixel_values"])]
    for pruner in ("pixelprune", "energy", "uniform_input"):
        many, one = (choose(tiny.vlm, own, 0.5, build_pruner(pruner).eval())[1] for own in (batch, alone))
        assert one.index[0].tolist() == many.index[0, : one.counts[0]].tolist()


@torch.no_grad()
def test_pixels_are_not_rounded_with_the_model():
    """Two cells that differ by less than a half type tells apart are different, whatever the model's type."""
    tiny = tiny_family("llava")
    vlm = type(tiny)().build().bfloat16()
    batch = tiny.batch([Sample((SMALL,), 3)])
    batch["pixel_values"] = torch.ones_like(batch["pixel_values"])
    batch["pixel_values"][0, :, 12:, 12:] += 1e-4
    with attach(vlm, "pixelprune", "auto") as run:
        assert vlm(**batch).logits.isfinite().all()
    assert run.stats.after == [2]


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


# Masks of the tower's own


@torch.no_grad()
def test_what_the_tower_hides_stays_hidden():
    """Idefics3 hides the patches of padding in a tile; the mask for filler must not show them again."""
    tiny = Idefics3()
    samples = [Sample((SMALL,), 5), Sample((SMALL,), 4)]
    batch = tiny.batch(samples)
    batch["pixel_attention_mask"][0, 0, :, 16:] = 0
    bare = encode(tiny.vlm, batch)
    whole, output = choose(tiny.vlm, batch, torch.tensor([4, 6]))
    dropped = drops(bare, output)
    alive = (~dropped)[batch["input_ids"] == IMAGE].view(-1, 3, 3)
    runs = [alive.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)]
    with blind_tower(tiny.vlm, runs):
        want = encode(tiny.vlm, batch).inputs.features
    shown = {**batch, "pixel_attention_mask": torch.ones_like(batch["pixel_attention_mask"])}
    with blind_tower(tiny.vlm, runs):
        assert (encode(tiny.vlm, shown).inputs.features - want).abs().max() > 0.01
    mask = output.valid
    ours, theirs = (gather_rows(part, output.index)[mask] for part in (whole.inputs.features, want))
    torch.testing.assert_close(ours, theirs, **CLOSE)


# Refusals


class Merging(Pruner):
    name, stage = "merging", "input"

    def reduce(self, inputs, keep):
        output = build_pruner("pool").eval()(inputs, keep)
        return replace(output, features=output.features)


def test_what_is_refused():
    vlm = tiny_family("llava").vlm
    batch = tiny_family("llava").batch(ONE_EACH)
    with torch.no_grad(), attach(vlm, Merging().eval(), 4), pytest.raises(PruneZooError, match="one that only drops"):
        vlm(**batch)
    wanting = type("Wanting", (Merging,), {"needs": ("cls_attention",)})()
    with pytest.raises(PruneZooError, match="needs 'cls_attention', and in front of the vision tower there are no sig"):
        attach(vlm, wanting, 4)
    with pytest.raises(PruneZooError, match=r"input, vision, prompt, layer in turn: random .prompt., energy .input."):
        attach(vlm, ["random", "energy"], [4, 4])
    with pytest.raises(PruneZooError, match="gave no gates"):
        run_gated(vlm, encode(vlm, batch), random().train(), 4)
    family = tiny_family("llava")
    other = type(family)().build()
    other.model.vision_tower.config._attn_implementation_internal = "flash_attention_2"
    refusal = pytest.raises(
        PruneZooError, match=r"different numbers of patches .* has 'flash_attention_2': keep a fixed"
    )
    with torch.no_grad(), attach(other, "random_input", torch.tensor([3, 4, 5, 6])), refusal:
        other(**batch)


@torch.no_grad()
def test_a_batch_that_cannot_be_encoded_again():
    tiny = tiny_family("llava")
    encoded = replace(encode(tiny.vlm, tiny.batch(ONE_EACH)), source=None)
    with pytest.raises(PruneZooError, match="runs the tower anew: give it a batch as `encode` returned it"):
        run_pruned(tiny.vlm, encoded, random(), 4)


@torch.no_grad()
def test_prompts_without_images_pass_by():
    tiny = here("qwen2_vl")
    batch = tiny.batch([Sample((), 4), Sample((), 6)])
    bare = tiny.vlm(**batch).logits
    with attach(tiny.vlm, "pixelprune", "auto") as run:
        assert torch.equal(tiny.vlm(**batch).logits, bare)
    assert run.stats.before == []
