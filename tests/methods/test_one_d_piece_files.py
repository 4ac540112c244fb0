"""Files of One-D-Piece: as many bytes as were asked for, every damage is found; and a tokenizer saved and loaded."""

import numpy as np
import pytest
import torch
from tiny_tokenizer import picture, pictures, tiny

from prunezoo import AutoPruner, OneDPiece, PruneZooError
from prunezoo.tokenizers import container


@pytest.mark.parametrize("size", [13, 20, 29, 30, 31, 64])
def test_a_file_has_exactly_the_bytes_asked_for(size):
    tokenizer = tiny()
    data = tokenizer.compress(picture(1, 50, 40), size)
    assert len(data) == size
    painted = tokenizer.decompress(data)
    assert painted.size == (50, 40)
    row = container.unpack(data, 6, tokenizer.fingerprint)
    assert len(row.codes) == min((size - 12) * 8 // 6, 24)


def test_what_is_read_is_what_was_written():
    tokenizer = tiny()
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


def test_every_damage_is_an_error():
    tokenizer = tiny()
    data = tokenizer.compress(picture(3), 32)
    for length in range(len(data)):
        with pytest.raises(PruneZooError, match=r"cut|not a tokenizer's file"):
            tokenizer.decompress(data[:length])
    for place in range(len(data)):
        broken = bytearray(data)
        broken[place] ^= 0x10
        with pytest.raises(PruneZooError):
            tokenizer.decompress(bytes(broken))


def test_errors_of_files_say_what_is_wrong():
    tokenizer = tiny()
    data = tokenizer.compress(picture(3), 32)
    with pytest.raises(PruneZooError, match="version 2, this release reads 1"):
        tokenizer.decompress(data[:2] + b"\x02" + data[3:])
    with pytest.raises(PruneZooError, match="another tokenizer"):
        tiny(seed=5).decompress(data)
    with pytest.raises(PruneZooError, match="corrupt"):
        tokenizer.decompress(data[:-1] + b"\x01")
    with pytest.raises(PruneZooError, match="12 bytes are too few: header and one code take 13"):
        tokenizer.compress(picture(3), 12)


def test_saved_and_loaded_gives_the_same_bits(tmp_path):
    tokenizer, images = tiny(), pictures()
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
