"""The input stage: what the matrix of families does not show. Other stages behind it, signals, pixels, refusals."""

from dataclasses import replace

import pytest
import torch
from families import CLIPS, IMAGE, LARGE, MIXED, ONE_EACH, SMALL, Sample, here, tiny_family
from families.shuffled import Idefics3
from input_oracle import alive_by_run, blind_tower, choose
from prompt_oracle import CLOSE, blind, drops, write
from tower_oracle import by_hand, slots_of, tome_by_hand

from prunezoo import Pruner, PruneZooError, attach, build_pruner, encode
from prunezoo.core.plan import gather_rows
from prunezoo.host import encode_needs, run_gated, run_pruned
from prunezoo.host.families import find_family
from prunezoo.host.run import reduce_early
from prunezoo.host.stages.input import see_pixels


def random(**options):
    return build_pruner("random_input", **options).eval()


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
