"""The tokenizer One-D-Piece: rows and prefixes, the file, published layouts, training, and its sizes in the paper."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import save_file

from modules import AutoPruner, PruneZooError
from modules.tokenizers import container
from modules.tokenizers.maskgit_vqgan import PixelTokenizer
from modules.tokenizers.official import from_official, read_official
from modules.tokenizers.one_d_piece import OneDPiece, OneDPieceConfig
from modules.tokenizers.quantizer import Quantizer
from trainers import codec, convert, unpickle
from trainers.compression.quality import quality
from trainers.compression.rivals import attempts, best_within
from trainers.data.photographs import PhotographDataModule, photographs, spread
from trainers.fit import main as fit
from trainers.losses import laplacian_l1
from trainers.tokenizer import TokenizerModule, draw_length

ROOT = Path(__file__).parent.parent
TINY: dict = {"image_size": 32, "patch": 8, "tokens": 24, "width": 32, "heads": 2}
TINY |= {"encoder_layers": 1, "decoder_layers": 1, "codes": 64, "code_width": 4, "head": "pixels"}


def tiny(seed: int = 0, **overrides) -> OneDPiece:
    torch.manual_seed(seed)
    return OneDPiece(**{**TINY, **overrides}).eval()


def picture(seed: int, width: int = 32, height: int = 32) -> Image.Image:
    grid = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def tokenizer() -> OneDPiece:
    return tiny()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.array(picture(i))).permute(2, 0, 1) / 255 for i in range(3)])


# Rows and prefixes


def test_every_prefix_is_a_picture_and_the_codes_matter(tokenizer, images):
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
def test_a_row_of_another_length_is_refused(tokenizer, length):
    with pytest.raises(PruneZooError, match=f"length={length} .* 1 to 24"):
        tokenizer.decode(torch.zeros(1, length, dtype=torch.long))


def test_a_code_beyond_the_codebook_and_a_picture_of_another_size_are_refused(tokenizer):
    with pytest.raises(PruneZooError, match="0 to 63"):
        tokenizer.decode(torch.tensor([[64]]))
    with pytest.raises(PruneZooError, match=r"\(B, 3, 32, 32\)"):
        tokenizer.encode(torch.zeros(1, 3, 16, 16))


def test_the_decoder_reads_no_more_than_the_prefix(tokenizer, images):
    """In training too: a gradient at length 5 reaches the codes of the first five tokens only."""
    model = tiny().train()
    seen = []
    model.decoder.decoder_embed.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    painted = model(images, 5)
    assert seen == [5] and painted.codes.shape == (3, 24)
    assert painted.loss > 0, "the quantiser's loss is over the whole row"


def test_before_training_codes_say_what_is_near(images):
    """The start that makes small models learn quickly: a change in one corner moves the tokens that are there."""
    model = tiny(tokens=64, code_width=8, width=64)
    changed = images[:1].clone()
    changed[..., 24:, 24:] = 1 - changed[..., 24:, 24:]
    with torch.no_grad():
        rows = [F.normalize(model.encoder(x, model.latent_tokens), dim=-1) for x in (images[:1], changed)]
    moved = (rows[0] - rows[1]).norm(dim=-1)[0]
    places = torch.quasirandom.SobolEngine(2).fast_forward(1).draw(64)
    near, far = ((places > 0.75).all(-1)), ((places < 0.5).all(-1))
    assert moved[near].mean() > 3 * moved[far].mean() > 0


def test_lengths_are_drawn_alike():
    torch.manual_seed(0)
    drawn = torch.tensor([draw_length(8) for _ in range(4000)])
    assert torch.bincount(drawn, minlength=9)[1:].min() > 400 and drawn.min() == 1 and drawn.max() == 8


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


# The file


@pytest.mark.parametrize("size", [13, 20, 29, 30, 31, 64])
def test_a_file_has_exactly_the_bytes_asked_for(tokenizer, size):
    data = tokenizer.compress(picture(1, 50, 40), size)
    assert len(data) == size
    painted = tokenizer.decompress(data)
    assert painted.size == (50, 40)
    row = container.unpack(data, 6, tokenizer.fingerprint)
    assert len(row.codes) == min((size - 12) * 8 // 6, 24)


def test_what_is_read_is_what_was_written(tokenizer, images):
    square = picture(2)
    data = tokenizer.compress(square, 30)
    codes = tokenizer.encode(torch.from_numpy(np.array(square)).permute(2, 0, 1)[None] / 255)
    assert container.unpack(data, 6, tokenizer.fingerprint).codes == codes[0].tolist()
    wanted = (tokenizer.decode(codes)[0].permute(1, 2, 0) * 255).round().byte().numpy()
    assert np.array_equal(np.array(tokenizer.decompress(data)), wanted)


@pytest.mark.parametrize("bits", [1, 5, 8, 12, 16])
def test_codes_of_any_bits_come_back(bits):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, 256).tolist()
    size = 12 + -(-256 * bits // 8)
    data = container.pack(container.Row(codes, 65536, 1, 7), bits, size)
    row = container.unpack(data, bits, 7)
    assert (row.codes, row.width, row.height, len(data)) == (codes, 65536, 1, size)


def test_every_damage_is_an_error(tokenizer):
    data = tokenizer.compress(picture(3), 32)
    for length in range(len(data)):
        with pytest.raises(PruneZooError, match=r"cut|not a One-D-Piece file"):
            tokenizer.decompress(data[:length])
    for place in range(len(data)):
        broken = bytearray(data)
        broken[place] ^= 0x10
        with pytest.raises(PruneZooError):
            tokenizer.decompress(bytes(broken))


def test_errors_of_files_say_what_is_wrong(tokenizer):
    data = tokenizer.compress(picture(3), 32)
    with pytest.raises(PruneZooError, match="version 2, this release reads 1"):
        tokenizer.decompress(data[:2] + b"\x02" + data[3:])
    with pytest.raises(PruneZooError, match="another tokenizer"):
        tiny(seed=5).decompress(data)
    with pytest.raises(PruneZooError, match="corrupt"):
        tokenizer.decompress(data[:-1] + b"\x01")
    with pytest.raises(PruneZooError, match="12 bytes are too few: header and one code take 13"):
        tokenizer.compress(picture(3), 12)


# Saving


def test_saved_and_loaded_gives_the_same_bits(tokenizer, images, tmp_path):
    loaded = OneDPiece.from_pretrained(tokenizer.save_pretrained(tmp_path))
    assert not loaded.training and loaded.config == tokenizer.config
    assert torch.equal(loaded.decode(loaded.encode(images)), tokenizer.decode(tokenizer.encode(images)))
    with pytest.raises(PruneZooError, match="one_d_piece"):
        AutoPruner.from_pretrained(tmp_path)  # no pruner


def test_a_half_precision_tokenizer_reads_its_own_files(tmp_path):
    tokenizer = OneDPiece.from_pretrained(tiny().bfloat16().save_pretrained(tmp_path))
    assert tokenizer.latent_tokens.dtype == torch.bfloat16
    data = tokenizer.compress(picture(1), 30)
    assert tokenizer.float().decompress(data).size == (32, 32), "the codebook is the same in any type"


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"patch": 7}, "patch=7"),
        ({"codes": 100}, "codes=100"),
        ({"tokens": 257}, "tokens=257"),
        ({"head": "words"}, "head='words'"),
        ({"head": "codes"}, "needs patch=16"),
        ({"width": 30}, "width=30"),
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


# Published layouts


def published(head: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors with the names and shapes of the published code: width 64, 2 layers, patch 16, a 2 x 2 grid."""
    torch.manual_seed(seed)
    width, codes, code_width, tokens, grid, patch = 64, 32, 6, 10, 2, 16
    shapes: dict[str, tuple[int, ...]] = {
        "latent_tokens": (tokens, width),
        "quantize.embedding.weight": (codes, code_width),
        "encoder.patch_embed.weight": (width, 3, patch, patch),
        "encoder.patch_embed.bias": (width,),
        "encoder.conv_out.weight": (code_width, width, 1, 1),
        "encoder.conv_out.bias": (code_width,),
        "decoder.decoder_embed.weight": (width, code_width),
        "decoder.decoder_embed.bias": (width,),
        "decoder.mask_token": (1, 1, width),
    }
    for part in ("encoder", "decoder"):
        shapes |= {
            f"{part}.class_embedding": (1, width),
            f"{part}.positional_embedding": (grid * grid + 1, width),
            f"{part}.latent_token_positional_embedding": (tokens, width),
        }
        for norm in ("ln_pre", "ln_post", *(f"transformer.{i}.ln_{j}" for i in range(2) for j in (1, 2))):
            shapes |= {f"{part}.{norm}.weight": (width,), f"{part}.{norm}.bias": (width,)}
        for layer in (f"{part}.transformer.{i}" for i in range(2)):
            shapes |= {
                f"{layer}.attn.in_proj_weight": (3 * width, width),
                f"{layer}.attn.in_proj_bias": (3 * width,),
                f"{layer}.attn.out_proj.weight": (width, width),
                f"{layer}.attn.out_proj.bias": (width,),
                f"{layer}.mlp.c_fc.weight": (4 * width, width),
                f"{layer}.mlp.c_fc.bias": (4 * width,),
                f"{layer}.mlp.c_proj.weight": (width, 4 * width),
                f"{layer}.mlp.c_proj.bias": (width,),
            }
    if head == "codes":
        shapes |= {
            "decoder.ffn.0.weight": (2 * width, width, 1, 1),
            "decoder.ffn.0.bias": (2 * width,),
            "decoder.ffn.2.weight": (1024, 2 * width, 1, 1),
            "decoder.ffn.2.bias": (1024,),
            "pixel_quantize.embedding.weight": (1024, 256),
        }
    else:
        shapes |= {
            "decoder.ffn.0.weight": (3 * patch * patch, width, 1, 1),
            "decoder.ffn.0.bias": (3 * patch * patch,),
            "decoder.conv_out.weight": (3, 3, 3, 3),
            "decoder.conv_out.bias": (3,),
        }
    state = {name: 0.3 * torch.randn(shape) for name, shape in shapes.items()}
    if head == "codes":
        state |= {f"pixel_decoder.{name}": value for name, value in PixelTokenizer().decoder.state_dict().items()}
    return state


