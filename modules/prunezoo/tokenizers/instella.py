"""Instella's one-dimensional binary latents: a picture as a row of tokens of 64 bits each.

Instella-T2I: Pushing the Limits of 1D Discrete Latent Space Image Generation, Wang et al., 2025,
https://arxiv.org/abs/2506.21022.

From the paper: learned latents stand in front of the patches, all attend to all in blocks of Llama's make, patches are
merged two by two in the middle, and the latents come out as 64 logits each. In training each bit is drawn (Bernoulli,
temperature 0.1) and the gradient passes straight through; bits that are unsure cost a penalty. Used, a bit is whether
its logit is above 0. The decoder reads the bits' embeddings beside mask tokens, which are split two by two in the
middle.

Reconstructed in part: the published weights of the losses are not known, so the penalty's is ours, as are the places of
latents and merged patches and the sizes of SwiGLU. Left out are the adversarial loss, the perceptual network, for which
weights would have to be downloaded, and the alignment of the decoder with another network. Ours is the tail-dropped
variant: trained with a random length each step, as One-D-Piece is, so that any prefix is a picture; and the start, at
which each latent looks at what is near its place, or all would say much the same for thousands of steps.

Letters: B pictures, N tokens, W width, V bits of a token, S side of the picture in pixels.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import PruneZooError
from .base import Painted, Text, Tokenizer, TokenizerConfig
from .llama_blocks import (
    LEAST_HEAD,
    Block,
    gather_cells,
    grid_places,
    mark,
    pool_places,
    row_places,
    spread_cells,
    start_as_copies,
    start_as_mean,
    turns_of,
)
from .start import NOISE
from .vit import lay_patches

CLEAR = 3.0  # how much larger than usual the map of the patches starts, beside their marks
SURE = 2.0  # likewise the map to the bits: bits that are drawn by chance are unlearned in the first steps


@dataclass(frozen=True)
class InstellaConfig(TokenizerConfig):
    """Sizes; by default the published ones, for pictures of 1024 pixels."""

    image_size: int = 1024
    tokens: int = 128  # N
    token_bits: int = 64  # V
    width: int = 768  # W of the encoder
    heads: int = 12  # divides it into multiples of 32
    encoder_layers: int = 12
    merge_after: int = 7  # blocks of the encoder behind which patches are merged two by two
    decoder_width: int = 1024
    decoder_heads: int = 16
    decoder_layers: int = 16
    split_after: int = 7  # blocks of the decoder behind which mask tokens are split two by two
    temperature: float = 0.1  # of the bits that training draws
    penalty: float = 0.01  # weight of the bits' unsureness; ours

    def __post_init__(self) -> None:
        self.check_least("instella", "tokens", "token_bits", "encoder_layers", "decoder_layers", "heads", "width")
        if self.grid % 2:
            raise PruneZooError(
                f"instella: patch={self.patch} must go an even number of times into image_size={self.image_size}: "
                "patches are merged two by two"
            )
        if self.tokens > 256 or self.token_bits > 1024:
            raise PruneZooError(
                f"instella: tokens={self.tokens} must be at most 256, token_bits={self.token_bits} at most 1024"
            )
        for part, width, heads in (("", self.width, self.heads), ("decoder_", self.decoder_width, self.decoder_heads)):
            if min(width, heads) < 1 or width % (LEAST_HEAD * heads):
                raise PruneZooError(f"instella: {part}width={width} must be a multiple of 32 times {part}heads={heads}")
        for name, layers in (("merge_after", self.encoder_layers), ("split_after", self.decoder_layers)):
            if not 0 <= getattr(self, name) < layers:
                raise PruneZooError(
                    f"instella: {name}={getattr(self, name)} must lie in 0 to {layers - 1}, below the layers"
                )
        if self.temperature <= 0 or self.penalty < 0:
            raise PruneZooError(
                f"instella: temperature={self.temperature} must be above 0, penalty={self.penalty} at least 0"
            )

    @property
    def bits(self) -> int:
        """Each number is one bit."""
        return 1


class Instella(Tokenizer):
    """Pictures to rows of binary tokens, and prefixes of such rows to pictures."""

    name = "instella"
    config_class = InstellaConfig
    config: InstellaConfig

    def __init__(self, config: InstellaConfig | None = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        c = self.config
        self.encoder = Encoder(c)
        self.bit_embedding = nn.Parameter(torch.randn(c.token_bits, c.width) * c.token_bits**-0.5)
        self.decoder = Decoder(c)

    def forward(self, images: Tensor, length: int, text: Text | None = None) -> Painted:
        """See :meth:`Tokenizer.forward`: in training the bits are drawn, else they are those of :meth:`encode`."""
        sure = (self.encoder(images).float() / self.config.temperature).sigmoid()  # (B, N, V)
        drawn = torch.bernoulli(sure.detach()) if self.training else (sure > 0.5).float()
        bits = drawn + sure - sure.detach()
        loss = self.config.penalty * (sure * (1 - sure)).mean()
        output = self.read(bits[:, : self.check_length(length)])
        return Painted(output, drawn.long().flatten(1), loss)

    def codes_of(self, images: Tensor, text: Text | None = None) -> Tensor:
        """Bits ``(B, N V)`` long, token by token."""
        return (self.encoder(images) > 0).long().flatten(1)

    def paint(self, codes: Tensor, text: Text | None = None) -> Tensor:
        """Pixels ``(B, 3, S, S)`` from bits ``(B, k V)``."""
        return self.decoder(self.vectors(codes))

    def vectors(self, codes: Tensor) -> Tensor:
        """Sums of the embeddings of the bits that are set, ``(B, k, W)`` from bits ``(B, k V)``."""
        return codes.unflatten(1, (-1, self.config.token_bits)).to(self.bit_embedding.dtype) @ self.bit_embedding

    def read(self, bits: Tensor) -> Tensor:
        """Pixels from the first k tokens' bits ``(B, k, V)``, which may have a gradient."""
        return self.decoder(bits.to(self.bit_embedding.dtype) @ self.bit_embedding)

    def bare(self, images: Tensor) -> Tensor:
        """See :meth:`Tokenizer.bare`."""
        return self.encoder.run(self.encoder.patches(images.to(self.key_weight.dtype)), 0)

    @property
    def key_weight(self) -> Tensor:
        """The embeddings of the bits."""
        return self.bit_embedding

    def numbers(self, length: int) -> int:
        """The bits of so many tokens."""
        return length * self.config.token_bits


