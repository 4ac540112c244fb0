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

import binascii
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..core.config import PrunerConfig
from ..core.errors import PruneZooError
from ..core.hub import Pretrained
from . import container
from .maskgit_vqgan import CODE_WIDTH, CODES, STRIDE, PixelDecoder
from .quantizer import Quantizer
from .start import NOISE, enter_what, grid_places, make_layers, token_places


@dataclass(frozen=True)
class OneDPieceConfig(PrunerConfig):
    """Sizes of a One-D-Piece; by default those of the paper's S."""

    image_size: int = 256  # S, side of the square picture, pixels
    patch: int = 16  # side of a patch, pixels; divides image_size
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
        for name in ("image_size", "patch", "tokens", "width", "encoder_layers", "decoder_layers", "heads", "codes"):
            if getattr(self, name) < 1:
                raise PruneZooError(f"one_d_piece: {name} must be at least 1, got {getattr(self, name)}")
        if self.image_size % self.patch:
            raise PruneZooError(f"one_d_piece: patch={self.patch} does not divide image_size={self.image_size}")
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
    def grid(self) -> int:
        """Patches along a side."""
        return self.image_size // self.patch

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.codes.bit_length() - 1


class Painted(NamedTuple):
    """What :meth:`OneDPiece.forward` gives."""

    output: Tensor  # (B, 3, S, S) with head "pixels", (B, 1024, grid, grid) logits with head "codes"
    codes: Tensor  # (B, N) long, of the whole row
    loss: Tensor  # scalar, of the quantiser, over the whole row


class OneDPiece(Pretrained):
    """Pictures to rows of codes, and prefixes of such rows to pictures."""

    name = "one_d_piece"
    config_class = OneDPieceConfig
    config: OneDPieceConfig

    def __init__(self, config: OneDPieceConfig | None = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        c = self.config
        self.encoder = Encoder(c)
        self.latent_tokens = nn.Parameter(NOISE * torch.randn(c.tokens, c.width))
        self.quantize = Quantizer(c.codes, c.code_width, unit=c.unit_codes)
        self.decoder = Decoder(c)
        if c.head == "codes":
            self.pixel_codes = nn.Parameter(torch.empty(CODES, CODE_WIDTH).uniform_(-1 / CODES, 1 / CODES))
            self.pixel_decoder = PixelDecoder()

    def forward(self, images: Tensor, length: int) -> Painted:
        """Encode, quantise, cut the row to ``length`` and paint: what training calls.

        Args:
            images: ``(B, 3, S, S)`` in [0, 1].
            length: Tokens that the decoder reads, 1 to N: tail drop.
        """
        latents = self.encoder(images, self.latent_tokens)
        quantized, codes, loss = self.quantize(latents)
        return Painted(self.decoder(quantized[:, : self.check_length(length)]), codes, loss)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Codes ``(B, N)`` long of pictures ``(B, 3, S, S)`` in [0, 1]; any prefix of a row is a shorter code."""
        self.check_images(images)
        latents = self.encoder(images.to(self.latent_tokens.dtype), self.latent_tokens)
        return self.quantize.nearest(latents)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Pictures ``(B, 3, S, S)`` in [0, 1], float32, from codes ``(B, k)``, k from 1 to N.

        Raises:
            PruneZooError: A row of another length, or a code beyond the codebook.
        """
        self.check_length(codes.shape[-1])
        if bool((codes < 0).any()) or bool((codes >= self.config.codes).any()):
            raise PruneZooError(f"codes must lie in 0 to {self.config.codes - 1}, got {codes.min()} to {codes.max()}")
        return self.paint(codes).float().clamp(0, 1)

    def paint(self, codes: Tensor) -> Tensor:
        """:meth:`decode` for training: nothing checked or clamped, and with a gradient."""
        output = self.decoder(self.quantize.codebook[codes])
        if self.config.head == "pixels":
            return output
        # codes chosen softly, as the published pixel decoder was tuned
        return self.pixel_decoder(torch.einsum("bvhw,vc->bchw", output.softmax(1), self.pixel_codes))

    @property
    def fingerprint(self) -> int:
        """16 bits that tell this tokenizer's files from others': of its codebook."""
        return binascii.crc_hqx(self.quantize.codebook.detach().float().cpu().numpy().astype("<f4").tobytes(), 0)

    def compress(self, image: Image.Image, size: int) -> bytes:
        """A file of exactly ``size`` bytes, its header included, with as many codes as fit; see :mod:`container`.

        Args:
            image: Any picture; it is squeezed to the tokenizer's square, and the file knows its width and height.
            size: Bytes. Beyond what the whole row needs the file is filled up with zeros.

        Raises:
            PruneZooError: ``size`` has no room for one code.
        """
        bits = self.config.bits
        length = min(container.capacity(size, bits), self.config.tokens)
        if length < 1:
            raise PruneZooError(f"{size} bytes are too few: header and one code take {container.least_size(bits)}")
        side = self.config.image_size
        square = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None].to(self.latent_tokens.device) / 255
        codes = self.encode(pixels)[0, :length].tolist()
        return container.pack(container.Row(codes, *image.size, self.fingerprint), bits, size)

    def decompress(self, data: bytes) -> Image.Image:
        """The picture in a file that :meth:`compress` wrote, in its own width and height.

        Raises:
            PruneZooError: The file is cut or corrupt, or another tokenizer's.
        """
        row = container.unpack(data, self.config.bits, self.fingerprint)
        codes = torch.tensor([row.codes], device=self.latent_tokens.device)
        pixels = (self.decode(codes)[0].permute(1, 2, 0) * 255).round().byte().cpu().numpy()
        return Image.fromarray(pixels).resize((row.width, row.height), Image.Resampling.BICUBIC)

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