def attend(state, layer, x):
    """A published block: pre-norm attention of one head, then the feed-forward layer."""
    width = x.shape[-1]
    norm = F.layer_norm(x, (width,), state[f"{layer}.ln_1.weight"], state[f"{layer}.ln_1.bias"])
    q, k, v = F.linear(norm, state[f"{layer}.attn.in_proj_weight"], state[f"{layer}.attn.in_proj_bias"]).chunk(3, -1)
    mixed = (q @ k.transpose(1, 2) * width**-0.5).softmax(-1) @ v
    x = x + F.linear(mixed, state[f"{layer}.attn.out_proj.weight"], state[f"{layer}.attn.out_proj.bias"])
    norm = F.layer_norm(x, (width,), state[f"{layer}.ln_2.weight"], state[f"{layer}.ln_2.bias"])
    wide = F.gelu(F.linear(norm, state[f"{layer}.mlp.c_fc.weight"], state[f"{layer}.mlp.c_fc.bias"]))
    return x + F.linear(wide, state[f"{layer}.mlp.c_proj.weight"], state[f"{layer}.mlp.c_proj.bias"])


def norm_of(state, name, x):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def published_encode(state, images, legacy):
    """Codes, worked out from the published names by their own shapes."""
    patches = F.conv2d(images, state["encoder.patch_embed.weight"], state["encoder.patch_embed.bias"], stride=16)
    patches = patches.flatten(2).transpose(1, 2)
    rows, width = len(images), patches.shape[-1]
    x = torch.cat([state["encoder.class_embedding"].expand(rows, 1, -1), patches], 1)
    x = x + state["encoder.positional_embedding"]
    asked = state["latent_tokens"] + state["encoder.latent_token_positional_embedding"]
    x = norm_of(state, "encoder.ln_pre", torch.cat([x, asked.expand(rows, -1, -1)], 1))
    for i in range(2):
        x = attend(state, f"encoder.transformer.{i}", x)
    x = norm_of(state, "encoder.ln_post", x[:, -len(asked) :])
    x = x.reshape(rows, width, len(asked), 1) if legacy else x.transpose(1, 2)[..., None]
    z = F.conv2d(x, state["encoder.conv_out.weight"], state["encoder.conv_out.bias"])[..., 0].transpose(1, 2)
    book = F.normalize(state["quantize.embedding.weight"], dim=-1)
    return torch.cdist(F.normalize(z, dim=-1), book.expand(rows, -1, -1)).argmin(-1)


