"""What every tokenizer of pictures is: a row of codes, prefixes of it, and a file of as many bytes as asked for.

A row has N tokens in order; any prefix of it can be decoded. A token is one or more whole numbers, each of
``config.bits`` bits. Codes are these numbers, flat: ``(B, M)`` where M is ``numbers(k)`` for the first k tokens.

Letters: B pictures, N tokens, M numbers, S side of the picture in pixels, T words, D width of their embeddings.
"""

import binascii
import importlib
import pkgutil
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..core.config import PrunerConfig
from ..core.errors import PruneZooError
from ..core.hub import Pretrained, load, read_method
from ..core.near import near
from ..core.source import Source
from . import container

LONGEST_SIDE = 4096  # pixels of the square


@dataclass(frozen=True)
class TokenizerConfig(PrunerConfig):
    """What every tokenizer's config says."""

    image_size: int = 256  # S, side of the square picture, pixels
    patch: int = 16  # side of a patch, pixels; divides image_size

    def check_least(self, method: str, *names: str) -> None:
        """Raise PruneZooError where one of these fields is below 1, or patches do not fill the picture."""
        for name in ("image_size", "patch", *names):
            if getattr(self, name) < 1:
                raise PruneZooError(f"{method}: {name} must be at least 1, got {getattr(self, name)}")
        if self.image_size > LONGEST_SIDE:
            raise PruneZooError(f"{method}: image_size={self.image_size} must be at most {LONGEST_SIDE}")
        if self.image_size % self.patch:
            raise PruneZooError(f"{method}: patch={self.patch} does not divide image_size={self.image_size}")

    @property
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch

    @property
    def tokens(self) -> int:
        """N, tokens of the whole row, at most 256; a field, in most configs."""
        raise NotImplementedError

    @property
    def bits(self) -> int:
        """Bits of a number, at most 16."""
        raise NotImplementedError


class Text(NamedTuple):
    """What is said of each picture: the input embeddings of a frozen language model."""

    embeddings: Tensor  # (B, T, D)
    valid: Tensor  # (B, T) bool; False is padding


class Painted(NamedTuple):
    """What :meth:`Tokenizer.forward` gives to a training."""

    output: Tensor  # (B, 3, S, S) pixels, or what else the tokenizer's own training compares
    codes: Tensor  # (B, M) long, of the whole row
    loss: Tensor  # scalar, of the bottleneck, over the whole row
    meaning: Tensor | None = None  # (B, cells, width) made from the same prefix, where the tokenizer makes it


