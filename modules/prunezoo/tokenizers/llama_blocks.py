"""Transformer blocks of Llama's make: RMS norms, rotary places, SwiGLU (Touvron et al., 2023, arXiv 2302.13971).

Places have three axes, each turning channels of its own: number in the row, height and width in the picture.

Letters: B pictures, L vectors, W width, H heads, d width of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_HEAD = 32  # d is a multiple of it, so that each of the three axes turns whole pairs of channels
SLOWEST = 100.0  # places over which the slowest channels turn once around; ours


class Block(nn.Module):
    """Attention and SwiGLU, each behind a norm.

    Args:
        width: W.
        heads: H; divides the width into multiples of 32.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        hidden = -(-8 * width // 3 // 64) * 64  # two thirds of 4 W, on whole 64s
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        """(B, L, W) and the angles (L, d / 2) of :func:`turns_of`, to (B, L, W)."""
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        looked = F.scaled_dot_product_attention(turn(query, turns), turn(key, turns), value)
        x = x + self.out(looked.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def turns_of(places: Tensor, head: int) -> Tensor:
    """Angles (L, d / 2) by which each pair of channels of a head is turned.

    Args:
        places: (L, 3), of the three axes, which have 1/8, 7/16 and 7/16 of the channels: 8, 28 and 28 of 64.
        head: d.
    """
    sizes = (head // 8, 7 * head // 16, 7 * head // 16)
    angles = []
    for axis, size in enumerate(sizes):
        speed = SLOWEST ** -(torch.arange(size // 2, device=places.device) * 2 / size)
        angles.append(places[:, axis, None] * speed)
    return torch.cat(angles, dim=-1)


def turn(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the pairs of channels of (B, H, L, d), which stand half a head apart."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = turns.cos().to(x.dtype), turns.sin().to(x.dtype)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def grid_places(grid: int) -> Tensor:
    """Places (grid², 3) of a square grid's cells, in rows; number 0."""
    cells = torch.cartesian_prod(torch.arange(grid), torch.arange(grid)).float()
    return F.pad(cells.view(-1, 2), (1, 0))


def row_places(tokens: int) -> Tensor:
    """Places (tokens, 3) of the tokens of a row: numbers from 1, at no height or width."""
    return F.pad(torch.arange(1, tokens + 1).float()[:, None], (0, 2))


def pool_places(places: Tensor, grid: int) -> Tensor:
    """The middles (grid² / 4, 3) of 2 x 2 cells each."""
    return places.view(grid // 2, 2, grid // 2, 2, 3).mean((1, 3)).view(-1, 3)


def gather_cells(x: Tensor, grid: int) -> Tensor:
    """2 x 2 cells of a grid (B, grid², W) side by side: (B, grid² / 4, 4 W)."""
    x = x.view(len(x), grid // 2, 2, grid // 2, 2, -1).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(len(x), (grid // 2) ** 2, -1)


def spread_cells(x: Tensor, grid: int) -> Tensor:
    """The reverse of :func:`gather_cells`: (B, grid² / 4, 4 W) to (B, grid², W)."""
    x = x.view(len(x), grid // 2, grid // 2, 2, 2, -1).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(len(x), grid**2, -1)
