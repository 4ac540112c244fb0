"""What the newer families need of the host, and what of them is refused: each would have failed late, or silently."""

from dataclasses import replace

import pytest
import torch
from families import LARGE, MIXED, NEWER, ONE_EACH, SMALL, TALL, Sample, tiny_family
from families.crops import Llama4
from families.gemma4 import Gemma4Shared
from layer_oracle import Watch, masked
from layer_runs import Scattered, last_logits
from prompt_oracle import CLOSE, write
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from prunezoo import PruneZooError, attach, build_pruner, encode, pruned_forward
from prunezoo.host.families import FAMILIES, OLDER, UNSUITABLE, find_family
from prunezoo.host.families.base import TAKES_FEATURES
from prunezoo.host.parts.decoder import Decoder, take_columns
from prunezoo.host.stages.layer import argument_names


def newer(name):
    """A newer family; skipped where the release at hand has it not."""
    if name not in NEWER:
        pytest.skip(f"this release of transformers has no {name} that can be pruned")
    return tiny_family(name)


# Caches


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2_vl", "gemma4_shared"])
@torch.no_grad()
def test_bytes_saved_are_those_of_the_layers_that_have_keys(name):
    """A layer with a state, or one that attends to the keys of another, has none to save."""
    tiny = newer(name)
    batch = tiny.batch([Sample((LARGE,), 5), Sample((SMALL,), 3)])

    def held():
        layers = tiny.vlm(**batch, use_cache=True).past_key_values.layers
        keyed = [layer for layer in layers if isinstance(getattr(layer, "keys", None), torch.Tensor)]
        assert 0 < len(keyed) < len(layers)
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in keyed)

    for pruner in ("random", Scattered(2)):
        with attach(tiny.vlm, pruner, keep=0.5) as run:
            shorter = held()
        assert run.stats.kv_bytes_saved == held() - shorter > 0


def test_the_layers_that_have_keys_and_those_that_lend_them():
    shared = Decoder(newer("gemma4_shared").vlm)
    assert shared.keyed == [0, 1, 2, 3] and [shared.source(layer) for layer in range(6)] == [0, 1, 2, 3, 2, 3]
    assert shared.last_to_cut == 2
    hybrid = Decoder(newer("qwen3_5").vlm)
    assert hybrid.keyed == [1, 3] and hybrid.last_to_cut == 3
    assert find_family(newer("qwen3_5").vlm).first_layer == 2  # the first cache tells the length of the conversation


# What layers are handed


def test_arguments_by_position_have_the_names_of_the_layer():
    """Gemma 4 hands over the inputs of each layer by position; only the hidden states were taken on."""
    layer = Decoder(newer("gemma4").vlm).layers[1]
    assert argument_names(type(layer))[:2] == ("hidden_states", "per_layer_input")


def test_columns_of_a_complex_rotary_embedding():
    rotary = torch.polar(torch.ones(1, 5, 3), torch.randn(1, 5, 3))
    columns = torch.tensor([[0, 2], [3, 4]])
    torch.testing.assert_close(take_columns(rotary, columns), rotary[0][columns])


@pytest.mark.parametrize("window", [8, 20, 40])
@torch.no_grad()
def test_layers_that_borrow_keys_beyond_the_window(window):
    """The keys that are lent stop at the window, and a later turn goes on there."""
    newer("gemma4_shared")
    tiny = Gemma4Shared()
    tiny.window = window
    vlm, batch, pruner = tiny.vlm, tiny.batch(ONE_EACH), Scattered(1, 2)
    words = torch.randint(30, 60, (4, 3), generator=torch.Generator().manual_seed(0))

    def talk():
        first = write(vlm, batch)
        ids = torch.cat([first.sequences, words], 1)
        mask = torch.cat([batch["attention_mask"], torch.ones(4, 9, dtype=torch.long)], 1)
        again = write(vlm, {"input_ids": ids, "attention_mask": mask}, past_key_values=first.past_key_values)
        return torch.stack([*first.logits, *again.logits])

    encoded = encode(vlm, batch)
    with Watch(pruner) as watch, attach(vlm, pruner, keep=0.5):
        logits, written = vlm(**batch).logits[:, -1], talk()
    watch.calls = watch.calls[:2]
    with masked(vlm, watch.gone(encoded)[0]):
        torch.testing.assert_close(logits, last_logits(vlm(**batch).logits, encoded), **CLOSE)
        torch.testing.assert_close(written, talk(), **CLOSE)


@torch.no_grad()
def test_logits_of_columns_that_the_layer_stage_took_are_refused():
    """Layers that borrow keys are given the last columns only, which must be there."""
    tiny = newer("gemma4_shared")
    batch = tiny.batch([Sample((SMALL,), 3), Sample((SMALL,), 5)])
    for count in (9, 12):  # as many as are left are 11
        with attach(tiny.vlm, Scattered(1, 2), keep=3):
            whole = tiny.vlm(**batch).logits
            torch.testing.assert_close(tiny.vlm(**batch, logits_to_keep=2).logits, whole[:, -2:], **CLOSE)
            with pytest.raises(PruneZooError, match=rf"logits of the last {count} columns .* words behind the images"):
                tiny.vlm(**batch, logits_to_keep=count)


