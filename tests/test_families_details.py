"""What is special about families: where their tokens come from, newlines, deepstack, windows, wrappers, refusals."""

import inspect
from dataclasses import replace

import pytest
import torch
from families import FAMILIES, IMAGE, LARGE, MIXED, ONE_EACH, SIDE, SMALL, TALL, WIDE, Sample, tiny_family
from families.gemma import Gemma3
from prompt_oracle import CLOSE, STEPS, blind, drops, write

from modules import PruneZooError, attach, build_pruner, encode, full_forward, gated_forward, pruned_forward
from modules.core.contract import PruneOutput
from modules.host.families import find_family
from modules.host.families.base import TAKES_FEATURES

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def here(name):
    """A family, unless the release of `transformers` at hand is too old for it, which the matrix sees refused."""
    embeddings = "inputs_embeds" in inspect.signature(FAMILIES[name].vlm.prepare_inputs_for_generation).parameters
    if not TAKES_FEATURES and (name == "qwen3_vl" or not embeddings):
        pytest.skip(f"{name} needs transformers 5.19 or later")
    return tiny_family(name)


def blind_attention(vlm):
    """Let no patch of the vision tower see another, so that a token depends on its own pixels alone."""
    parts = dict(vlm.model.named_modules())
    tower = next(parts[name] for name in ("vision_tower", "visual", "vision_model") if name in parts)
    silenced = 0
    for name, module in tower.named_modules():
        if name.endswith(("attn.out_proj", "attn.proj", "attention.projection_layer")):
            module.weight.zero_()
            module.bias.zero_()
            silenced += 1
    assert silenced >= 2
    return vlm


def pixels_behind(family, batch, token):
    """Where the gradient of one token's features is: the indices of pixels that it depends on."""
    key = "pixel_values"
    pixels = batch[key].clone().requires_grad_()
    encoded = encode(family.vlm, {**batch, key: pixels})
    encoded.inputs.features[encoded.inputs.valid][token].sum().backward()
    return (pixels.grad != 0).nonzero()


