"""Weights of One-D-Piece in their published layouts, against the arithmetic worked out by their names; and pickles."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from prunezoo import OneDPiece, PruneZooError
from prunezoo.tokenizers.maskgit_vqgan import PixelTokenizer
from prunezoo.tokenizers.official import from_official, read_official
from trainers.upkeep import convert, unpickle


def published(head: str, seed: int = 0, wide: int = 64) -> dict[str, torch.Tensor]:
    """Random tensors with the names and shapes of the published code: 2 layers, patch 16, a 2 x 2 grid.

    The encoder's width is 64, the decoder's ``wide``.
    """
    torch.manual_seed(seed)
    width, codes, code_width, tokens, grid, patch = 64, 1024, 6, 10, 2, 16
    shapes: dict[str, tuple[int, ...]] = {
        "latent_tokens": (tokens, width),
        "quantize.embedding.weight": (codes, code_width),
        "encoder.patch_embed.weight": (width, 3, patch, patch),
        "encoder.patch_embed.bias": (width,),
        "encoder.conv_out.weight": (code_width, width, 1, 1),
        "encoder.conv_out.bias": (code_width,),
        "decoder.decoder_embed.weight": (wide, code_width),
        "decoder.decoder_embed.bias": (wide,),
        "decoder.mask_token": (1, 1, wide),
    }
    for part, width in (("encoder", 64), ("decoder", wide)):
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
    state["quantize.embedding.weight"] *= torch.linspace(0.1, 3, codes)[:, None]  # so that lengths matter
    state["latent_tokens"] *= 3
    for name in state:  # biases of the last norm and map would make all tokens of a row the same
        state[name] *= 0.1 if name.endswith((".ln_post.bias", "conv_out.bias")) else 1.0
    if head == "codes":
        state |= {f"pixel_decoder.{name}": value for name, value in PixelTokenizer().decoder.state_dict().items()}
    return state


def attend(state, layer, x):
    """A published block: pre-norm attention of heads of 64 channels, then the feed-forward layer."""
    width = x.shape[-1]
    norm = F.layer_norm(x, (width,), state[f"{layer}.ln_1.weight"], state[f"{layer}.ln_1.bias"])
    q, k, v = F.linear(norm, state[f"{layer}.attn.in_proj_weight"], state[f"{layer}.attn.in_proj_bias"]).chunk(3, -1)
    q, k, v = (part.unflatten(-1, (-1, 64)).transpose(1, 2) for part in (q, k, v))
    mixed = ((q @ k.transpose(2, 3) / 8).softmax(-1) @ v).transpose(1, 2).flatten(2)
    x = x + F.linear(mixed, state[f"{layer}.attn.out_proj.weight"], state[f"{layer}.attn.out_proj.bias"])
    norm = F.layer_norm(x, (width,), state[f"{layer}.ln_2.weight"], state[f"{layer}.ln_2.bias"])
    wide = F.gelu(F.linear(norm, state[f"{layer}.mlp.c_fc.weight"], state[f"{layer}.mlp.c_fc.bias"]))
    return x + F.linear(wide, state[f"{layer}.mlp.c_proj.weight"], state[f"{layer}.mlp.c_proj.bias"])


def norm_of(state, name, x):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def at_length(values, unit):
    """As ``use_l2_norm`` says."""
    return F.normalize(values, dim=-1) if unit else values


def published_encode(state, images, legacy, unit):
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
    book = at_length(state["quantize.embedding.weight"], unit)
    return torch.cdist(at_length(z, unit), book.expand(rows, -1, -1)).argmin(-1)


def published_decode(state, codes, unit):
    """What the head gives, worked out from the published names."""
    book = at_length(state["quantize.embedding.weight"], unit)
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


@pytest.mark.parametrize(
    ("head", "legacy", "unit", "wide"),
    [
        ("codes", True, True, 64),  # One-D-Piece, and TiTok's first code
        ("codes", False, True, 64),
        ("codes", True, False, 128),
        ("pixels", False, False, 128),  # TiTok's later code
        ("pixels", False, False, 64),
        ("pixels", True, True, 64),
    ],
)
def test_published_layouts_are_read(head, legacy, unit, wide, tmp_path):
    """Of One-D-Piece, and of TiTok: ``use_l2_norm`` or not, the decoder as wide as the encoder or wider."""
    state, images = published(head, wide=wide), torch.rand(2, 3, 32, 32)
    images[0] /= 8  # a dark one
    save_file(state, tmp_path / "weights.safetensors")
    tokenizer = read_official(tmp_path / "weights.safetensors", legacy, unit)
    assert tokenizer.config.head == head and tokenizer.config.heads == 1 and not tokenizer.training
    assert tokenizer.config.decoder_size == (wide, wide // 64)
    codes = published_encode(state, images, legacy, unit)
    assert not torch.equal(*codes) and len(codes.unique()) > 1, "tokens and pictures differ"
    assert not torch.equal(codes, published_encode(state, images, not legacy, unit)), "the reshape matters"
    assert not torch.equal(codes, published_encode(state, images, legacy, not unit)), "the length matters"
    assert torch.equal(tokenizer.encode(images), codes)
    with torch.no_grad():
        quantized = tokenizer.quantize.codebook[codes[:, :7]]
        torch.testing.assert_close(tokenizer.decoder(quantized), published_decode(state, codes[:, :7], unit))
    assert tokenizer.decode(codes[:, :7]).isfinite().all()


def test_what_the_tensors_do_not_say_follows_the_head_unless_told():
    codes, pixels = from_official(published("codes")).config, from_official(published("pixels")).config
    assert codes.legacy_reshape and codes.unit_codes
    assert not pixels.legacy_reshape and not pixels.unit_codes


def test_the_command_is_told_what_the_tensors_do_not_say(tmp_path, capsys):
    state, images = published("pixels", wide=128), torch.rand(2, 3, 32, 32)
    save_file(state, tmp_path / "weights.safetensors")
    for unit, words in ((False, []), (True, ["--codes=unit", "--reshape=legacy"])):
        assert convert.main([str(tmp_path / "weights.safetensors"), str(tmp_path / "out"), *words]) == 0
        saved = OneDPiece.from_pretrained(tmp_path / "out")
        assert f"unit_codes={unit}" in capsys.readouterr().out
        assert torch.equal(saved.encode(images), published_encode(state, images, legacy=unit, unit=unit))


def test_titoks_other_tokenizers_are_refused():
    """The variational ones have no codes, the text-aware ones read a text: neither is a row of codes of a picture."""
    whole = published("pixels")
    variational = {name: value for name, value in whole.items() if not name.startswith("quantize.")}
    with pytest.raises(PruneZooError, match=r"tensor 'quantize.embedding.weight' is missing"):
        from_official(variational)
    with pytest.raises(PruneZooError, match=r"unexpected tensor 'decoder.text_guidance_proj.weight'"):
        from_official({**whole, "decoder.text_guidance_proj.weight": torch.zeros(64, 768)})


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
