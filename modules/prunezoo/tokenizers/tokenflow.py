"""TokenFlow: one index that stands for a meaning and for pixels, on grids from coarse to fine.

TokenFlow: Unified Image Tokenizer for Multimodal Understanding and Generation, Qu et al., 2024,
https://arxiv.org/abs/2412.03069.

From the paper: a ViT gives each cell 32 numbers of meaning, a convolutional encoder 8 of pixels, both of length 1. They
share one index: of paired entries of two codebooks it takes the one with the least squared distance of meaning plus
``pixel_weight`` times that of pixels. Grids of 1, 2, 4, … cells a side are quantised in turn, each what the ones before
it left. A small ViT makes of the meaning what a frozen tower sees, a convolutional decoder paints from the pixels.

Reconstructed in part: the distance is between what is left and the entries as they are; only the first is of length 1.
Ours: the ViT of the meaning starts from nothing and learns from the frozen tower alone, where the paper starts it as
that tower; the codebooks follow by moving averages; the convolutions are those of the VQGAN in :mod:`maskgit_vqgan`,
with widths of one's own. Since both distances are summed, the two codebooks are one here, of 40 numbers an entry, the
last 8 times the root of the weight. A token of the row is a whole grid: its first tokens are the coarse
grids, and any prefix of the row is a picture. The adversarial loss and the perceptual network are left out.

Letters: B pictures, N grids, G cells along the side of the finest, M codes, C numbers of an entry, W width of the ViTs,
D width of the tower, S side of the picture in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.errors import PruneZooError
from .base import Painted, Text, Tokenizer, TokenizerConfig
from .maskgit_vqgan import Level, ResidualBlock
from .quantizer import Quantizer
from .start import enter_what, grid_places, make_layers
from .vit import run

GROUPS = 32  # of the group norms in the convolutions, whose widths are multiples of it
COMMITMENT = 0.25


@dataclass(frozen=True)
class TokenFlowConfig(TokenizerConfig):
    """Sizes; by default the published ones beside CLIP-B/16."""

    image_size: int = 224
    scales: tuple[int, ...] = (1, 2, 4, 6, 8, 10, 12, 14)  # cells a side of each grid, rising, the last is the patches'
    codes: int = 32768  # a power of two, so that a code is a whole number of bits
    meaning_width: int = 32
    pixel_width: int = 8
    pixel_weight: float = 1.0  # of the pixels' distance beside the meaning's
    width: int = 768  # W
    layers: int = 12  # of the ViT that gives the meaning
    heads: int = 12
    decoder_layers: int = 3  # of the ViT that makes the tower's features of it
    tower_width: int = 768  # D
    channels: tuple[int, ...] = (128, 128, 256, 256, 512)  # of the convolutions, from the pixels down

    def __post_init__(self) -> None:
        names = ("meaning_width", "pixel_width", "width", "layers", "heads", "decoder_layers", "tower_width")
        self.check_least("tokenflow", "codes", *names)
        if self.width % 4 or self.width % self.heads:
            raise PruneZooError(f"tokenflow: width={self.width} must be a multiple of 4 and of heads={self.heads}")
        if self.codes & (self.codes - 1) or not 2 <= self.codes <= 65536:
            raise PruneZooError(f"tokenflow: codes={self.codes} must be a power of two, from 2 to 65536")
        rising = all(a < b for a, b in pairwise((0, *self.scales)))
        if not self.scales or not rising or self.scales[-1] != self.grid:
            raise PruneZooError(
                f"tokenflow: scales={list(self.scales)} must rise from at least 1 to {self.grid}, the patches a side"
            )
        if not self.channels or any(one < GROUPS or one % GROUPS for one in self.channels):
            raise PruneZooError(f"tokenflow: channels={list(self.channels)} must be multiples of {GROUPS}")
        if self.patch != 1 << (len(self.channels) - 1):
            raise PruneZooError(
                f"tokenflow: patch={self.patch} must be {1 << (len(self.channels) - 1)}, as channels double it"
            )
        if self.pixel_weight <= 0:
            raise PruneZooError(f"tokenflow: pixel_weight={self.pixel_weight} must be above 0")

    @property
    def tokens(self) -> int:
        """N, the grids."""
        return len(self.scales)

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.codes.bit_length() - 1


class TokenFlow(Tokenizer):
    """Pictures to grids of codes, and prefixes of them to pictures and to what a tower sees."""

    name = "tokenflow"
    config_class = TokenFlowConfig
    config: TokenFlowConfig

    def __init__(self, config: TokenFlowConfig | None = None, **overrides: Any) -> None:
        super().__init__(config, **overrides)
        c = self.config
        self.meaning_encoder = MeaningEncoder(c)
        self.pixel_encoder = Convolutions(c)
        self.quantize = Quantizer(c.codes, c.meaning_width + c.pixel_width, unit=False)
        self.meaning_decoder = MeaningDecoder(c)
        self.pixel_decoder = Deconvolutions(c)

    def forward(self, images: Tensor, length: int, text: Text | None = None) -> Painted:
        """See :meth:`Tokenizer.forward`; the meaning is (B, G², D). In training the codebook follows."""
        self.check_length(length)
        wanted = self.latents(images)
        codes, lefts, sums = self.quantise(wanted)
        if self.training:
            flat = torch.cat([left.flatten(0, 1) for left in lefts])
            self.quantize.follow(flat, torch.cat([code.flatten() for code in codes]))
        loss = COMMITMENT * torch.stack([F.mse_loss(wanted, made) for made in sums]).mean()
        made = wanted + (sums[length - 1] - wanted).detach()
        return Painted(self.draw(made), torch.cat(codes, dim=1), loss, self.meaning_decoder(self.split(made)[0]))

    def codes_of(self, images: Tensor, text: Text | None = None) -> Tensor:
        """Codes ``(B, M)``, grid by grid, each in rows."""
        return torch.cat(self.quantise(self.latents(images))[0], dim=1)

    def paint(self, codes: Tensor, text: Text | None = None) -> Tensor:
        """Pixels ``(B, 3, S, S)``."""
        return self.draw(self.gather(codes))

    def understand(self, codes: Tensor) -> Tensor:
        """What a frozen tower would see, ``(B, G², D)`` of direction alone, from codes ``(B, numbers(k))``."""
        self.length_of(codes)
        return self.meaning_decoder(self.split(self.gather(codes))[0])

    def vectors(self, codes: Tensor) -> Tensor:
        """The sum of the grids, meaning and pixels, at the cells of the finest that is there: ``(B, size², C)``."""
        size = self.config.scales[self.length_of(codes) - 1]
        return F.adaptive_avg_pool2d(self.gather(codes), size).flatten(2).transpose(1, 2)

    def gather(self, codes: Tensor) -> Tensor:
        """The sum of the grids, ``(B, C, G, G)``: what the codes ``(B, numbers(k))`` stand for, in both codebooks."""
        sizes = self.config.scales[: self.length_of(codes)]
        grids = zip(sizes, codes.split([size**2 for size in sizes], dim=1), strict=True)
        return torch.stack([self.enlarge(grid, size) for size, grid in grids]).sum(0)

    def latents(self, images: Tensor) -> Tensor:
        """What is quantised, ``(B, C, G, G)`` float32: meaning, and pixels times the root of their weight."""
        meaning = F.normalize(self.meaning_encoder(images).float(), dim=1)
        pixels = F.normalize(self.pixel_encoder(images).float(), dim=1)
        return torch.cat([meaning, pixels * self.config.pixel_weight**0.5], dim=1)

    def quantise(self, wanted: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Of each grid the codes (B, size²), what was left for it (B, size², C), and the sum so far (B, C, G, G)."""
        codes, lefts, sums = [], [], []
        made = torch.zeros_like(wanted)
        with torch.no_grad():
            for size in self.config.scales:
                left = F.adaptive_avg_pool2d(wanted - made, size).flatten(2).transpose(1, 2)
                codes.append(self.quantize.nearest(left))
                lefts.append(left)
                made = made + self.enlarge(codes[-1], size)
                sums.append(made)
        return codes, lefts, sums

    def enlarge(self, codes: Tensor, size: int) -> Tensor:
        """One grid's entries, (B, size²) long to (B, C, G, G)."""
        entries = self.quantize.codebook.float()[codes].transpose(1, 2).unflatten(2, (size, size))
        return F.interpolate(entries, (self.config.grid, self.config.grid), mode="bicubic")

    def split(self, made: Tensor) -> tuple[Tensor, Tensor]:
        """Meaning and pixels of (B, C, G, G), in the weights' type."""
        c = self.config
        meaning, pixels = made.to(self.quantize.codebook.dtype).split([c.meaning_width, c.pixel_width], dim=1)
        return meaning, pixels

    def draw(self, made: Tensor) -> Tensor:
        """Pixels (B, 3, S, S) of (B, C, G, G)."""
        return self.pixel_decoder(self.split(made)[1])

    def bare(self, images: Tensor) -> Tensor:
        """See :meth:`Tokenizer.bare`."""
        return self.meaning_encoder.see(images.to(self.key_weight.dtype))

    @property
    def key_weight(self) -> Tensor:
        """The codebook."""
        return self.quantize.codebook

    def numbers(self, length: int) -> int:
        """The codes of so many grids."""
        return sum(size**2 for size in self.config.scales[:length])


