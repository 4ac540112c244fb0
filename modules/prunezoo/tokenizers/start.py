"""How a One-D-Piece starts, as a coder of what is near: places in half of the channels, what is there in the other.

Letters: N tokens, W width, M places.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NOISE = 0.02  # spread of what starts at zero


@torch.no_grad()
def enter_what(weight: Tensor, std: float) -> None:
    """Start a map into the tokens such that it fills the second half of their channels, with weights of this spread."""
    half = weight.shape[0] // 2
    nn.init.normal_(weight, std=NOISE / weight[0].numel() ** 0.5)
    nn.init.normal_(weight[half:], std=std)


def make_layers(count: int, width: int, heads: int) -> nn.ModuleList:
    """Pre-norm transformer layers that start out by looking at givers near by and handing on what these hold.

    Queries and keys start as the same map of the first half of the channels, values and outputs as the identity on the
    second (after mimetic initialisation, Trockman and Kolter, arXiv 2305.09828).
    """
    layers = [
        nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        for _ in range(count)
    ]
    half = width // 2
    what = torch.diag((torch.arange(width) >= half).float())
    with torch.no_grad():
        for layer in layers:
            attention = layer.self_attn
            nn.init.normal_(attention.in_proj_weight, std=NOISE)
            nn.init.normal_(attention.out_proj.weight, std=NOISE)
            query, key, value = attention.in_proj_weight.chunk(3)
            near = torch.randn(width, half) * (2 / half) ** 0.5
            query[:, :half] += near
            key[:, :half] += near
            # channel 0 tells givers from takers, and all look for givers
            giver = torch.randn(width) * (12 / width**0.5)
            query[:, 0], key[:, 0] = 0.0, giver
            attention.in_proj_bias[:width] = giver
            value += what
            attention.out_proj.weight += 0.5 * what
            layer.linear2.weight *= 0.2
    return nn.ModuleList(layers)


def grid_places(grid: int, width: int, gives: bool) -> Tensor:
    """Where the class token (nowhere) and each patch of a square grid stand: (1 + grid², W)."""
    middles = (torch.arange(grid) + 0.5) / grid
    return F.pad(mark_places(torch.cartesian_prod(middles, middles), grid, width, gives), (0, 0, 1, 0))


def token_places(tokens: int, grid: int, width: int, gives: bool, spread: bool) -> Tensor:
    """Places for the tokens of a row: (N, W). ``spread`` evenly, so is every prefix of them; else at random."""
    if not spread:
        return 0.5 * torch.randn(tokens, width)  # about as large as the marks of a place
    return mark_places(torch.quasirandom.SobolEngine(2).fast_forward(1).draw(tokens), grid, width, gives)


def mark_places(places: Tensor, grid: int, width: int, gives: bool) -> Tensor:
    """Places in [0, 1]² as the first half of the channels, from half a turn a picture to half a turn a patch.

    Args:
        places: (M, 2).
        grid: Patches along a side.
        width: W.
        gives: Whether what stands there starts as a giver (channel 0 is 1) or as a taker (-1).

    Returns:
        (M, W); the second half is zero, but for noise.
    """
    turns = math.pi * torch.logspace(0, math.log2(max(grid, 2)), width // 8, base=2.0)
    angles = (places[..., None].to(turns.device) * turns).flatten(-2)
    marks = F.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, width - 4 * (width // 8)))
    marks[:, 0] = 1.0 if gives else -1.0
    return marks + NOISE * torch.randn_like(marks)
