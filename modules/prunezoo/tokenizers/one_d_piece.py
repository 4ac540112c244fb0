"""One-D-Piece: a picture as an ordered row of codes, any prefix of which is a picture too.

One-D-Piece: Image Tokenizer Meets Quality-Controllable Compression, Miwa et al., 2025,
https://arxiv.org/abs/2501.10064. It is built on TiTok:

An Image is Worth 32 Tokens for Reconstruction and Generation, Yu et al., NeurIPS 2024,
https://arxiv.org/abs/2406.07550.

From the paper: a ViT reads patches and learned queries; what becomes of the queries is quantised into an ordered row of
codes; a second ViT paints the picture from the codes and mask tokens. In training the row is cut at a random length in
front of the decoder, so its head carries most, and any prefix of it is a picture.

Ours: the codebook follows the codes by moving averages instead of by gradient. The weights start as a coder of what is
near, so that small models learn in minutes: half of the channels hold where a token is (the queries' places are spread
evenly by a Sobol sequence), the other half what is there; attention looks near by, queries at patches and mask tokens
at codes, and hands on what it finds. All of it is learned from there. A head that gives pixels at once, as in TiTok's
later code, stands beside the paper's logits over the codes of a MaskGIT-VQGAN, whose decoder paints.

Not a pruner: it makes tokens of pictures, for no language model.

Letters: B pictures, N tokens, P patches, W width, C width of a code, V codes, S side of the picture in pixels.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import PruneZooError
from .base import Painted, Text, Tokenizer, TokenizerConfig
from .maskgit_vqgan import CODE_WIDTH, CODES, STRIDE, PixelDecoder
from .quantizer import Quantizer
from .start import NOISE
from .vit import Decoder, Encoder, Sizes


@dataclass(frozen=True)
class OneDPieceConfig(TokenizerConfig):
    """Sizes of a One-D-Piece; by default those of the paper's S."""

    tokens: int = 256  # N, length of the whole row
    width: int = 512  # W
    encoder_layers: int = 8
    decoder_layers: int = 8
    heads: int = 8  # divides width
    decoder_width: int | None = None  # W of the decoder; None: as the encoder's
    decoder_heads: int | None = None  # divides it; None: as many as the encoder's
    codes: int = 4096  # V, a power of two, so that a code is a whole number of bits
    code_width: int = 12  # C
    unit_codes: bool = True  # codes have length 1 and are told apart by angle; False: any length, by distance
    head: str = "codes"  # "codes": logits over MaskGIT-VQGAN codes, painted by its decoder; "pixels": pixels at once
    spread: bool = True  # the tokens' places start spread evenly over the picture; False: at random
    legacy_reshape: bool = False  # mix queries and channels as the published weights were trained; never for new ones

    def __post_init__(self) -> None:
        self.check_least("one_d_piece", "tokens", "width", "encoder_layers", "decoder_layers", "heads", "codes")
        for part, (width, heads) in {"": (self.width, self.heads), "decoder_": self.decoder_size}.items():
            if min(width, heads) < 1 or width % 4 or width % heads:
                raise PruneZooError(
                    f"one_d_piece: {part}width={width} must be a multiple of 4 and of {part}heads={heads}"
                )
        if self.codes & (self.codes - 1) or self.codes < 2:
            raise PruneZooError(f"one_d_piece: codes={self.codes} must be a power of two, at least 2")
        if self.code_width < 2 or self.tokens > 256:
            raise PruneZooError(
                f"one_d_piece: code_width={self.code_width} must be at least 2, tokens={self.tokens} at most 256"
            )
        if self.head not in ("codes", "pixels"):
            raise PruneZooError(f"one_d_piece: head='{self.head}' is unknown: choose 'codes' or 'pixels'")
        if self.head == "codes" and self.patch != STRIDE:
            raise PruneZooError(f"one_d_piece: head='codes' needs patch={STRIDE}, a cell of MaskGIT-VQGAN")

    @property
    def decoder_size(self) -> tuple[int, int]:
        """Width and heads of the decoder."""
        return (
            self.width if self.decoder_width is None else self.decoder_width,
            self.heads if self.decoder_heads is None else self.decoder_heads,
        )

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.codes.bit_length() - 1


class OneDPiece(Tokenizer):
    """Pictures to rows of codes, and prefixes of such rows to pictures."""

    name = "one_d_piece"
    config_class = OneDPieceConfig
    config: OneDPieceConfig

    def __init__(self, config: OneDPieceConfig | None = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        c = self.config
        sizes = Sizes(c.grid, c.patch, c.tokens, c.width, c.encoder_layers, c.heads, c.code_width, c.spread)
        self.encoder = Encoder(sizes, c.legacy_reshape)
        self.latent_tokens = nn.Parameter(NOISE * torch.randn(c.tokens, c.width))
        self.quantize = Quantizer(c.codes, c.code_width, unit=c.unit_codes)
        width, heads = c.decoder_size
        sizes = replace(sizes, width=width, layers=c.decoder_layers, heads=heads)
        self.decoder = Decoder(sizes, logits=CODES if c.head == "codes" else None)
        if c.head == "codes":
            self.pixel_codes = nn.Parameter(torch.empty(CODES, CODE_WIDTH).uniform_(-1 / CODES, 1 / CODES))
            self.pixel_decoder = PixelDecoder()

    def forward(self, images: Tensor, length: int, text: Text | None = None) -> Painted:
        """See :meth:`Tokenizer.forward`; with head "codes" the output is (B, 1024, grid, grid) logits."""
        latents = self.encoder(images, self.latent_tokens)
        quantized, codes, loss = self.quantize(latents)
        return Painted(self.decoder(quantized[:, : self.check_length(length)]), codes, loss)

    def codes_of(self, images: Tensor, text: Text | None = None) -> Tensor:
        """Codes ``(B, N)``."""
        return self.quantize.nearest(self.encoder(images, self.latent_tokens))

    def paint(self, codes: Tensor, text: Text | None = None) -> Tensor:
        """Pixels ``(B, 3, S, S)`` from codes ``(B, k)``."""
        output = self.decoder(self.vectors(codes))
        if self.config.head == "pixels":
            return output
        # codes chosen softly, as the published pixel decoder was tuned
        return self.pixel_decoder(torch.einsum("bvhw,vc->bchw", output.softmax(1), self.pixel_codes))

    def vectors(self, codes: Tensor) -> Tensor:
        """Entries of the codebook, ``(B, k, C)`` from codes ``(B, k)``."""
        return self.quantize.codebook[codes]

    def bare(self, images: Tensor) -> Tensor:
        """See :meth:`Tokenizer.bare`."""
        return self.encoder.bare(images.to(self.key_weight.dtype))

    @property
    def key_weight(self) -> Tensor:
        """The codebook."""
        return self.quantize.codebook