class MeaningEncoder(nn.Module):
    """ViT over class token and patches; (B, 3, S, S) to (B, meaning_width, G, G)."""

    def __init__(self, config: TokenFlowConfig) -> None:
        super().__init__()
        c = self.config = config
        self.patch_embed = nn.Conv2d(3, c.width, c.patch, c.patch)
        enter_what(self.patch_embed.weight, 0.1)
        self.places = nn.Parameter(grid_places(c.grid, c.width, gives=True))
        self.ln_pre, self.ln_post = nn.LayerNorm(c.width), nn.LayerNorm(c.width)
        self.transformer = make_layers(c.layers, c.width, c.heads)
        self.head = nn.Sequential(nn.Linear(c.width, c.width), nn.Tanh(), nn.Linear(c.width, c.meaning_width))

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        cells = self.head(self.see(images)[:, 1:])
        return cells.transpose(1, 2).unflatten(2, (self.config.grid, self.config.grid))

    def see(self, images: Tensor) -> Tensor:
        """(B, 1 + G², W)."""
        patches = self.patch_embed(images - 0.5).flatten(2).transpose(1, 2)
        return self.ln_post(run(self.transformer, self.ln_pre(F.pad(patches, (0, 0, 1, 0)) + self.places)))


class MeaningDecoder(nn.Module):
    """ViT over the meaning's cells; (B, meaning_width, G, G) to (B, G², D)."""

    def __init__(self, config: TokenFlowConfig) -> None:
        super().__init__()
        c = config
        self.embed = nn.Linear(c.meaning_width, c.width)
        self.places = nn.Parameter(grid_places(c.grid, c.width, gives=True)[1:])
        self.transformer = make_layers(c.decoder_layers, c.width, c.heads)
        self.norm = nn.LayerNorm(c.width)
        self.out = nn.Linear(c.width, c.tower_width)

    def forward(self, meaning: Tensor) -> Tensor:
        """See the class."""
        x = self.embed(meaning.flatten(2).transpose(1, 2)) + self.places
        return self.out(self.norm(run(self.transformer, x)))


