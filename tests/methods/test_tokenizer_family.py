"""What holds of every tokenizer: prefixes, files, saved folders, gradients, refusals; found through the registry."""

import json
from itertools import pairwise

import pytest
import torch
from tiny_tokenizer import FAMILY, member, picture, pictures, text_for

from prunezoo import PruneZooError, build_pruner
from prunezoo.tokenizers.base import Text, list_tokenizers, load_tokenizer, tokenizer_class

NAMES = list_tokenizers()


def test_every_tokenizer_is_tested_here():
    assert set(NAMES) == set(FAMILY)
    with pytest.raises(PruneZooError, match="did you mean 'textok'"):
        tokenizer_class("texttok")


@pytest.mark.parametrize("name", NAMES)
def test_every_prefix_is_a_picture(name):
    tokenizer, images = member(name), pictures()
    text = text_for(tokenizer, 3)
    codes = tokenizer.encode(images, text)
    lengths = range(1, tokenizer.config.tokens + 1)
    assert codes.dtype == torch.long and codes.shape == (3, tokenizer.numbers(lengths[-1]))
    assert int(codes.min()) >= 0 and int(codes.max()) < 1 << tokenizer.config.bits
    assert len({tuple(row) for row in codes.tolist()}) == 3, "different pictures have different codes"
    painted = [tokenizer.decode(codes[:, : tokenizer.numbers(k)], text) for k in lengths]
    assert all(p.shape == images.shape and p.min() >= 0 and p.max() <= 1 for p in painted)
    assert all(not torch.equal(a, b) for a, b in pairwise(painted)), "every token is read"


@pytest.mark.parametrize("name", NAMES)
def test_pictures_of_a_batch_do_not_mix(name):
    tokenizer, images = member(name), pictures()
    text = text_for(tokenizer, 3)
    alone = None if text is None else Text(text.embeddings[1:2], text.valid[1:2])
    assert torch.equal(tokenizer.encode(images, text)[1:2], tokenizer.encode(images[1:2], alone))


@pytest.mark.parametrize("name", NAMES)
def test_files_have_the_bytes_asked_for_and_come_back(name):
    tokenizer = member(name)
    text = text_for(tokenizer, 1)
    whole = tokenizer.file_size(tokenizer.config.tokens)
    for size in (tokenizer.file_size(1), whole - 1, whole, whole + 9):
        data = tokenizer.compress(picture(1, 50, 40), size, text)
        assert len(data) == size and tokenizer.decompress(data, text).size == (50, 40)
    with pytest.raises(PruneZooError, match="too few"):
        tokenizer.compress(picture(1), tokenizer.file_size(1) - 1, text)
    for length in range(len(data) - 9):
        with pytest.raises(PruneZooError, match=r"cut|not a tokenizer's file"):
            tokenizer.decompress(data[:length], text)
    with pytest.raises(PruneZooError, match="another tokenizer"):
        member(name, seed=5).decompress(data, text)


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_is_painted_again_as_its_file_paints_it(name):
    tokenizer, image = member(name), picture(1, 50, 40)
    text = text_for(tokenizer, 1)
    for length in (1, tokenizer.config.tokens):
        size = tokenizer.file_size(length)
        assert tokenizer.length_within(size - 1) < length <= tokenizer.length_within(size)
        through_a_file = tokenizer.decompress(tokenizer.compress(image, size, text), text)
        painted = tokenizer.repaint(image, tokenizer.length_within(size), text)
        assert painted.size == (50, 40) and painted.tobytes() == through_a_file.tobytes()
    assert tokenizer.length_within(10**6) == tokenizer.config.tokens
    for length in (0, tokenizer.config.tokens + 1):
        with pytest.raises(PruneZooError, match=f"length={length} is out of range"):
            tokenizer.repaint(image, length, text)


WIDTHS = {"one_d_piece": 4, "instella": 32, "textok": 3, "tokenflow": 10}