@pytest.mark.parametrize("name", FAMILIES)
def test_cells_say_which_pixels_a_token_is_made_of(name):
    family = type(FAMILIES[name])()
    blind_attention(family.vlm)
    sizes = [LARGE, WIDE] if name != "llava_onevision" else [WIDE, SMALL]  # small enough not to be made smaller
    batch = family.batch([Sample((size,), 4) for size in sizes])
    encoded = encode(family.vlm, batch)
    cells = torch.cat([own[valid] for own, valid in zip(encoded.inputs.cells, encoded.inputs.valid, strict=True)])
    image = torch.arange(len(sizes))[:, None].expand_as(encoded.inputs.valid)[encoded.inputs.valid]
    last_of_first = int(encoded.inputs.valid[0].sum()) - 1
    before = 0
    for token in (0, 5, last_of_first - 6, last_of_first, last_of_first + 1, last_of_first + 9, len(cells) - 1):
        found = pixels_behind(family, batch, token)
        tile, row, column = cells[token].tolist()
        number = int(image[token])
        if name in QWEN:  # a row of pixel values is a patch; four of them, two by two, are a token
            height, width = (batch["image_grid_thw"][number, 1:] // 2).tolist()
            before = int(batch["image_grid_thw"][:number].prod(1).sum())
            assert tile == 0 and row < height and column < width
            start = before + 4 * (row * width + column)
            assert found[:, 0].unique().tolist() == list(range(start, start + 4))
            continue
        patch = SIDE // family.side
        if name in ("llava_next", "llava_onevision"):
            assert found[:, 0].unique().tolist() == [number]
            found = found[:, 1:]
            if tile == 1:  # the crops put together, the padding taken off
                crops, grid = family.tiles(sizes[number]), family.grid(sizes[number])
                row += (crops[0] * family.side - grid[0]) // 2
                column += (crops[1] * family.side - grid[1]) // 2
                tile = 1 + row // family.side * crops[1] + column // family.side
                row, column = row % family.side, column % family.side
        elif name in ("idefics3", "smolvlm"):
            assert found[:, 0].unique().tolist() == [number]
            found = found[:, 1:]
        else:
            tile += sum(family.tiles(size) for size in sizes[:number]) if name == "internvl" else number
        assert found[:, 0].unique().tolist() == [tile]
        assert (found[:, 2].min(), found[:, 2].max() + 1) == (row * patch, (row + 1) * patch)
        assert (found[:, 3].min(), found[:, 3].max() + 1) == (column * patch, (column + 1) * patch)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_are_images_in_reading_order(name):
    """Whatever they are cut into; a batch of text has none, and is left alone."""
    tiny = here(name)
    encoded = encode(tiny.vlm, tiny.batch(MIXED))
    assert encoded.sample.tolist() == [0, 2, 2, 3]
    starts = encoded.slots[:, 0] + encoded.sample * 1000
    assert torch.equal(starts, starts.sort().values)
    kinds = (tiny.batch(MIXED)["input_ids"] == IMAGE).sum(1)
    assert encoded.tokens.sum() == kinds.sum() and encoded.tokens[0] == kinds[0]
    for cells, valid in zip(encoded.inputs.cells, encoded.inputs.valid, strict=True):
        assert len({tuple(cell) for cell in cells[valid].tolist()}) == int(valid.sum()) and (cells[valid] >= 0).all()
    text = tiny.batch([Sample((), 5), Sample((), 3)])
    nothing = encode(tiny.vlm, text)
    assert len(nothing.sample) == 0 and nothing.inputs.features.shape[0] == 0
    bare, written = tiny.vlm(**text).logits, write(tiny.vlm, text).sequences
    assert torch.equal(full_forward(tiny.vlm, nothing).logits, bare)
    with attach(tiny.vlm, "random", keep=2) as run:
        assert torch.equal(tiny.vlm(**text).logits, bare)
        assert torch.equal(write(tiny.vlm, text).sequences, written)
    assert not run.stats.before


# Newlines


def test_a_newline_lives_as_long_as_a_patch_of_its_row():
    """LLaVA-NeXT: 16 patches of the thumbnail, then 8 rows of 6 patches and a newline."""
    tiny = tiny_family("llava_next")
    batch = tiny.batch([Sample((LARGE,), 5), Sample((SMALL,), 3)])
    encoded = encode(tiny.vlm, batch)
    assert encoded.tokens.tolist() == [16 + 8 * 7, 16 + 4 * 5]
    assert encoded.inputs.valid.sum(1).tolist() == [16 + 8 * 6, 16 + 4 * 4]
    # A patch of the thumbnail, two of row 3 of the grid, one of row 7; of the other image the thumbnail alone.
    slots = [2, 16 + 3 * 6 + 1, 16 + 3 * 6 + 5, 16 + 7 * 6], [0, 15]
    valid = torch.tensor([[True] * 4, [True, True, False, False]])
    output = PruneOutput(torch.tensor([slots[0], [*slots[1], 0, 0]]), valid)
    first, second = (int(row.nonzero()[0]) for row in batch["input_ids"] == IMAGE)
    columns = [2, 16 + 3 * 7 + 1, 16 + 3 * 7 + 5, 16 + 3 * 7 + 6, 16 + 7 * 7, 16 + 7 * 7 + 6]
    visual = encoded.columns_left(output) & (batch["input_ids"] == IMAGE)
    assert visual[0].nonzero()[:, 0].tolist() == [first + column for column in columns]
    assert visual[1].nonzero()[:, 0].tolist() == [second, second + 15]
    assert encoded.tokens_left(output).tolist() == [6, 2]
    # The newlines themselves are where the model's own features have them.
    newline = tiny.vlm.model.image_newline
    packed = tiny.vlm.model.get_image_features(batch["pixel_values"], batch["image_sizes"]).pooler_output[0]
    where = (packed == newline).all(1).nonzero()[:, 0]
    assert where.tolist() == [16 + 7 * row + 6 for row in range(8)]
    assert (encoded.newlines.slots[0] - first).tolist() == where.tolist()
    with attach(tiny.vlm, "random", keep=1) as run:
        tiny.vlm(**batch)
    assert run.stats.before == [72, 36] and all(after in (1, 2) for after in run.stats.after)


def test_one_newline_ends_an_image_among_several_and_a_clip():
    tiny = tiny_family("llava_onevision")
    batch = tiny.batch([Sample((LARGE, SMALL), 5, (4,)), Sample((LARGE,), 3)])
    encoded = encode(tiny.vlm, batch)
    assert encoded.tokens.tolist() == [17, 17, 4 * 4 + 1, 16 + 6 * 5]  # 8 x 6 made smaller: 6 x 4
    assert encoded.inputs.cells[2][encoded.inputs.valid[2]][:, 0].tolist() == [
        frame for frame in range(4) for _ in "4444"
    ]
    output = PruneOutput(torch.tensor([[3], [15], [7], [0]]), torch.tensor([[True], [True], [True], [True]]))
    assert encoded.tokens_left(output).tolist() == [2, 2, 2, 1]


def test_closed_gates_close_the_newline_of_their_row():
    tiny = tiny_family("llava_next")
    encoded = encode(tiny.vlm, tiny.batch([Sample((LARGE,), 5)]))
    gates = (encoded.inputs.cells[..., 0] == 0).float()
    gates[0, 20] = 0.25  # row 0 of the grid: its newline is as open
    base, half = (gated_forward(tiny.vlm, encoded, gates * g, log_eps=1e-9).logits[:, -1] for g in (1.0, gates))
    index = torch.cat([torch.arange(16), torch.tensor([20])])[None]
    kept = pruned_forward(tiny.vlm, encoded, PruneOutput(index, torch.ones_like(index, dtype=torch.bool))).logits[:, -1]
    gates[0, 20] = 1
    torch.testing.assert_close(
        gated_forward(tiny.vlm, encoded, gates, log_eps=1e-9).logits[:, -1], kept, rtol=0, atol=5e-5
    )
    assert (base - half).abs().max() > 1e-3 and (base - kept).abs().max() > 1e-3


# Pruners that make tokens


@pytest.mark.parametrize("method", ["pool", "resize", "uniform", "divprune", "none", "full"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_pruner_runs(name, method):
    """Ragged images with tiles, clips where there are any, direct and in `generate`."""
    tiny = here(name)
    batch = tiny.batch([*MIXED, Sample((), 4, (4,))] if tiny.videos else MIXED)
    with torch.no_grad(), attach(tiny.vlm, method, keep=3) as run:
        assert tiny.vlm(**batch).logits.isfinite().all()
        assert tiny.vlm.generate(**batch, max_new_tokens=2).shape == (
            len(batch["input_ids"]),
            batch["input_ids"].shape[1] + 2,
        )
    if method not in ("none", "full"):
        newlines = name in ("llava_next", "llava_onevision")
        assert all(3 <= after <= 6 if newlines else after == 3 for after in run.stats.after)


@pytest.mark.parametrize("grouped", [True, False])
def test_what_was_merged_has_the_mean_of_its_deepstack_features(grouped):
    tiny = here("qwen3_vl")
    encoded = encode(tiny.vlm, tiny.batch([Sample((SMALL,), 4)]))  # 9 tokens
    features = encoded.inputs.features
    groups = torch.tensor([[0, 0, -1, 1, 1, 1, -1, 2, -1]])
    index, valid = torch.tensor([[0, 4, 7]]), torch.ones(1, 3, dtype=torch.bool)
    merged = torch.stack([features[0, own].mean(0) for own in ([0, 1], [3, 4, 5], [7])])[None]
    seen = []

    def watch(_module, _args, kwargs):
        seen.extend(kwargs["deepstack_visual_embeds"])

    handle = tiny.vlm.get_decoder().register_forward_pre_hook(watch, with_kwargs=True)
    pruned_forward(tiny.vlm, encoded, PruneOutput(index, valid, merged, groups=groups if grouped else None))
    handle.remove()
    assert len(seen) == len(encoded.deep) == 2
    for level, own in zip(seen, encoded.deep, strict=True):
        assert own.abs().max() > 0.01
        parts = ([0, 1], [3, 4, 5], [7]) if grouped else ([0], [4], [7])
        torch.testing.assert_close(level, torch.stack([own[0, part].mean(0) for part in parts]))


# Ways of calling


OPTIONS = {"static_cache": {"cache_implementation": "static"}, "no_cache": {"use_cache": False}}
if TAKES_FEATURES:
    OPTIONS |= {"prompt_lookup": {"prompt_lookup_num_tokens": 2}, "chunked_prefill": {"prefill_chunk_size": 7}}
CALLS = [
    (name, option)
    for name in FAMILIES
    for option in OPTIONS  # in chunks, the bare models of the latter two cannot look ahead as they do in one piece
    if not (option == "chunked_prefill" and name in ("gemma3", "paligemma"))
]


@pytest.mark.parametrize(("name", "option"), CALLS)
def test_ways_of_generating_agree(name, option):
    """Each writes what the plain way writes of the shorter prompt, as the bare model does of the whole one."""
    tiny = here(name)
    batch = tiny.batch([Sample((LARGE,), 9)] if option == "prompt_lookup" else ONE_EACH)
    options = {"max_new_tokens": STEPS, **OPTIONS[option]}
    with torch.no_grad():
        assert torch.equal(tiny.vlm.generate(**batch, **options), tiny.vlm.generate(**batch, max_new_tokens=STEPS))
        with attach(tiny.vlm, "random", keep=0.5):
            plain = tiny.vlm.generate(**batch, max_new_tokens=STEPS)
            other = tiny.vlm.generate(**batch, **options)
    assert torch.equal(plain, other)


@pytest.mark.parametrize("name", FAMILIES)
def test_labels_are_shortened_with_the_prompt(name):
    tiny = here(name)
    batch = tiny.batch(MIXED, side="right", labels=True)
    with torch.no_grad(), attach(tiny.vlm, "random", keep=0.5):
        out = tiny.vlm(**batch)
    encoded = encode(tiny.vlm, batch)
    short = pruned_forward(tiny.vlm, encoded, build_pruner("random").eval()(encoded.inputs, 0.5))
    assert torch.equal(short.labels[short.labels != -100], batch["labels"][batch["labels"] != -100])
    assert short.labels.shape == short.logits.shape[:2] == out.logits.shape[:2]
    torch.testing.assert_close(short.logits, out.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(out.loss, tiny.vlm.loss_function(short.logits, short.labels, short.logits.shape[-1]))
    full = full_forward(tiny.vlm, encoded)
    answer = full.labels != -100  # what is left of the answers is read with less of the image before it
    assert (full.logits[answer] - short.logits[short.labels != -100]).abs().max() > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_without_any_image_token_the_prompt_is_text(name):
    """With positions numbered anew; in time, height and width that means nothing, and is refused."""
    tiny = here(name)
    batch = tiny.batch(MIXED)
    with torch.no_grad(), attach(tiny.vlm, "none", keep=1, positions="compact"):
        if name in QWEN:
            with pytest.raises(PruneZooError, match="use 'original' with Qwen"):
                tiny.vlm(**batch)
            return
        logits, written = tiny.vlm(**batch).logits, tiny.vlm.generate(**batch, max_new_tokens=3)
    for row, ids in enumerate(batch["input_ids"]):
        words = (ids != IMAGE) & batch["attention_mask"][row].bool()
        text = {key: value[row][words][None] for key, value in batch.items() if value.shape == batch["input_ids"].shape}
        plain = tiny.vlm.generate(**text, max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
        assert torch.equal(plain.sequences[0, -3:], written[row, -3:])
    torch.testing.assert_close(plain.logits[0][0], logits[-1, -1], rtol=0, atol=0.1 if name == "paligemma" else 1e-5)


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "gemma3"])
def test_lora_around_the_model(name):
    """A direct call runs the wrapper's forward, the loop of `generate` that of the model inside."""
    peft = pytest.importorskip("peft")
    vlm, batch = here(name).build(), FAMILIES[name].batch([Sample((LARGE,), 5)])
    bare = vlm(**batch).logits
    words = r".*(language|text)_model.*\.(q_proj|v_proj)"
    lora = peft.get_peft_model(vlm, peft.LoraConfig(target_modules=words, init_lora_weights=False)).eval()
    with torch.no_grad():
        encoded = encode(lora, batch)
        output = build_pruner("random", seed=3).eval()(encoded.inputs, 0.5)
        assert (full_forward(lora, encoded).logits - bare).abs().max() > 1e-2
        with blind(vlm, drops(encoded, output)):
            expected, written = vlm(**batch).logits[:, -1], write(vlm, batch).sequences
        with attach(lora, build_pruner("random", seed=3), keep=0.5):
            torch.testing.assert_close(lora(**batch).logits[:, -1], expected, **CLOSE)
            for use_cache in (True, False):  # without a cache, gaps in positions could be read as packed sequences
                assert torch.equal(write(lora, batch, use_cache=use_cache).sequences, written)
    assert torch.equal(full_forward(lora, encoded).logits, lora(**batch).logits)


def test_a_compiled_model():
    vlm, batch = FAMILIES["llava"].build(), FAMILIES["llava"].batch(ONE_EACH)
    with torch.no_grad(), attach(vlm, "uniform", keep=5):
        expected, written = vlm(**batch).logits, vlm.generate(**batch, max_new_tokens=3)
    compiled = torch.compile(vlm, backend="eager")
    with torch.no_grad(), attach(compiled, "uniform", keep=5):
        torch.testing.assert_close(compiled(**batch).logits, expected, rtol=0, atol=1e-5)
        assert torch.equal(compiled.generate(**batch, max_new_tokens=3), written)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_the_same_with_checkpointing(name):
    vlm, batch = here(name).build(), FAMILIES[name].batch(MIXED)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            vlm.gradient_checkpointing_enable({"use_reentrant": False})
            vlm.train()
        encoded = encode(vlm, batch)
        features = encoded.inputs.features.detach().requires_grad_()
        encoded = replace(encoded, inputs=replace(encoded.inputs, features=features))
        output = build_pruner("uniform").eval()(encoded.inputs, 0.5)
        pruned_forward(vlm, encoded, output).logits[:, -1].square().sum().backward()
        kept = torch.zeros_like(encoded.inputs.valid).scatter(1, output.index[:, :1], True)
        assert (features.grad[kept] != 0).any(-1).all()
        found.append(features.grad)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


# What families say, and refuse


def test_first_layers():
    expected = dict.fromkeys(FAMILIES, 1) | {"qwen3_vl": 2}  # two levels of deepstack
    assert {name: find_family(tiny.vlm).first_layer for name, tiny in FAMILIES.items()} == expected
    assert "deepstack" in find_family(FAMILIES["qwen3_vl"].vlm).first_layer_reason


def test_a_prompt_longer_than_the_sliding_window():
    """Gemma 3: bit for bit with all tokens, gates under the model's own windows; the window counts tokens left."""
    here("gemma3")
    family = Gemma3()
    family.window = 12  # beyond an image's 9 tokens
    batch = family.batch([Sample((SMALL, WIDE), 9), Sample((TALL,), 12)])
    vlm = family.vlm
    with torch.no_grad():
        bare = vlm(**batch).logits
        assert (bare - FAMILIES["gemma3"].vlm(**batch).logits).abs().max() > 0.01
        encoded = encode(vlm, batch)
        ones = gated_forward(vlm, encoded, torch.ones(3, 9), log_eps=1e-9).logits[:, -1]
        torch.testing.assert_close(ones, bare[:, -1], rtol=0, atol=5e-5)
        with attach(vlm, "random", keep=1.0):
            assert torch.equal(vlm(**batch).logits, bare)
        with attach(vlm, "random", keep=2):
            assert torch.equal(vlm.generate(**batch, max_new_tokens=3)[:, :-3], batch["input_ids"])


def test_gates_are_refused_beyond_a_window_that_the_host_cannot_make():
    tiny = tiny_family("llava_onevision")
    vlm = tiny.build()
    text = vlm.config.text_config
    text.sliding_window, text.layer_types = 8, ["sliding_attention"] * text.num_hidden_layers
    encoded = encode(tiny.vlm, tiny.batch([Sample((SMALL,), 5)]))
    with pytest.raises(PruneZooError, match="sliding window of 8: use shorter prompts"):
        gated_forward(vlm, encoded, torch.ones(encoded.inputs.valid.shape))


def changed(name, **values):
    """A model with other values in its configuration."""
    vlm = FAMILIES[name].build()
    for key, value in values.items():
        setattr(vlm.config, key, value)
    return vlm


REFUSALS = {
    "llava with CLS": (
        lambda: find_family(changed("llava", vision_feature_select_strategy="full")),
        "clip_vision_model wi",
    ),
    "internvl with CLS": (lambda: find_family(changed("internvl", vision_feature_select_strategy="full")), "'default'"),
    "text model": (lambda: find_family(FAMILIES["llava"].vlm.get_decoder()), "supported: LLaVA, LLaVA-NeXT"),
    "model without a head": (lambda: find_family(FAMILIES["gemma3"].vlm.model), "ForConditionalGeneration"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_models_that_are_refused(case):
    call, remedy = REFUSALS[case]
    with pytest.raises(PruneZooError, match=remedy):
        call()


INPUTS = {
    "sizes for llava": ("llava", {"image_sizes": torch.tensor([[24, 24]])}, "image_sizes"),
    "no sizes for llava_next": ("llava_next", {"image_sizes": None}, "processor's image_sizes"),
    "another layer": ("llava", {"vision_feature_layer": -1}, "set it in the model's config"),
    "too few tiles": ("internvl", {"pixel_values": torch.zeros(1, 3, SIDE, SIDE)}, "use one processor"),
    "a broken run": ("internvl", {"input_ids": torch.tensor([[1, 3, 3, 3, 20]])}, "no multiple of the 9 of a tile"),
    "missing placeholders": ("gemma3", {"input_ids": torch.tensor([[1, 3, 3, 3, 20]])}, "9 tokens: use one processor"),
    "over two samples": ("llava", {"input_ids": torch.tensor([[1, *[3] * 8], [1, *[3] * 8]])}, "over two samples"),
    "a clip": ("idefics3", {"pixel_values_videos": torch.zeros(1, 2, 3, SIDE, SIDE)}, "frames as images"),
}


@pytest.mark.parametrize("case", INPUTS)
def test_inputs_that_are_refused(case):
    name, values, remedy = INPUTS[case]
    tiny = here(name)
    batch = {**tiny.batch([Sample((LARGE,), 3)]), **values}
    if batch["attention_mask"].shape != batch["input_ids"].shape:
        batch.pop("attention_mask")
    with torch.no_grad(), pytest.raises(PruneZooError, match=remedy):
        encode(tiny.vlm, batch)


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_models(name):
    """A pruner computes in its own type, the model gets tokens and newlines in its own."""
    vlm, batch = here(name).build().bfloat16(), FAMILIES[name].batch(MIXED)
    batch = {key: value.bfloat16() if key.startswith("pixel_values") else value for key, value in batch.items()}
    with torch.no_grad(), attach(vlm, "pool", keep=2):
        assert vlm(**batch).logits.dtype == torch.bfloat16
        assert vlm.generate(**batch, max_new_tokens=2).shape[0] == 4