# Refusals


def test_stages_behind_keys_that_are_lent():
    vlm = newer("gemma4_shared").vlm
    with pytest.raises(PruneZooError, match=r"front of layer 3, .* Gemma 4 attend to the keys of layer 2: .* up to 2"):
        attach(vlm, Scattered(1, 3), keep=3)


def test_positions_that_flash_attention_would_read_as_seams():
    newer("mistral3_ministral3")
    vlm = NEWER["mistral3_ministral3"].build()
    vlm.get_decoder().config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(PruneZooError, match=r"gaps in the positions of Mistral 3 as seams: use .* 'sdpa'"):
        attach(vlm, Scattered(1), keep=3)


@pytest.mark.parametrize("option", ["chunk", "floor"])
def test_llama4_counts_columns(option):
    newer("llama4")
    tiny = Llama4()
    setattr(tiny, option, 16)
    refusal = pytest.raises(PruneZooError, match=r"from 16 on: the prompt has .* use shorter")
    with torch.no_grad(), attach(tiny.vlm, "random", keep=0.5), refusal:
        tiny.vlm(**tiny.batch([Sample((LARGE,), 5)]))


@torch.no_grad()
def test_llama4_projects_what_was_merged():
    """Means pass through its projector as they are; what is no mean cannot be handed over."""
    tiny = newer("llama4")
    vlm, batch = tiny.vlm, tiny.batch([Sample((LARGE,), 5)])
    encoded = encode(vlm, batch)
    output = build_pruner("resize").eval()(encoded.inputs, 5)
    assert pruned_forward(vlm, encoded, output).logits.isfinite().all()
    doubled = replace(output, features=2 * output.features)
    with pytest.raises(PruneZooError, match=r"in front of its projector: .* only drops"):
        pruned_forward(vlm, encoded, doubled)


def test_sound_is_not_pruned_with():
    tiny = newer("qwen2_5_omni_thinker")
    batch = {**tiny.batch([Sample((SMALL,), 3)]), "feature_attention_mask": torch.ones(1, 4)}
    with pytest.raises(PruneZooError, match="without sound: leave 'feature_attention_mask' out"):
        encode(tiny.vlm, batch)


INPUTS = {
    "no sizes": ("mistral3", {"image_sizes": None}, "needs the processor's image_sizes"),
    "squares": ("fast_vlm", {"image_sizes": torch.tensor([[24, 24]])}, "its images are squares"),
    "no patch": ("molmo2", {"image_token_pooling": torch.full((39, 4), -1)}, "tokens of no patch"),
    "too few crops": ("cohere2_vision", {"pixel_values": torch.zeros(2, 3, 24, 24)}, "18 tokens, the prompt 45"),
    "no squares": ("perception_lm", {"pixel_values": torch.zeros(1, 3, 3, 24, 24)}, "no squares for 1 times 3 tiles"),
}


@pytest.mark.parametrize("case", INPUTS)
def test_inputs_that_are_refused(case):
    name, values, remedy = INPUTS[case]
    tiny = newer(name)
    with torch.no_grad(), pytest.raises(PruneZooError, match=remedy):
        encode(tiny.vlm, {**tiny.batch([Sample((LARGE,), 3)]), **values})


@pytest.mark.parametrize("name", ["glm4v", "molmo2", "kimi_k25", "minicpmv4_6"])
def test_clips_that_are_refused(name):
    batch = {**newer(name).batch([Sample((SMALL,), 3)]), "pixel_values_videos": torch.zeros(1, 4)}
    with pytest.raises(PruneZooError, match="reads no pixel_values_videos while pruning"):
        encode(newer(name).vlm, batch)


def test_a_model_that_would_be_pruned_wrongly():
    model = tiny_family("llava").build()
    model.config.model_type = "exaone4_5"
    with pytest.raises(PruneZooError, match=r"exaone4_5.* cannot be pruned: its `generate` drops the position ids"):
        find_family(model)


@pytest.mark.skipif(TAKES_FEATURES, reason="of releases before 5.19")
def test_older_releases_refuse_the_newer_families():
    tiny = tiny_family("llava")
    for kind in set(FAMILIES) - set(OLDER):
        model = tiny.build()
        model.config.model_type = kind
        with pytest.raises(PruneZooError, match=r"can be pruned with transformers 5.19 or later: upgrade it"):
            find_family(model)


# Pictures whose crops stand apart