@pytest.mark.parametrize("name", NAMES)
def test_codes_stand_for_vectors(name):
    tokenizer, images = member(name), pictures()
    codes = tokenizer.encode(images, text_for(tokenizer, 3))
    whole = tokenizer.vectors(codes)
    assert whole.shape[::2] == (3, WIDTHS[name]) and whole.std(0).max() > 0
    first = tokenizer.vectors(codes[:, : tokenizer.numbers(1)])
    assert first.shape == (3, 1, WIDTHS[name])
    if name == "tokenflow":  # one cell is over all of them
        torch.testing.assert_close(first[:, 0], tokenizer.quantize.codebook[codes[:, 0]])
        torch.testing.assert_close(whole, tokenizer.gather(codes).flatten(2).transpose(1, 2))
    else:
        torch.testing.assert_close(first, whole[:, :1])


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_gives_the_same_bits(name, tmp_path):
    tokenizer, images = member(name), pictures()
    text = text_for(tokenizer, 3)
    loaded = load_tokenizer(tokenizer.save_pretrained(tmp_path))
    assert type(loaded) is type(tokenizer) and not loaded.training and loaded.config == tokenizer.config
    codes = tokenizer.encode(images, text)
    assert torch.equal(loaded.encode(images, text), codes)
    assert torch.equal(loaded.decode(codes, text), tokenizer.decode(codes, text))
    stored = json.loads((tmp_path / "config.json").read_text())
    for wrong in ({"image_size": 2**40}, {"patch": 0}, {"patch": 2**62}, {"image_size": -8}, {"image_size": 1.5}):
        (tmp_path / "config.json").write_text(json.dumps({**stored, "config": {**stored["config"], **wrong}}))
        with pytest.raises(PruneZooError):
            load_tokenizer(tmp_path)
    with pytest.raises(PruneZooError, match="unknown tokenizer 'random'"):
        load_tokenizer(build_pruner("random").save_pretrained(tmp_path / "pruner"))


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns(name):
    tokenizer, images = member(name).train(), pictures()
    made = tokenizer(images, tokenizer.config.tokens, text_for(tokenizer, 3))
    loss = (made.output - images).square().mean() + made.loss
    if made.meaning is not None:
        loss = loss + (made.meaning - torch.randn_like(made.meaning)).square().mean()
    loss.backward()
    unmoved = [n for n, p in tokenizer.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert not unmoved


@pytest.mark.parametrize("name", NAMES)
def test_the_decoder_reads_no_more_than_the_prefix(name):
    """In training: whatever is behind the prefix, the picture is the same."""
    tokenizer, images = member(name), pictures()
    text = text_for(tokenizer, 3)
    length = max(tokenizer.config.tokens // 2, 1)
    codes = tokenizer.encode(images, text)
    painted = tokenizer(images, length, text).output.clamp(0, 1)
    torch.testing.assert_close(painted, tokenizer.decode(codes[:, : tokenizer.numbers(length)], text))


@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_coded_or_painted_is_refused(name):
    tokenizer = member(name)
    text, tokens = text_for(tokenizer, 1), tokenizer.config.tokens
    for count in (0, tokenizer.numbers(tokens) + 1):
        with pytest.raises(PruneZooError, match=r"out of range|no whole tokens"):
            tokenizer.decode(torch.zeros(1, count, dtype=torch.long), text)
    for code in (-1, 1 << tokenizer.config.bits):
        with pytest.raises(PruneZooError, match="codes must lie in 0 to"):
            tokenizer.decode(torch.full((1, tokenizer.numbers(1)), code), text)
    with pytest.raises(PruneZooError, match=r"\(B, 3, 32, 32\)"):
        tokenizer.encode(torch.zeros(1, 3, 16, 16), text)
    other = None if tokenizer.reads_text else Text(torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(PruneZooError, match=r"reads (a|no) text"):
        tokenizer.encode(pictures()[:1], other)


@pytest.mark.parametrize("name", NAMES)
def test_the_bare_transformer_sees_the_patches(name):
    tokenizer, images = member(name), pictures()
    with torch.no_grad():
        seen = tokenizer.bare(images)
    assert len(seen) == 3 and not torch.equal(seen[0], seen[1])
