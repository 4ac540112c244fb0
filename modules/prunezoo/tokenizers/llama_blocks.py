"""Transformer blocks of Llama's make: RMS norms, rotary places, SwiGLU (Touvron et al., 2023, arXiv 2302.13971).

Places have three axes, each turning channels of its own: number in the row, height and width in the picture. Ours is
how the blocks start: by looking at what is near, after mimetic initialisation (Trockman and Kolter, arXiv 2305.09828).

Letters: B pictures, L vectors, W width, H heads, d width of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_HEAD = 32  # d is a multiple of it, so that each of the three axes turns whole pairs of channels
NEAR = 4.0  # how much larger than usual queries and keys start: a patch near by gets a third of a look; ours
SMALL = 0.1  # likewise, of what should hardly count at the start
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
        self.look_near()

    @torch.no_grad()
    def look_near(self) -> None:
        """Start by looking at givers near by and handing on what they hold; see :func:`mark`.

        Queries read either mark and keys the givers', by the same map, so places decide. What is handed on is the
        second half of the channels, which has no marks.
        """
        quarter, half = quarters(self.norm1.weight.shape[0])
        query, key, value = self.qkv.weight.chunk(3)
        query[:, :quarter] *= NEAR
        query[:, quarter:half] = query[:, :quarter]
        query[:, half:] *= SMALL
        key[:, :quarter] = query[:, :quarter]
        key[:, quarter:] *= SMALL
        value[:, :half] *= SMALL
        self.out.weight[:half] *= SMALL
        self.out.weight[half:] *= 2.0  # as only half of the channels is handed on
        self.down.weight *= SMALL

    def forward(self, x: Tensor, turns: Tensor) -> Tensor:
        """(B, L, W) and the angles (L, d / 2) of :func:`turns_of`, to (B, L, W)."""
        query, key, value = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        looked = F.scaled_dot_product_attention(turn(query, turns), turn(key, turns), value)
        x = x + self.out(looked.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


def quarters(width: int) -> tuple[int, int]:
    """Where the marks of givers end, and those of takers."""
    return width // 4, width // 2


@torch.no_grad()
def mark(vectors: Tensor, gives: bool) -> None:
    """Start vectors (..., W) as givers, whom all look for, by their first quarter, or as takers, by the second."""
    quarter, half = quarters(vectors.shape[-1])
    vectors[..., :half] *= SMALL
    vectors[..., slice(0, quarter) if gives else slice(quarter, half)] += 1.0


@torch.no_grad()
def start_as_mean(merge: nn.Linear) -> None:
    """Start a map (4 W to W) of 2 x 2 cells side by side as their mean, marks included."""
    width = merge.out_features
    merge.weight *= SMALL
    merge.weight += torch.eye(width).repeat(1, 4) / 4


@torch.no_grad()
def start_as_copies(split: nn.Linear) -> None:
    """Start a map (W to 4 W) into 2 x 2 cells as four copies."""
    split.weight *= SMALL
    split.weight += torch.eye(split.in_features).repeat(4, 1)


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


def row_places(tokens: int, grid: int) -> Tensor:
    """Places (tokens, 3) of the tokens of a row: numbers from 1, spread evenly over a grid, as is every prefix."""
    numbers = torch.arange(1, tokens + 1).float()[:, None]
    spread = torch.quasirandom.SobolEngine(2).draw(tokens + 1)[1:]  # the first one is the corner
    return torch.cat([numbers, spread * grid - 0.5], dim=1)


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