def published_decode(state, codes):
    """What the head gives, worked out from the published names."""
    book = F.normalize(state["quantize.embedding.weight"], dim=-1)
    read = F.linear(book[codes], state["decoder.decoder_embed.weight"], state["decoder.decoder_embed.bias"])
    read = read + state["decoder.latent_token_positional_embedding"][: codes.shape[1]]
    blank = torch.cat([state["decoder.class_embedding"][None], state["decoder.mask_token"].expand(1, 4, -1)], 1)
    blank = (blank + state["decoder.positional_embedding"]).expand(len(codes), -1, -1)
    x = norm_of(state, "decoder.ln_pre", torch.cat([blank, read], 1))
    for i in range(2):
        x = attend(state, f"decoder.transformer.{i}", x)
    x = norm_of(state, "decoder.ln_post", x[:, 1:5]).transpose(1, 2).unflatten(2, (2, 2))
    x = F.conv2d(x, state["decoder.ffn.0.weight"], state["decoder.ffn.0.bias"])
    if "decoder.ffn.2.weight" in state:
        return F.conv2d(x.tanh(), state["decoder.ffn.2.weight"], state["decoder.ffn.2.bias"])
    rows = [[x[:, :, r, c].reshape(-1, 16, 16, 3) for c in range(2)] for r in range(2)]
    pixels = torch.cat([torch.cat(row, dim=2) for row in rows], dim=1).permute(0, 3, 1, 2)
    return F.conv2d(pixels, state["decoder.conv_out.weight"], state["decoder.conv_out.bias"], padding=1)