class Encoder(nn.Module):
    """ViT over class token, patches and queries; gives what becomes of the queries."""

    def __init__(self, config: OneDPieceConfig) -> None:
        super().__init__()
        c = config
        self.legacy_reshape = c.legacy_reshape
        self.patch_embed = nn.Conv2d(3, c.width, c.patch, c.patch)
        self.class_embedding = nn.Parameter(NOISE * torch.randn(1, c.width))
        self.positional_embedding = nn.Parameter(grid_places(c.grid, c.width, gives=True))
        places = token_places(c.tokens, c.grid, c.width, gives=False, spread=c.spread)
        self.latent_token_positional_embedding = nn.Parameter(places)
        self.ln_pre, self.ln_post = nn.LayerNorm(c.width), nn.LayerNorm(c.width)
        self.transformer = make_layers(c.encoder_layers, c.width, c.heads)
        self.conv_out = nn.Linear(c.width, c.code_width)
        with torch.no_grad():
            weight = self.patch_embed.weight
            enter_what(weight, 0.1)
            self.patch_embed.bias = nn.Parameter(-0.5 * weight.sum((1, 2, 3)))  # grey gives nothing
            self.conv_out.weight[:, : c.width // 2] *= 0.1
            self.conv_out.bias[0] = 1.0  # so that the angle tells how much there is, and not only of what

    def forward(self, images: Tensor, queries: Tensor) -> Tensor:
        """Pictures (B, 3, S, S) and queries (N, W): latents (B, N, C)."""
        rows = images.shape[0]
        patches = self.patch_embed(images).flatten(2).transpose(1, 2)
        seen = torch.cat([self.class_embedding.expand(rows, 1, -1), patches], dim=1) + self.positional_embedding
        asked = (queries + self.latent_token_positional_embedding).expand(rows, -1, -1)
        x = self.ln_pre(torch.cat([seen, asked], dim=1))
        for layer in self.transformer:
            x = layer(x)
        latents = self.ln_post(x[:, seen.shape[1] :])
        if (
            self.legacy_reshape
        ):  # (B, N, W) read as if it were (B, W, N), in the code that trained the published weights
            latents = latents.reshape(rows, latents.shape[2], latents.shape[1]).transpose(1, 2)
        return self.conv_out(latents)


class Decoder(nn.Module):
    """ViT over class token, mask tokens and a prefix of the row; gives what becomes of the mask tokens."""

    def __init__(self, config: OneDPieceConfig) -> None:
        super().__init__()
        c = self.config = config
        width, heads = c.decoder_size
        self.decoder_embed = nn.Linear(c.code_width, width)
        enter_what(self.decoder_embed.weight, 1.0)
        self.class_embedding = nn.Parameter(NOISE * torch.randn(1, width))
        self.positional_embedding = nn.Parameter(grid_places(c.grid, width, gives=False))
        self.mask_token = nn.Parameter(NOISE * torch.randn(1, 1, width))
        places = token_places(c.tokens, c.grid, width, gives=True, spread=c.spread)
        self.latent_token_positional_embedding = nn.Parameter(places)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = make_layers(c.decoder_layers, width, heads)
        if c.head == "codes":
            self.ffn = nn.Sequential(nn.Linear(width, 2 * width), nn.Tanh(), nn.Linear(2 * width, CODES))
        else:
            pixels = nn.Linear(width, 3 * c.patch**2)
            with torch.no_grad():  # nearly grey at first, or the first steps unlearn the codes to be rid of the noise
                pixels.weight *= 0.1
                pixels.bias.zero_()
            self.ffn = nn.Sequential(pixels)
            self.conv_out = nn.Conv2d(3, 3, 3, padding=1)
            nn.init.dirac_(self.conv_out.weight)
            self.conv_out.bias = nn.Parameter(torch.full((3,), 0.5))

    def forward(self, quantized: Tensor) -> Tensor:
        """Codes' vectors (B, k, C): pixels (B, 3, S, S) or logits (B, 1024, grid, grid)."""
        c, rows = self.config, quantized.shape[0]
        read = self.decoder_embed(quantized) + self.latent_token_positional_embedding[: quantized.shape[1]]
        blank = torch.cat([self.class_embedding[None], self.mask_token.expand(-1, c.grid**2, -1)], dim=1)
        x = self.ln_pre(torch.cat([(blank + self.positional_embedding).expand(rows, -1, -1), read], dim=1))
        for layer in self.transformer:
            x = layer(x)
        x = self.ffn(self.ln_post(x[:, 1 : 1 + c.grid**2]))
        if c.head == "codes":
            return x.transpose(1, 2).unflatten(2, (c.grid, c.grid))
        x = x.view(rows, c.grid, c.grid, c.patch, c.patch, 3).permute(0, 5, 1, 3, 2, 4)
        return self.conv_out(x.reshape(rows, 3, c.image_size, c.image_size))
