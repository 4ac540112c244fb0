"""The pixel tokenizer of MaskGIT (Chang et al., 2022, arXiv 2202.04200): a VQGAN (Esser et al., arXiv 2012.09841)
without attention, 16 x 16 pixels a cell, 1024 codes.

Its codes are what the first stage of One-D-Piece learns, and its decoder is what the second stage paints with. Names of
the modules are those of the published weights. Letters: B pictures, H and W cells, C = 256 width of a code.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CODES, CODE_WIDTH, STRIDE = 1024, 256, 16
CHANNELS = (128, 128, 256, 256, 512)  # at each resolution, from the pixels down


class PixelTokenizer(nn.Module):
    """Pictures to a grid of codes and back; frozen wherever it is used here."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = PixelEncoder()
        self.quantize = PixelCodes()
        self.decoder = PixelDecoder()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Codes ``(B, H, W)`` long of pictures ``(B, 3, 16 H, 16 W)`` in [0, 1]."""
        latents = self.encoder(images).permute(0, 2, 3, 1)
        return torch.cdist(latents.flatten(1, 2), self.quantize.embedding.weight).argmin(-1).view(latents.shape[:3])

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Pictures ``(B, 3, 16 H, 16 W)`` in [0, 1] from codes ``(B, H, W)``."""
        return self.decoder(self.quantize.embedding(codes).permute(0, 3, 1, 2)).clamp(0, 1)


class PixelCodes(nn.Module):
    """The codebook."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CODES, CODE_WIDTH)


class ResidualBlock(nn.Module):
    """Two convolutions with group norm; where the width changes, the shortcut reads their result, as published."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(32, inputs, eps=1e-6), nn.GroupNorm(32, outputs, eps=1e-6)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.nin_shortcut = nn.Conv2d(outputs, outputs, 1, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) to (B, outputs, h, w)."""
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (x if self.nin_shortcut is None else self.nin_shortcut(y))


class Level(nn.Module):
    """Two residual blocks at one resolution; in the decoder with the convolution after doubling it."""

    def __init__(self, inputs: int, outputs: int, doubles: bool = False) -> None:
        super().__init__()
        self.block = nn.Sequential(ResidualBlock(inputs, outputs), ResidualBlock(outputs, outputs))
        self.upsample_conv = nn.Conv2d(outputs, outputs, 3, padding=1) if doubles else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) to (B, outputs, h, w), or twice as high and wide."""
        x = self.block(x)
        if self.upsample_conv is not None:
            x = self.upsample_conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return x


class PixelEncoder(nn.Module):
    """(B, 3, 16 H, 16 W) to (B, C, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, CHANNELS[0], 3, padding=1, bias=False)
        self.down = nn.ModuleList(Level(a, b) for a, b in pairwise((CHANNELS[0], *CHANNELS)))
        self.mid = nn.Sequential(*(ResidualBlock(CHANNELS[-1], CHANNELS[-1]) for _ in range(2)))
        self.norm_out = nn.GroupNorm(32, CHANNELS[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(CHANNELS[-1], CODE_WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Latents before quantisation."""
        x = self.conv_in(x)
        for number, level in enumerate(self.down):
            x = level(x if number == 0 else F.avg_pool2d(x, 2))
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class PixelDecoder(nn.Module):
    """(B, C, H, W) to (B, 3, 16 H, 16 W)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(CODE_WIDTH, CHANNELS[-1], 3, padding=1)
        self.mid = nn.Sequential(*(ResidualBlock(CHANNELS[-1], CHANNELS[-1]) for _ in range(2)))
        # kept in the encoder's order, finest first, as published
        above = (*CHANNELS[1:], CHANNELS[-1])
        self.up = nn.ModuleList(
            Level(coarse, fine, doubles=number > 0)
            for number, (fine, coarse) in enumerate(zip(CHANNELS, above, strict=True))
        )
        self.norm_out = nn.GroupNorm(32, CHANNELS[0], eps=1e-6)
        self.conv_out = nn.Conv2d(CHANNELS[0], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Pixels, not clamped."""
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))