@pytest.mark.parametrize("name", ["cohere2_vision", "aya_vision", "ovis2", "llama4", "lfm2_vl"])
@torch.no_grad()
def test_crops_between_tags_are_one_image(name):
    """Each a tile, in the order of the prompt; an image that is one crop beside one that is several."""
    tiny = newer(name)
    encoded = encode(tiny.vlm, tiny.batch(MIXED))
    assert encoded.sample.tolist() == [0, 2, 2, 3]
    for row, (size, cells) in enumerate(zip((LARGE, (24, 48), SMALL, TALL), encoded.inputs.cells, strict=True)):
        own = cells[encoded.inputs.valid[row]]
        rows, columns = tiny.rows(size)
        assert own[:, 0].unique().tolist() == list(range(rows * columns + 1))
        assert len({tuple(cell) for cell in own.tolist()}) == len(own)
        if name == "lfm2_vl":
            assert [own[own[:, 0] == tile, 1].max() + 1 for tile in own[:, 0].unique()][:-1] == [3] * (rows * columns)
        else:
            assert len(own) == 9 * (rows * columns + 1)


# Faults of transformers that are worked round; where one is gone, the work-round may go too


DOUBLED = ("glm4v", "glm46v", "glm4v_moe", "glm_ocr", "granite4_vision")


@pytest.mark.parametrize("name", DOUBLED)
@torch.no_grad()
def test_beams_of_the_bare_model_read_the_wrong_images(name):
    """With two images in a row it deals them out A A B B, not A B A B; with a pruner attached each beam has its own."""
    tiny = newer(name)
    vlm, batch = tiny.vlm, tiny.batch([Sample((LARGE, TALL), 4)])
    options = {"max_new_tokens": 1}
    plain = write(vlm, batch, **options).logits[0][0]
    beams = write(vlm, batch, num_beams=2, **options).logits[0]
    assert (beams - plain).abs().max() > 0.05, "mended: let test_families.py compare beams on two images here too"
    with attach(vlm, "random", keep=1.0):
        own = write(vlm, batch, num_beams=2, **options).logits[0]
    torch.testing.assert_close(own, plain.expand_as(own), **CLOSE)


@torch.no_grad()
def test_llama4_cannot_search_with_beams():
    tiny = newer("llama4")
    batch = tiny.batch([Sample((SMALL,), 4), Sample((TALL,), 3)])
    with pytest.raises(ValueError, match=r"(?i)image"):
        write(tiny.vlm, batch, num_beams=2)
    with attach(tiny.vlm, "random", keep=3), pytest.raises(ValueError, match=r"(?i)image"):
        write(tiny.vlm, batch, num_beams=2)


@torch.no_grad()
def test_video_llama_3_loses_clips_that_were_thinned_out_in_beams():
    """It counts their tokens before; with a pruner attached all of them are there."""
    tiny = newer("video_llama_3")
    vlm, batch = tiny.vlm, tiny.batch([Sample((), 4, (4,)), Sample((), 6, (4,))])
    with pytest.raises(ValueError, match="non-empty list"):
        write(vlm, batch, num_beams=2)
    plain = write(vlm, batch).logits[0].repeat_interleave(2, 0)
    with attach(vlm, "random", keep=1.0):
        torch.testing.assert_close(write(vlm, batch, num_beams=2).logits[0], plain, **CLOSE)


@torch.no_grad()
def test_kimi_splits_the_features_of_clips_wrongly():
    tiny = newer("kimi_k25")
    with pytest.raises(RuntimeError, match="split"):
        tiny.vlm.model.get_video_features(torch.zeros(72, 3, 4, 4), torch.tensor([[2, 6, 6]]))


# Which there are


NOTHING_TO_PRUNE = {
    "blip", "evolla", "git", "idefics", "kosmos-2", "kosmos-2.5", "mistral4", "mllama", "pi0", "pix2struct",
    "pp_formulanet", "udop", "vision-encoder-decoder",
}  # fmt: skip
"""Images enter by cross-attention, or an encoder-decoder reads them, or nothing does: no visual tokens in a prompt."""
NOT_YET = {
    "aria", "blip-2", "chameleon", "cohere_compass", "cosmos3_edge", "cosmos3_omni", "deepseek_vl",
    "deepseek_vl_hybrid", "diffusion_gemma", "dots3_note", "emu3", "florence2", "fuyu", "glm5_next", "glmga",
    "got_ocr2", "granite_docling", "hunyuan_vl", "hyperclovax_vision_v2", "idefics2", "inkling2", "inkling_mm_model",
    "instructblip", "instructblipvideo", "janus", "lfm3_vl", "minicpm_ocr", "minicpmv4_7", "minimax_m3_vl",
    "mistral_large4", "muse_glimmer", "muse_spark", "nemotron_h_omni", "pp_chart2table", "qwen3_omni_moe_thinker",
    "qwen4_exp", "shieldgemma2", "step3p7", "t5gemma2", "unlimited_ocr",
}  # fmt: skip
"""Known, and without an adapter."""


def test_every_model_that_transformers_has_is_known():
    """Of what a newer release brings, this names what is neither supported nor known."""
    known = set(FAMILIES) | set(UNSUITABLE) | NOTHING_TO_PRUNE | NOT_YET
    assert not set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - known
    assert not (NOTHING_TO_PRUNE | NOT_YET) & (set(FAMILIES) | set(UNSUITABLE))
    assert len(FAMILIES) >= 40 and build_pruner("random").stage == "prompt"
