"""What each of the tokenizers beside One-D-Piece does by its paper: bits, texts, a shared index; and their sizes."""

import pytest
import torch
from tiny_tokenizer import member, pictures, text_for

from prunezoo import PruneZooError
from prunezoo.tokenizers import llama_blocks
from prunezoo.tokenizers.base import Text, tokenizer_class


def on_meta(name: str, **overrides):
    with torch.device("meta"):
        return tokenizer_class(name)(**overrides)


def count(module) -> int:
    return sum(p.numel() for p in module.parameters())


# Sizes


def test_textok_is_as_large_as_published():
    """About 176 M, beside T5-XL, at 32 to 256 tokens."""
    for tokens in (32, 256):
        assert count(on_meta("textok", tokens=tokens)) == pytest.approx(176e6, rel=0.01)
    assert count(on_meta("textok", text="none")) < count(on_meta("textok", text="encoder")) < count(on_meta("textok"))


def test_instella_has_the_published_row_and_blocks():
    tokenizer = on_meta("instella")
    assert (tokenizer.config.tokens, tokenizer.numbers(1), tokenizer.numbers(128)) == (128, 64, 8192)
    assert len(tokenizer.encoder.blocks) == 12 and len(tokenizer.decoder.blocks) == 16
    assert tokenizer.bit_embedding.shape == (64, 768)
    assert count(tokenizer.encoder) == 88_052_032 and count(tokenizer.decoder) == 208_183_040
    assert llama_blocks.turns_of(torch.zeros(1, 3), 64).shape == (1, 4 + 14 + 14)


def test_tokenflow_has_the_published_grids():
    tokenizer = on_meta("tokenflow")
    assert tokenizer.numbers(8) == 561 and tokenizer.config.bits == 15
    assert tokenizer.quantize.codebook.shape == (32768, 32 + 8)


# Instella


def test_bits_are_drawn_in_training_alone_and_the_gradient_passes():
    tokenizer, images = member("instella"), pictures()
    codes = tokenizer.encode(images)
    assert torch.equal(tokenizer(images, 6).codes, codes), "in use they are where the logits are above 0"
    tokenizer.train()
    torch.manual_seed(1)
    drawn = torch.stack([tokenizer(images, 6).codes for _ in range(40)]).float()
    assert 0 < float((drawn != codes).float().mean()) < 0.5, "drawn, and likelier as in use"
    logits = torch.zeros(1, requires_grad=True)
    tokenizer.encoder.forward = lambda images: logits.expand(3, 6, 5)
    made = tokenizer(images, 6)
    assert float(made.loss) == pytest.approx(0.25 * tokenizer.config.penalty), "the most unsure of all"
    made.output.sum().backward()
    assert float(logits.grad) != 0


def test_cells_that_are_merged_come_back_to_their_places():
    x = torch.arange(2 * 16 * 3).view(2, 16, 3).float()
    gathered = llama_blocks.gather_cells(x, 4)
    assert gathered.shape == (2, 4, 12) and gathered[0, 0].view(4, 3)[:, 0].tolist() == [0, 3, 12, 15]
    assert torch.equal(llama_blocks.spread_cells(gathered, 4), x)
    middles = llama_blocks.pool_places(llama_blocks.grid_places(4), 4)
    assert middles.tolist() == [[0, 0.5, 0.5], [0, 0.5, 2.5], [0, 2.5, 0.5], [0, 2.5, 2.5]]


def test_turning_depends_on_how_far_apart_places_are():
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 64)

    def product(a: list[float], b: list[float]) -> torch.Tensor:
        turned = [llama_blocks.turn(x, llama_blocks.turns_of(torch.tensor([p]), 64)) for x, p in ((query, a), (key, b))]
        return (turned[0] * turned[1]).sum()

    here = product([1.0, 2.0, 3.0], [0.0, 4.0, 1.0])
    torch.testing.assert_close(product([3.0, 3.0, 8.0], [2.0, 5.0, 6.0]), here, rtol=1e-4, atol=1e-4)
    assert not torch.isclose(product([1.0, 2.0, 3.0], [0.0, 4.0, 2.0]), here)


