"""One-D-Piece: rows of codes and their prefixes, the codebook and its gradient, configs and its sizes in the paper."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from tiny_tokenizer import pictures, tiny

from prunezoo import PruneZooError
from prunezoo.tokenizers.one_d_piece import OneDPiece, OneDPieceConfig
from prunezoo.tokenizers.quantizer import Quantizer

ROOT = Path(__file__).parent.parent.parent


# Rows and prefixes


def test_every_prefix_is_a_picture_and_the_codes_matter():
    tokenizer, images = tiny(), pictures()
    codes = tokenizer.encode(images)
    assert codes.shape == (3, 24) and codes.dtype == torch.long and int(codes.max()) < 64
    assert len({tuple(row) for row in codes.tolist()}) == 3, "different pictures have different codes"
    painted = [tokenizer.decode(codes[:, :length]) for length in range(1, 25)]
    assert all(p.shape == images.shape and p.min() >= 0 and p.max() <= 1 for p in painted)
    assert all(not torch.equal(a, b) for a, b in pairwise(painted))
    other = codes.clone()
    other[:, 0] = (other[:, 0] + 1) % 64
    assert not torch.equal(tokenizer.decode(other), painted[-1])


@pytest.mark.parametrize("length", [0, 25])
def test_a_row_of_another_length_is_refused(length):
    tokenizer = tiny()
    with pytest.raises(PruneZooError, match=f"length={length} .* 1 to 24"):
        tokenizer.decode(torch.zeros(1, length, dtype=torch.long))


def test_a_code_beyond_the_codebook_and_a_picture_of_another_size_are_refused():
    tokenizer = tiny()
    with pytest.raises(PruneZooError, match="0 to 63"):
        tokenizer.decode(torch.tensor([[64]]))
    with pytest.raises(PruneZooError, match=r"\(B, 3, 32, 32\)"):
        tokenizer.encode(torch.zeros(1, 3, 16, 16))


def test_the_decoder_reads_no_more_than_the_prefix():
    """In training too: at length 5 the gradient of what is painted reaches the first five tokens only."""
    model, rows = tiny().train(), []
    model.encoder.register_forward_hook(lambda _, __, latents: rows.append(latents))
    painted = model(pictures(), 5)
    assert painted.codes.shape == (3, 24)
    reached, committed = (
        torch.autograd.grad(value, rows, retain_graph=True)[0].abs().amax((0, 2)) > 0
        for value in (painted.output.square().sum(), painted.loss)
    )
    assert reached.tolist() == [True] * 5 + [False] * 19
    assert committed.all(), "the quantiser's loss is over the whole row"


def test_before_training_codes_say_what_is_near():
    """The start that makes small models learn quickly: a change in one corner moves the tokens that are there."""
    model, images = tiny(tokens=64, code_width=8, width=64), pictures()
    changed = images[:1].clone()
    changed[..., 24:, 24:] = 1 - changed[..., 24:, 24:]
    with torch.no_grad():
        rows = [F.normalize(model.encoder(x, model.latent_tokens), dim=-1) for x in (images[:1], changed)]
    moved = (rows[0] - rows[1]).norm(dim=-1)[0]
    places = torch.quasirandom.SobolEngine(2).fast_forward(1).draw(64)
    near, far = ((places > 0.75).all(-1)), ((places < 0.5).all(-1))
    assert moved[near].mean() > 3 * moved[far].mean() > 0


# The quantiser


def test_the_codebook_follows_and_no_code_stays_dead():
    torch.manual_seed(0)
    quantizer = Quantizer(codes=16, width=3).train()
    centres = F.normalize(torch.randn(4, 3), dim=-1)
    assert (quantizer.codebook @ centres.T).amax(1).min() < 0.9, "some code is far from all centres"
    for _ in range(100):
        quantizer(centres[torch.randint(4, (128,))] + 0.01 * torch.randn(128, 3))
    quantizer.eval()
    before = quantizer.codebook.clone()
    assert quantizer(centres)[2] < 1e-4
    assert (quantizer.codebook @ centres.T).amax(1).min() > 0.99, "every code has come to a centre"
    assert torch.equal(quantizer.codebook, before), "in eval it stands still"
    torch.testing.assert_close(quantizer.codebook.norm(dim=-1), torch.ones(16))


def test_codes_of_any_length_follow_by_distance():
    torch.manual_seed(0)
    quantizer = Quantizer(codes=16, width=3, unit=False).train()
    centres = 3 * F.normalize(torch.randn(2, 3), dim=-1)
    centres = torch.cat([centres, 0.1 * centres])  # two directions, two lengths of each
    for _ in range(100):
        quantizer(centres[torch.randint(4, (128,))] + 0.01 * torch.randn(128, 3))
    quantizer.eval()
    codes = quantizer.nearest(centres)
    assert len(codes.unique()) == 4
    assert torch.equal(codes, torch.cdist(centres, quantizer.codebook).argmin(-1))
    torch.testing.assert_close(quantizer(centres)[0], centres, rtol=0, atol=0.05)
    assert torch.cdist(quantizer.codebook, centres).amin(1).max() < 0.1, "every code has come to a centre"


def test_the_gradient_passes_straight_through():
    quantizer = Quantizer(codes=8, width=3).eval()
    latents = torch.randn(5, 3, requires_grad=True)
    unit = F.normalize(latents, dim=-1)
    quantized, codes, _ = quantizer(latents)
    assert torch.equal(codes, quantizer.nearest(3 * latents)), "length does not matter"
    torch.testing.assert_close(quantized, quantizer.codebook[codes])
    weight = torch.randn(5, 3)
    (got,) = torch.autograd.grad((quantized * weight).sum(), latents)
    (wanted,) = torch.autograd.grad((unit * weight).sum(), latents)
    torch.testing.assert_close(got, wanted)


# Configs


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"patch": 7}, "patch=7"),
        ({"codes": 100}, "codes=100"),
        ({"tokens": 257}, "tokens=257"),
        ({"head": "words"}, "head='words'"),
        ({"head": "codes"}, "needs patch=16"),
        ({"width": 30}, "width=30"),
        ({"decoder_width": 30}, "decoder_width=30"),
        ({"decoder_width": 48, "decoder_heads": 5}, "decoder_heads=5"),
        ({"decoder_heads": 0}, "decoder_heads=0"),
        ({"widht": 32}, "widht"),
    ],
)
def test_a_mistake_in_the_config_is_named(wrong, named):
    with pytest.raises(PruneZooError, match=named):
        tiny(**wrong)


@pytest.mark.parametrize(("size", "parameters"), [("s", 83_822_095), ("b", 205_207_311), ("l", 641_693_711)])
def test_sizes_of_the_paper(size, parameters):
    """Counted from the published layout; for L a third party counts 642 M."""
    recipe = yaml.safe_load((ROOT / "configs" / f"one_d_piece_{size}.yaml").read_text())
    config = recipe["model"]["init_args"]["tokenizer"]["init_args"]["config"]
    with torch.device("meta"):
        model = OneDPiece(**config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.config.bits * model.config.tokens == 3072


def test_config_of_the_module_is_that_of_the_paper_by_default():
    c = OneDPieceConfig()
    assert (c.image_size, c.patch, c.tokens, c.codes, c.code_width, c.width) == (256, 16, 256, 4096, 12, 512)
