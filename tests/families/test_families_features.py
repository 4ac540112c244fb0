"""Where the tokens of a family come from: the pixels behind each, rows in reading order, newlines, deepstack."""

import pytest
import torch
from families import FAMILIES, IMAGE, LARGE, MIXED, QWEN, SIDE, SMALL, WIDE, Sample, here, tiny_family
from prompt_oracle import write

from prunezoo import attach, encode, full_forward, gated_forward, pruned_forward
from prunezoo.core.contract import PruneOutput
from prunezoo.host.families import find_family


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


def tokens_left(encoded, output):
    """Of each image, newlines among them."""
    _, lines = encoded.plan(output)
    return [patches + newlines for patches, newlines in zip(output.counts, lines.counts, strict=True)]


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
    assert tokens_left(encoded, output) == [6, 2]
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
    assert tokens_left(encoded, output) == [2, 2, 2, 1]


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


# Deepstack


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


def test_first_layers():
    expected = dict.fromkeys(FAMILIES, 1) | {"qwen3_vl": 2}  # two levels of deepstack
    assert {name: find_family(tiny.vlm).first_layer for name, tiny in FAMILIES.items()} == expected
    assert "deepstack" in find_family(FAMILIES["qwen3_vl"].vlm).first_layer_reason