class Convolutions(nn.Module):
    """(B, 3, S, S) to (B, pixel_width, G, G)."""

    def __init__(self, config: TokenFlowConfig) -> None:
        super().__init__()
        widths: Sequence[int] = config.channels
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList(Level(a, b) for a, b in pairwise((widths[0], *widths)))
        self.mid = nn.Sequential(*(ResidualBlock(widths[-1], widths[-1]) for _ in range(2)))
        self.norm_out = nn.GroupNorm(GROUPS, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.pixel_width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.conv_in(x)
        for number, level in enumerate(self.down):
            x = level(x if number == 0 else F.avg_pool2d(x, 2))
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Deconvolutions(nn.Module):
    """(B, pixel_width, G, G) to (B, 3, S, S)."""

    def __init__(self, config: TokenFlowConfig) -> None:
        super().__init__()
        widths: Sequence[int] = config.channels[::-1]
        self.conv_in = nn.Conv2d(config.pixel_width, widths[0], 3, padding=1)
        self.mid = nn.Sequential(*(ResidualBlock(widths[0], widths[0]) for _ in range(2)))
        last = len(widths) - 1
        self.up = nn.ModuleList(
            Level(coarse, fine, doubles=number < last)
            for number, (coarse, fine) in enumerate(pairwise((widths[0], *widths)))
        )
        self.norm_out = nn.GroupNorm(GROUPS, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)
        with torch.no_grad():  # nearly grey at first
            self.conv_out.weight *= 0.1
            self.conv_out.bias = nn.Parameter(torch.full((3,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.mid(self.conv_in(x))
        for level in self.up:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))