@pytest.mark.parametrize(("head", "legacy"), [("codes", True), ("codes", False), ("pixels", False), ("pixels", True)])
def test_published_layouts_are_read(head, legacy, tmp_path):
    state, images = published(head), torch.rand(2, 3, 32, 32)
    save_file(state, tmp_path / "weights.safetensors")
    tokenizer = read_official(tmp_path / "weights.safetensors", legacy)
    assert tokenizer.config.head == head and tokenizer.config.heads == 1 and not tokenizer.training
    codes = published_encode(state, images, legacy)
    assert not torch.equal(codes, published_encode(state, images, not legacy)), "the reshape matters"
    assert torch.equal(tokenizer.encode(images), codes)
    with torch.no_grad():
        quantized = tokenizer.quantize.codebook[codes[:, :7]]
        torch.testing.assert_close(tokenizer.decoder(quantized), published_decode(state, codes[:, :7]))
    assert tokenizer.decode(codes[:, :7]).isfinite().all()


def test_the_reshape_follows_the_head_unless_told():
    assert from_official(published("codes")).config.legacy_reshape
    assert not from_official(published("pixels")).config.legacy_reshape


def test_a_state_dict_of_another_layout_is_refused():
    whole = published("pixels")
    with pytest.raises(PruneZooError, match="'latent_tokens' is missing"):
        from_official({k: v for k, v in whole.items() if k != "latent_tokens"})
    with pytest.raises(PruneZooError, match=r"no tensor for 'decoder.ffn.0.bias'"):
        from_official({k: v for k, v in whole.items() if k != "decoder.ffn.0.bias"})
    with pytest.raises(PruneZooError, match=r"unexpected tensor 'discriminator.weight'"):
        from_official({**whole, "discriminator.weight": torch.zeros(1)})
    with pytest.raises(PruneZooError, match=r"'encoder.conv_out.bias' has shape \(7,\)"):
        from_official({**whole, "encoder.conv_out.bias": torch.zeros(7)})


def test_a_pickle_is_read_only_after_consent(tmp_path, monkeypatch, capsys):
    source, target = tmp_path / "weights.bin", tmp_path / "weights.safetensors"
    torch.save(published("pixels"), source)
    with pytest.raises(SystemExit):
        unpickle.main([str(source), str(target)])  # nobody there to ask
    assert "was not read" in capsys.readouterr().err and not target.exists()
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _: "y")
    assert unpickle.main([str(source), str(target)]) == 0
    assert convert.main([str(target), str(tmp_path / "out")]) == 0
    images = torch.rand(2, 3, 32, 32)
    wanted = from_official(published("pixels")).encode(images)
    assert torch.equal(OneDPiece.from_pretrained(tmp_path / "out").encode(images), wanted)