def test_at_the_start_a_latent_looks_at_the_patches_near_its_place():
    torch.manual_seed(0)
    sizes = {"image_size": 64, "patch": 8, "tokens": 6, "token_bits": 5, "width": 64, "heads": 2, "encoder_layers": 1}
    sizes |= {"merge_after": 0, "decoder_width": 32, "decoder_heads": 1, "decoder_layers": 1, "split_after": 0}
    encoder, tokens, grid = tokenizer_class("instella")(**sizes).encoder, 6, 8
    x = torch.cat([encoder.latents.expand(2, -1, -1), encoder.patches(torch.rand(2, 3, 64, 64))], dim=1)
    places = torch.cat([llama_blocks.row_places(tokens, grid), llama_blocks.grid_places(grid)])
    block = encoder.blocks[0]
    turns = llama_blocks.turns_of(places, x.shape[-1] // block.heads)
    query, key, _ = block.qkv(block.norm1(x)).unflatten(-1, (3, block.heads, -1)).permute(2, 0, 3, 1, 4)
    looks = (llama_blocks.turn(query, turns) @ llama_blocks.turn(key, turns).transpose(-1, -2)).softmax(-1).mean((0, 1))
    assert looks[:tokens, :tokens].sum(1).max() < 0.1  # latents have nothing to give yet
    apart = torch.cdist(places[:tokens, 1:], places[tokens:, 1:])
    seen = looks[:tokens, tokens:]
    assert (seen * apart).sum(1).mean() < 0.6 * apart.mean()
    assert llama_blocks.row_places(3, grid).tolist() == llama_blocks.row_places(tokens, grid)[:3].tolist()
    assert llama_blocks.row_places(0, grid).shape == (0, 3)


def test_merging_starts_as_the_mean_and_splitting_as_copies():
    torch.manual_seed(0)
    merge, split = torch.nn.Linear(32, 8, bias=False), torch.nn.Linear(8, 32, bias=False)
    llama_blocks.start_as_mean(merge), llama_blocks.start_as_copies(split)
    cells = torch.randn(5, 4, 8)
    assert (merge(cells.flatten(1)) - cells.mean(1)).abs().mean() < 0.1
    assert (split(cells[:, 0]).view(5, 4, 8) - cells[:, :1]).abs().mean() < 0.1


# TexTok


@pytest.mark.parametrize("reads", ["both", "encoder", "decoder", "none"])
def test_the_text_is_read_where_the_config_says(reads):
    tokenizer, images = member("textok", text=reads, latent_bits=16), pictures()  # fine, as it is not trained
    if reads == "none":
        assert not tokenizer.reads_text and not tokenizer.texts
        return
    one, other = text_for(tokenizer, 3), text_for(tokenizer, 3, seed=1)
    codes = tokenizer.encode(images, one)
    assert torch.equal(tokenizer.encode(images, other), codes) == (reads == "decoder")
    assert torch.equal(tokenizer.decode(codes, one), tokenizer.decode(codes, other)) == (reads == "encoder")


def test_padding_of_a_text_never_matters():
    tokenizer, images = member("textok", latent_bits=16), pictures()
    text = text_for(tokenizer, 3)
    other = text.embeddings.masked_fill(~text.valid[..., None], 7.0)
    codes = tokenizer.encode(images, text)
    assert torch.equal(tokenizer.encode(images, Text(other, text.valid)), codes)
    assert torch.equal(tokenizer.decode(codes, Text(other, text.valid)), tokenizer.decode(codes, text))
    silent = Text(text.embeddings[:, :0], text.valid[:, :0])
    assert tokenizer.encode(images, silent).shape == codes.shape, "nothing said is a text too"
    with pytest.raises(PruneZooError, match=r"must be \(B, T, 12\)"):
        tokenizer.encode(images, Text(text.embeddings[..., :5], text.valid))


def test_numbers_are_rounded_evenly():
    tokenizer = member("textok", latent_bits=2)
    latents = torch.tensor([-1.0, -0.4, 0.3, 1.0])
    assert tokenizer.round(latents).tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(tokenizer.values(torch.arange(4)), torch.tensor([-1, -1 / 3, 1 / 3, 1]))


# TokenFlow


@pytest.mark.parametrize("weight", [0.25, 1.0, 9.0])
def test_one_index_is_nearest_by_meaning_and_pixels_together(weight):
    tokenizer, images = member("tokenflow", pixel_weight=weight), pictures()
    wanted = tokenizer.latents(images)
    codes, lefts, _ = tokenizer.quantise(wanted)
    book = tokenizer.quantize.codebook
    for code, left in zip(codes, lefts, strict=True):
        meaning = torch.cdist(left[..., :6].contiguous(), book[:, :6].contiguous()).square()
        pixels = torch.cdist(left[..., 6:] / weight**0.5, book[:, 6:] / weight**0.5).square()
        assert torch.equal((meaning + weight * pixels).argmin(-1), code)
    norms = wanted[:, :6].norm(dim=1), wanted[:, 6:].norm(dim=1) / weight**0.5
    assert all(torch.allclose(norm, torch.ones_like(norm)) for norm in norms)


def test_codes_stand_for_the_sum_of_their_grids():
    tokenizer, images = member("tokenflow"), pictures()
    codes, _, sums = tokenizer.quantise(tokenizer.latents(images))
    for length, wanted in enumerate(sums, start=1):
        torch.testing.assert_close(tokenizer.gather(torch.cat(codes[:length], dim=1)), wanted)
    assert tokenizer.understand(tokenizer.encode(images)).shape == (3, 64, 12)


def test_in_training_the_codebook_follows_the_grids():
    tokenizer, images = member("tokenflow").train(), pictures()
    first = float(tokenizer(images, 3).loss)
    for _ in range(40):
        last = float(tokenizer(images, 3).loss)
    assert last < 0.8 * first  # the same pictures: all that has changed is the codebook
    book = tokenizer.quantize.codebook.clone()
    tokenizer.eval()(images, 3)
    assert torch.equal(tokenizer.quantize.codebook, book), "in use it stands still"


# Configs


@pytest.mark.parametrize(
    ("name", "wrong", "named"),
    [
        ("instella", {"width": 48}, "width=48"),
        ("instella", {"merge_after": 1}, "merge_after=1"),
        ("instella", {"image_size": 24}, "even number"),
        ("instella", {"temperature": 0}, "temperature=0"),
        ("instella", {"token_bits": 2000}, "token_bits=2000"),
        ("textok", {"text": "all"}, "text='all'"),
        ("textok", {"latent_bits": 17}, "latent_bits=17"),
        ("textok", {"tokens": 257}, "tokens=257"),
        ("textok", {"heads": 3}, "heads=3"),
        ("tokenflow", {"scales": (1, 3, 7)}, "scales="),
        ("tokenflow", {"scales": (3, 1, 8)}, "scales="),
        ("tokenflow", {"codes": 100}, "codes=100"),
        ("tokenflow", {"channels": (32, 48, 32)}, "channels="),
        ("tokenflow", {"patch": 8, "scales": (4,)}, "patch=8"),
        ("tokenflow", {"pixel_weight": 0}, "pixel_weight=0"),
    ],
)
def test_a_mistake_in_the_config_is_named(name, wrong, named):
    with pytest.raises(PruneZooError, match=named):
        member(name, **wrong)
