"""The file that a compressed picture lies in: a header of 12 bytes, a row of codes, zeros up to the size asked for.

| bytes | what |
|---|---|
| 0-1 | ``1P`` |
| 2 | version of this layout, 1 |
| 3-4, 5-6 | width and height of the picture, pixels less one, big-endian |
| 7 | tokens less one; of most tokenizers a token is one code |
| 8-9 | fingerprint of the tokenizer, big-endian |
| 10-11 | CRC-16 (CCITT) of all the other bytes, big-endian |
| 12- | the codes, each of the tokenizer's bits, most significant bit first, without gaps; then zeros |
"""

import binascii
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..core.bounds import MOST_PIXELS
from ..core.errors import PruneZooError

MAGIC, VERSION = b"1P", 1
HEADER = struct.Struct(">2sBHHBHH")
LONGEST_SIDE = 1 << 16


@dataclass(frozen=True)
class Row:
    """What a file says."""

    codes: list[int]
    width: int  # of the picture, pixels
    height: int
    fingerprint: int  # of the tokenizer, 16 bits


def pack(row: Row, bits: int, size: int, tokens: int | None = None) -> bytes:
    """A file of exactly ``size`` bytes.

    Args:
        row: As many codes as fit into the size.
        bits: Bits of a code, at most 16.
        size: Bytes.
        tokens: How many tokens the codes are, at most 256; None: each is one.

    Raises:
        PruneZooError: A side of the picture does not fit into the header, or it has more than MOST_PIXELS.
    """
    _check_size(row.width, row.height)
    places = np.arange(bits)[::-1]
    payload = np.packbits((np.array(row.codes)[:, None] >> places) & 1).tobytes()
    facts = (MAGIC, VERSION, row.width - 1, row.height - 1, (tokens or len(row.codes)) - 1, row.fingerprint)
    body = payload.ljust(size - HEADER.size, b"\0")
    return HEADER.pack(*facts, _checksum(HEADER.pack(*facts, 0) + body)) + body


def unpack(data: bytes, bits: int, fingerprint: int, numbers: Callable[[int], int] = int) -> Row:
    """What a file says.

    Args:
        data: The file.
        bits: Bits of a code.
        fingerprint: Of the tokenizer that is to paint it.
        numbers: How many codes so many tokens are; by default as many.

    Raises:
        PruneZooError: Not such a file, of a later version, cut, corrupt, written by another tokenizer, or of a
            picture of more than MOST_PIXELS.
    """
    if data[:2] != MAGIC:
        raise PruneZooError("not a tokenizer's file: it does not begin with '1P'")
    if len(data) < HEADER.size:
        raise PruneZooError(f"the file is cut: {len(data)} bytes, the header alone has {HEADER.size}")
    _, version, width, height, count, made_by, checksum = HEADER.unpack_from(data)
    if version != VERSION:
        raise PruneZooError(f"the file has layout version {version}, this release reads {VERSION}: use a newer one")
    length = numbers(count + 1)
    end = HEADER.size + -(-length * bits // 8)
    if len(data) < end and made_by == fingerprint:
        raise PruneZooError(f"the file is cut: {len(data)} bytes, {length} codes need {end}")
    if checksum != _checksum(data[: HEADER.size - 2] + b"\0\0" + data[HEADER.size :]):
        raise PruneZooError("the file is corrupt or cut: its checksum does not fit; fetch or write it again")
    if made_by != fingerprint:
        raise PruneZooError("the file was written by another tokenizer: read it with the one that wrote it")
    _check_size(width + 1, height + 1)
    stream = np.unpackbits(np.frombuffer(data[HEADER.size : end], np.uint8))[: length * bits].reshape(length, bits)
    codes = (stream.astype(np.int64) << np.arange(bits)[::-1]).sum(1)
    return Row(codes.tolist(), width + 1, height + 1, made_by)


def _check_size(width: int, height: int) -> None:
    """Refuse a picture that is too big to write, or to make from a few bytes."""
    if max(width, height) > LONGEST_SIDE:
        raise PruneZooError(f"a picture of {width} x {height} is too big: sides go up to {LONGEST_SIDE} pixels")
    if width * height > MOST_PIXELS:
        raise PruneZooError(f"a picture of {width} x {height} is too big: it may have up to {MOST_PIXELS:,} pixels")


def _checksum(data: bytes) -> int:
    return binascii.crc_hqx(data, 0xFFFF)