class Bomb:
    def __reduce__(self):
        return (print, ("boom",))


def test_a_pickle_with_code_in_it_is_refused(tmp_path, capsys):
    torch.save({"weight": Bomb()}, tmp_path / "weights.bin")
    with pytest.raises(SystemExit):
        unpickle.main([str(tmp_path / "weights.bin"), str(tmp_path / "out.safetensors"), "--yes"])
    printed = capsys.readouterr()
    assert "weights-only loader" in printed.err and "boom" not in printed.out


# Photographs


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for number in range(60):
        (folder / str(number % 3)).mkdir(exist_ok=True)
        picture(number, 48, 40).save(folder / str(number % 3) / f"{number}.png")
    return folder


def test_the_splits_are_disjoint_and_go_by_content(folder, tmp_path):
    parts = [photographs(folder, split) for split in ("train", "validation", "test")]
    assert sum(map(len, parts)) == 60 == len({path for part in parts for path in part})
    assert len(parts[0]) > len(parts[1]) > 0 < len(parts[2])
    held_out = parts[2][0]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "renamed.png").write_bytes(held_out.read_bytes())
    assert [path.name for path in photographs(tmp_path, "test")] == ["renamed.png"]
    with pytest.raises(PruneZooError, match="no readable picture of the train split"):
        photographs(tmp_path, "train")


def test_a_limit_takes_photographs_evenly():
    paths = [Path(str(number)) for number in range(10)]
    assert [path.name for path in spread(paths, 4)] == ["0", "2", "5", "7"]
    assert spread(paths, 99) == paths


def test_broken_pictures_are_counted_and_left_out(folder, tmp_path, caplog):
    for number in range(30):
        picture(number).save(tmp_path / f"{number}.png")
    (tmp_path / "words.jpg").write_text("no picture")
    whole = (tmp_path / "7.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with caplog.at_level("INFO"):
        found = photographs(tmp_path, "train")
    assert {"words.jpg", "cut.png"}.isdisjoint(path.name for path in found)
    assert "2 of 32 pictures cannot be read and are left out: cut.png, words.jpg" in caplog.text


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    with pytest.raises(PruneZooError, match="not a folder"):
        photographs(tmp_path / "nowhere", "train")
    with pytest.raises(PruneZooError, match="split 'tset'"):
        photographs(tmp_path, "tset")
    with pytest.raises(PruneZooError, match="batch_size"):
        PhotographDataModule(str(tmp_path), 32, batch_size=0)


# Measuring


def test_the_codec_command_writes_files_of_the_size_asked_for(tmp_path, capsys):
    folder = str(tiny().save_pretrained(tmp_path / "tokenizer"))
    picture(4, 60, 50).save(tmp_path / "in.png")
    names = [str(tmp_path / name) for name in ("in.png", "small.1p", "out.png")]
    assert codec.main(["compress", *names[:2], "--bytes", "21", "--tokenizer", folder]) == 0
    assert Path(names[1]).stat().st_size == 21
    assert codec.main(["decompress", *names[1:], "--tokenizer", folder]) == 0
    with Image.open(names[2]) as painted:
        assert painted.size == (60, 50)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        codec.main(["decompress", names[0], names[2], "--tokenizer", folder])
    assert "in.png: not a One-D-Piece file" in capsys.readouterr().err


def test_rivals_keep_to_their_bytes_and_get_better_with_them():
    found = {name: attempts(name, picture(5, 128, 128)) for name in ("jpeg", "webp")}
    for name, tried in found.items():
        best = [best_within(tried, size) for size in (500, 1000, 4000)]
        assert all(a.psnr <= b.psnr and a.size <= size for a, b, size in zip(best, best[1:], (500, 1000), strict=False))
        assert best_within(tried, 20) is None and best[0].picture.size == (128, 128), name


def test_quality_is_one_for_the_picture_itself_and_falls(images):
    large = F.interpolate(images, size=(48, 48), mode="bilinear")
    noisy = [(large + spread * torch.randn_like(large)).clamp(0, 1) for spread in (0.0, 0.05, 0.2)]
    same, little, much = (quality(painted, large) for painted in noisy)
    for name in ("ssim", "ms_ssim", "vif"):
        assert same[name] == pytest.approx(1.0, abs=1e-4)
        assert (little[name] > much[name]).all() and (little[name] < 1).all()
    assert little["psnr"][0] == pytest.approx(-10 * float((noisy[1][0] - large[0]).square().mean().log10()), abs=1e-3)


def test_measuring_writes_rows_pairs_and_figures(folder, tmp_path):
    sizes = {"image_size": 48, "patch": 8}
    names = [str(tiny(seed, **sizes).save_pretrained(tmp_path / f"t{seed}")) for seed in range(2)]
    command = ["measure", "--tokenizer", *names, "--images", str(folder), "--limit", "3", "--length", "1", "24"]
    codec.main([*command, "--json", str(tmp_path / "m.json"), "--report", str(tmp_path / "report")])
    record = json.loads((tmp_path / "m.json").read_text())
    assert record["n"] == 3 and record["split"] == "test"
    rows = {(row["codec"], row["bytes"]): row for row in record["rows"]}
    assert set(rows) == {(codec, size) for codec in (*names, "jpeg", "webp") for size in (13, 30)}
    assert rows[names[0], 30]["tokens"] == 24 and rows[names[0], 30]["psnr"] > 0
    assert rows["jpeg", 30]["fits"] == 0 and rows["jpeg", 30]["psnr"] is None
    pairs = [pair for pair in record["paired"] if pair["rival"] == names[1] and pair["metric"] == "psnr"]
    assert [pair["bytes"] for pair in pairs] == [13, 30]
    wanted = rows[names[0], 30]["psnr"] - rows[names[1], 30]["psnr"]
    assert pairs[1]["difference"] == pytest.approx(wanted, abs=1e-4)
    assert pairs[1]["ci"][0] <= pairs[1]["difference"] <= pairs[1]["ci"][1]
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"curves.png", "pictures.png"}