class Tokenizer(Pretrained):
    """Pictures to rows of codes, and prefixes of such rows to pictures. A subclass overrides what raises here."""

    config: TokenizerConfig

    @property
    def reads_text(self) -> bool:
        """Whether a :class:`Text` is given wherever pictures or codes are."""
        return False

    def forward(self, images: Tensor, length: int, text: Text | None = None) -> Painted:
        """Encode, quantise, cut the row to ``length`` and paint: what training calls.

        Args:
            images: ``(B, 3, S, S)`` in [0, 1].
            length: Tokens that the decoder reads, 1 to N: tail drop.
            text: Of each picture, for a tokenizer that reads it.
        """
        raise NotImplementedError

    def codes_of(self, images: Tensor, text: Text | None = None) -> Tensor:
        """:meth:`encode` unchecked."""
        raise NotImplementedError

    def paint(self, codes: Tensor, text: Text | None = None) -> Tensor:
        """:meth:`decode` for training: nothing checked or clamped, and with a gradient."""
        raise NotImplementedError

    def vectors(self, codes: Tensor) -> Tensor:
        """What codes ``(B, numbers(k))`` stand for, unchecked: vectors ``(B, n, C)``, which the decoder reads."""
        raise NotImplementedError

    def bare(self, images: Tensor) -> Tensor:
        """What the encoder's transformer makes of the patches alone, no queries, no codes: speed is held against it."""
        raise NotImplementedError

    @property
    def key_weight(self) -> Tensor:
        """A weight, of any shape, that tells this tokenizer from others."""
        raise NotImplementedError

    def numbers(self, length: int) -> int:
        """M, how many numbers the first ``length`` tokens are; by default one each."""
        return length

    @torch.no_grad()
    def encode(self, images: Tensor, text: Text | None = None) -> Tensor:
        """Codes ``(B, M)`` long of pictures ``(B, 3, S, S)`` in [0, 1]; the first ``numbers(k)`` are a shorter row.

        Raises:
            PruneZooError: Pictures of another shape, or a text where none is read, or none where one is.
        """
        self.check_images(images)
        self.check_text(text, len(images))
        return self.codes_of(images.to(self.key_weight.dtype), text)

    @torch.no_grad()
    def decode(self, codes: Tensor, text: Text | None = None) -> Tensor:
        """Pictures ``(B, 3, S, S)`` in [0, 1], float32, from codes ``(B, numbers(k))``, k from 1 to N.

        Raises:
            PruneZooError: A row of another length, a code out of range, or a text as in :meth:`encode`.
        """
        self.length_of(codes)
        self.check_text(text, len(codes))
        most = (1 << self.config.bits) - 1
        if bool((codes < 0).any()) or bool((codes > most).any()):
            raise PruneZooError(f"codes must lie in 0 to {most}, got {codes.min()} to {codes.max()}")
        return self.paint(codes, text).float().clamp(0, 1)

    @property
    def fingerprint(self) -> int:
        """16 bits that tell this tokenizer's files from others'."""
        return binascii.crc_hqx(self.key_weight.detach().float().cpu().numpy().astype("<f4").tobytes(), 0)

    def file_size(self, length: int) -> int:
        """Bytes of the smallest file with so many tokens, header included."""
        return container.HEADER.size + -(-self.numbers(length) * self.config.bits // 8)

    def length_within(self, size: int) -> int:
        """k, the tokens of the longest row whose file has at most so many bytes; 0: not even one fits."""
        return bisect_right(range(1, self.config.tokens + 1), size, key=self.file_size)

    def compress(self, image: Image.Image, size: int, text: Text | None = None) -> bytes:
        """A file of exactly ``size`` bytes, its header included, with as many tokens as fit; see :mod:`container`.

        Args:
            image: Any picture; it is squeezed to the tokenizer's square, and the file knows its width and height.
            size: Bytes. Beyond what the whole row needs the file is filled up with zeros.
            text: Of the one picture, ``(1, T, D)``; it is not in the file.

        Raises:
            PruneZooError: ``size`` has no room for one token, or a text as in :meth:`encode`.
        """
        length = self.length_within(size)
        if length < 1:
            raise PruneZooError(f"{size} bytes are too few: header and one code take {self.file_size(1)}")
        codes = self._read_picture(image, text)[0, : self.numbers(length)].tolist()
        row = container.Row(codes, *image.size, self.fingerprint)
        return container.pack(row, self.config.bits, size, length)

    def decompress(self, data: bytes, text: Text | None = None) -> Image.Image:
        """The picture in a file that :meth:`compress` wrote, in its own width and height.

        Raises:
            PruneZooError: The file is cut or corrupt, or another tokenizer's, or a text as in :meth:`encode`.
        """
        row = container.unpack(data, self.config.bits, self.fingerprint, self.numbers)
        codes = torch.tensor([row.codes], device=self.key_weight.device)
        return self._paint_picture(codes, (row.width, row.height), text)

    def repaint(self, image: Image.Image, length: int, text: Text | None = None) -> Image.Image:
        """A picture as its first ``length`` tokens paint it, in its own width and height; as through a file, but none
        is written.

        Raises:
            PruneZooError: ``length`` is not in 1 to N, or a text as in :meth:`encode`.
        """
        count = self.numbers(self.check_length(length))
        return self._paint_picture(self._read_picture(image, text)[:, :count], image.size, text)

    def _read_picture(self, image: Image.Image, text: Text | None) -> Tensor:
        """The codes ``(1, M)`` of a picture of any size."""
        side = self.config.image_size
        square = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].to(self.key_weight.device) / 255
        return self.encode(pixels, text)

    def _paint_picture(self, codes: Tensor, size: tuple[int, int], text: Text | None) -> Image.Image:
        """The picture of codes ``(1, numbers(k))``, of so many pixels across and down."""
        pixels = (self.decode(codes, text)[0].permute(1, 2, 0) * 255).round().byte().cpu().numpy()
        return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)

    def length_of(self, codes: Tensor) -> int:
        """k, the tokens that these codes ``(B, numbers(k))`` are; PruneZooError where they are none of a prefix."""
        count = codes.shape[-1]
        length = bisect_left(range(self.config.tokens + 2), count, key=self.numbers)
        if self.numbers(length) != count:
            raise PruneZooError(
                f"{count} numbers are no whole tokens of '{self.name}': give codes[:, :numbers(k)], k up to "
                f"{self.config.tokens}"
            )
        return self.check_length(length)

    def check_length(self, length: int) -> int:
        """``length``, if it is one that can be decoded."""
        if not 1 <= length <= self.config.tokens:
            raise PruneZooError(f"length={length} is out of range: this tokenizer decodes 1 to {self.config.tokens}")
        return length

    def check_images(self, images: Tensor) -> None:
        """Raise PruneZooError unless the pictures have the shape that this tokenizer was built for."""
        side = self.config.image_size
        if images.dim() != 4 or images.shape[1:] != (3, side, side):
            raise PruneZooError(f"images must be (B, 3, {side}, {side}), got {tuple(images.shape)}")

    def check_text(self, text: Text | None, pictures: int) -> None:
        """Raise PruneZooError unless there is a text exactly where one is read; a subclass may look closer."""
        if self.reads_text != (text is not None):
            words = "reads a text beside each picture: give one" if self.reads_text else "reads no text: leave it out"
            raise PruneZooError(f"tokenizer '{self.name}' {words}")


def list_tokenizers() -> tuple[str, ...]:
    """Names of the tokenizers, sorted; a file in this folder registers what it holds, nothing else has to be edited."""
    package = importlib.import_module(__package__)
    for entry in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{__package__}.{entry.name}")
    return tuple(sorted(cls.name for cls in Tokenizer.__subclasses__() if cls.__module__.startswith(__package__)))


def tokenizer_class(name: str) -> type[Tokenizer]:
    """The class of that name; an unknown name is an error that lists the known ones."""
    if name not in (known := list_tokenizers()):
        raise PruneZooError(f"unknown tokenizer '{name}'{near(name, known)}")
    return next(cls for cls in Tokenizer.__subclasses__() if cls.name == name)


def load_tokenizer(source: str | Path, revision: str | None = None, **options: Any) -> Tokenizer:
    """A trained tokenizer of any kind, in eval mode, from a folder or a Hub id; see ``Tokenizer.from_pretrained``."""
    place = Source(source, revision, **options)
    return load(tokenizer_class(read_method(place)), place)