class Encoder(nn.Module):
    """Blocks over latents and patches; gives the latents' logits."""

    def __init__(self, config: InstellaConfig) -> None:
        super().__init__()
        c = self.config = config
        self.patch_embed = nn.Conv2d(3, c.width, c.patch, c.patch)
        self.latents = nn.Parameter(NOISE * torch.randn(c.tokens, c.width))
        self.blocks = nn.ModuleList(Block(c.width, c.heads) for _ in range(c.encoder_layers))
        self.merge = nn.Linear(4 * c.width, c.width)
        self.norm = nn.RMSNorm(c.width)
        self.logits = nn.Linear(c.width, c.token_bits)
        half = c.width // 2
        start_as_mean(self.merge)
        assert self.patch_embed.bias is not None  # a convolution may have none
        mark(self.patch_embed.bias, gives=True)
        mark(self.latents, gives=False)
        with torch.no_grad():  # what the patches hold is in the half of the channels without marks, and makes the bits
            self.patch_embed.weight[:half] *= NOISE
            self.patch_embed.weight[half:] *= CLEAR
            self.logits.weight[:, :half] *= NOISE
            self.logits.weight[:, half:] *= SURE

    def forward(self, images: Tensor) -> Tensor:
        """Pictures (B, 3, S, S): logits (B, N, V)."""
        patches = self.patches(images)
        x = torch.cat([self.latents.expand(len(images), -1, -1), patches], dim=1)
        return self.logits(self.run(x, self.config.tokens)[:, : self.config.tokens])

    def patches(self, images: Tensor) -> Tensor:
        """Embedded, (B, grid², W)."""
        return self.patch_embed(2 * images - 1).flatten(2).transpose(1, 2)

    def run(self, x: Tensor, tokens: int) -> Tensor:
        """All blocks over (B, tokens + grid², W), the patches merged on the way."""
        c = self.config
        here = grid_places(c.grid).to(x.device)
        row = row_places(tokens, c.grid).to(x.device)
        for number, block in enumerate(self.blocks):
            if number == c.merge_after:
                merged = self.merge(gather_cells(x[:, tokens:], c.grid))
                x, here = torch.cat([x[:, :tokens], merged], dim=1), pool_places(here, c.grid)
            x = block(x, turns_of(torch.cat([row, here]), c.width // c.heads))
        return self.norm(x)


class Decoder(nn.Module):
    """Blocks over a prefix of the row and mask tokens; gives pixels."""

    def __init__(self, config: InstellaConfig) -> None:
        super().__init__()
        c = self.config = config
        width = c.decoder_width
        self.embed = nn.Linear(c.width, width)
        self.mask_token = nn.Parameter(NOISE * torch.randn(1, 1, width))
        self.blocks = nn.ModuleList(Block(width, c.decoder_heads) for _ in range(c.decoder_layers))
        self.split = nn.Linear(width, 4 * width)
        self.norm = nn.RMSNorm(width)
        self.pixels = nn.Linear(width, 3 * c.patch**2)
        start_as_copies(self.split)
        mark(self.embed.bias, gives=True)
        mark(self.mask_token, gives=False)
        with torch.no_grad():
            self.embed.weight[: width // 2] *= NOISE
        with torch.no_grad():  # grey at first, or the first steps unlearn the bits to be rid of the noise
            self.pixels.weight *= 0.1
            self.pixels.bias.fill_(0.5)

    def forward(self, row: Tensor) -> Tensor:
        """Embedded tokens (B, k, W): pixels (B, 3, S, S)."""
        c, tokens = self.config, row.shape[1]
        whole = grid_places(c.grid).to(row.device)
        here = pool_places(whole, c.grid)
        places = row_places(tokens, c.grid).to(row.device)
        x = torch.cat([self.embed(row), self.mask_token.expand(len(row), len(here), -1)], dim=1)
        for number, block in enumerate(self.blocks):
            if number == c.split_after:
                x, here = torch.cat([x[:, :tokens], spread_cells(self.split(x[:, tokens:]), c.grid)], dim=1), whole
            x = block(x, turns_of(torch.cat([places, here]), c.decoder_width // c.decoder_heads))
        return lay_patches(self.pixels(self.norm(x[:, tokens:])), c.grid, c.patch)