def test_speed_is_measured_beside_the_bare_vit(tmp_path, capsys):
    folder = str(tiny().save_pretrained(tmp_path / "tokenizer"))
    command = ["speed", "--tokenizer", folder, "--batch", "2", "--repeats", "1", "--device", "cpu"]
    codec.main([*command, "--json", str(tmp_path / "s.json")])
    rows = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert {(row["dtype"], row["part"]) for row in rows} == {
        (dtype, part) for dtype in ("float32", "bfloat16") for part in ("bare ViT", "encode", "decode")
    }
    assert all(row["per_second"] > 0 and row["ratio"] > 0 for row in rows)


# Training


def words(folder: Path, out: Path) -> list[str]:
    return [
        f"--config={ROOT / 'configs' / 'one_d_piece_tiny.yaml'}",
        *(f"--model.tokenizer.config.{key}={value}" for key, value in TINY.items()),
        "--model.measure=[1,6,24]",
        f"--data.images={folder}",
        "--data.size=32",
        "--data.batch_size=8",
        "--data.workers=0",
        "--trainer.precision=32",
        "--trainer.accelerator=cpu",
        "--trainer.val_check_interval=null",
        "--trainer.check_val_every_n_epoch=40",
        "--trainer.max_steps=400",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--model.lr=0.004",
        f"--out={out}",
    ]


def mean_error(tokenizer: OneDPiece, images: torch.Tensor, length: int) -> float:
    return float((tokenizer.decode(tokenizer.encode(images)[:, :length]) - images).square().mean())


def test_training_learns_more_than_the_colour_of_each_picture(folder, images, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fit"])
    fit(words(folder, tmp_path))
    trained = OneDPiece.from_pretrained(tmp_path)
    plain = float((images - images.mean((2, 3), keepdim=True)).square().mean())
    assert mean_error(trained, images, 24) < 0.9 * plain
    assert mean_error(trained, images, 24) < mean_error(trained, images, 6) < mean_error(trained, images, 1)
    moved = torch.load(tmp_path / "training/checkpoints/last.ckpt", weights_only=False)
    assert {name.split(".")[0] for name in moved["state_dict"]} == {"tokenizer"}
    assert "val/psnr_6" in (tmp_path / "training/logs/version_0/metrics.csv").read_text()
    assert (tmp_path / "run.json").is_file()


def test_in_the_second_stage_only_the_decoder_gets_a_gradient(images, monkeypatch):
    for step, learning in ((0, {"encoder", "latent_tokens", "decoder"}), (8, {"decoder"})):
        module = TokenizerModule(tiny().train(), first_share=0.8, measure=(1,))
        module.total_steps = 10
        monkeypatch.setattr(TokenizerModule, "global_step", step)
        monkeypatch.setattr(module, "log", lambda *a, **k: None)
        monkeypatch.setattr(module, "log_dict", lambda *a, **k: None)
        before = module.tokenizer.quantize.codebook.clone()
        module.training_step(images, 0).backward()
        moved = {name.split(".")[0] for name, p in module.tokenizer.named_parameters() if p.grad is not None}
        assert moved == learning
        assert torch.equal(module.tokenizer.quantize.codebook, before) == (step == 8)


def test_the_first_stage_learns_the_codes_of_a_pixel_tokenizer(tmp_path, monkeypatch):
    torch.manual_seed(0)
    teacher = PixelTokenizer()
    save_file(teacher.state_dict(), tmp_path / "pixels.safetensors")
    sizes = {**TINY, "patch": 16, "head": "codes"}
    module = TokenizerModule(OneDPiece(**sizes), "codes", str(tmp_path / "pixels.safetensors"), measure=(1, 24))
    assert torch.equal(module.tokenizer.pixel_codes, teacher.quantize.embedding.weight)
    images = torch.rand(2, 3, 32, 32)
    codes = teacher.encode(images)
    assert codes.shape == (2, 2, 2) and teacher.decode(codes).shape == images.shape
    monkeypatch.setattr(TokenizerModule, "global_step", 0)
    logged: dict = {}
    monkeypatch.setattr(module, "log", lambda *a, **k: None)
    monkeypatch.setattr(module, "log_dict", lambda values, **k: logged.update(values))
    module.total_steps = 10
    module.training_step(images, 0).backward()
    assert logged["train/codes"] > 1 and all(p.grad is None for p in module.tokenizer.pixel_decoder.parameters())
    monkeypatch.setattr(TokenizerModule, "global_step", 9)
    module.training_step(images, 0).backward()
    assert all(p.grad is not None for p in module.tokenizer.pixel_decoder.parameters())
    assert "teacher" not in {name.split(".")[0] for name in module.state_dict()}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"first": "codes"}, "first='codes'"),
        ({"first_share": 1.5}, "first_share=1.5"),
        ({"measure": (1, 99)}, "length=99"),
    ],
)
def test_a_mistake_in_the_recipe_is_named(wrong, named):
    with pytest.raises(PruneZooError, match=named):
        TokenizerModule(tiny(), **wrong)


def test_learning_codes_needs_a_pixel_tokenizer(tmp_path):
    for given, named in ((None, "needs pixel_tokenizer"), (str(tmp_path / "no.safetensors"), "is not a file")):
        with pytest.raises(PruneZooError, match=named):
            TokenizerModule(OneDPiece(**{**TINY, "patch": 16, "head": "codes"}), "codes", given, measure=(1,))


def test_the_pyramid_weighs_edges_of_every_size():
    flat = torch.zeros(1, 3, 32, 32)
    assert laplacian_l1(flat, flat) == 0
    torch.testing.assert_close(laplacian_l1(flat, flat + 0.5), torch.tensor(0.5))  # only the small picture differs
    stripes = flat.clone()
    stripes[..., ::2] = 1.0
    torch.testing.assert_close(
        laplacian_l1(flat, stripes), torch.tensor(1.0)
    )  # half at the finest level, half its mean
    wide = flat.clone()
    wide[..., :16] = 1.0
    assert 0 < laplacian_l1(flat, wide) < laplacian_l1(flat, stripes)


def test_config_of_the_module_is_that_of_the_paper_by_default():
    c = OneDPieceConfig()
    assert (c.image_size, c.patch, c.tokens, c.codes, c.code_width, c.width) == (256, 16, 256, 4096, 12, 512)
