"""PixelPrune: leave out the cells of a picture that their neighbours predict, before the vision tower.

PixelPrune: Pixel-Level Adaptive Visual Token Reduction via Predictive Coding, Wang et al., 2026,
https://arxiv.org/abs/2604.00886, code https://github.com/OPPO-Mente-Lab/PixelPrune.

A cell is predicted by the one to its left (A) or the one above (B): by B where the cell above left (C) is like A and
not like B, since then the picture changes from row to row there, else by A. It stays where it is not like that. Cells
are alike where they differ by no more than a tolerance; at 0 every cell that goes is equal to its prediction, so that
the picture could be filled in again. The first cell always stays; the first row is predicted from the left, the first
column from above.

| | authors' code | ours |
|---|---|---|
| which cells stay | what is not predicted | `keep="auto"`: the same; a number: what is predicted worst |
| tolerance above 0 | from cells as filled in (`anchored`), cell by cell | the same, by anti-diagonals |
| pixels | scaled back to [0, 1] | as the processor normalised them; `tolerance` is in those units |
| crops, tiles | one grid | each by itself |
| clips | not taken | each step of time; `past=true`: or by the same cell a step before |

Pixels must be given as the processor made them: a cast to a half type before that makes unequal ones equal. Noise as in
photographs keeps all cells at a tolerance of 0; a page, drawn or scaled, keeps what is printed on it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, Pruner
from ..core.errors import PruneZooError
from ..core.near import near
from ..core.registry import register_pruner

METRICS = ("max", "mae", "rmse")


@dataclass(frozen=True)
class PixelPruneConfig(PrunerConfig):
    """What counts as like."""

    tolerance: float = 0.0  # >= 0, the largest distance of cells that are alike, in normalised pixels
    metric: str = "max"  # of the distance: largest difference, mean absolute one, or root of the mean square
    anchored: bool = True  # above tolerance 0: predict from cells as filled in, so that errors do not add up
    past: bool = False  # a cell may also be predicted by the same one of the tile (step of time, crop) before

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 <= self.tolerance < float("inf"):
            raise PruneZooError(f"tolerance={self.tolerance} of pixelprune is out of range: it must be at least 0")
        if self.metric not in METRICS:
            raise PruneZooError(f"metric='{self.metric}' of pixelprune is unknown{near(self.metric, METRICS)}")


@register_pruner("pixelprune")
class PixelPrune(Pruner):
    """Top cells by how far they are from what their neighbours say; `keep="auto"` keeps those beyond the tolerance."""

    stage = "input"
    criteria = ("change",)
    config_class = PixelPruneConfig
    config: PixelPruneConfig

    @property
    def threshold(self) -> float:  # type: ignore[override]
        """The tolerance."""
        return self.config.tolerance

    def score(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)`` float32: the distance of a cell from its prediction; more than any for what has none."""
        scores = inputs.features.new_zeros(inputs.valid.shape, dtype=torch.float32)
        for row, (places, cells) in enumerate(inputs.host_grids):
            where = torch.from_numpy(cells).unbind(-1)
            slots = torch.from_numpy(places).to(scores.device)
            shape = (cells.max(0) + 1).tolist()  # of NumPy: the device is not asked
            cube = inputs.features.new_zeros(*shape, inputs.features.shape[-1], dtype=torch.float32)
            taken = torch.zeros(shape, dtype=torch.bool)
            at = tuple(axis.to(cube.device) for axis in where)
            cube[at], taken[where] = inputs.features[row, slots].float(), True
            far = self.residual(cube, taken.to(cube.device))[at]
            most = far.masked_fill(far.isinf(), self.config.tolerance).amax()
            scores[row, slots] = torch.where(far.isinf(), most + 1, far)
        return scores

    def residual(self, cube: Tensor, taken: Tensor) -> Tensor:
        """How far each cell is from its prediction.

        Args:
            cube: ``(tiles, rows, columns, D)``.
            taken: ``(tiles, rows, columns)`` bool: which cells there are.

        Returns:
            ``(tiles, rows, columns)``; infinite where there is no neighbour to predict it from.
        """
        own = self.config
        one_pass = not own.anchored or own.tolerance == 0
        far = self._at_once(cube, taken) if one_pass else self._by_diagonals(cube, taken)
        if own.past:
            there = taken[1:] & taken[:-1]
            before = self._gap(cube[1:], cube[:-1]).masked_fill(~there, torch.inf)
            far[1:] = torch.minimum(far[1:], before)
        return far

    def _at_once(self, cube: Tensor, taken: Tensor) -> Tensor:
        """Neighbours are the cells themselves, so that the differences from left and from above say everything: that
        of C and A is the one from above of a column earlier, that of C and B the one from the left of a row earlier.
        """
        side, down = (torch.full(cube.shape[:3], torch.inf, device=cube.device) for _ in range(2))
        side[:, :, 1:] = self._gap(cube[:, :, 1:], cube[:, :, :-1]).masked_fill(~taken[:, :, :-1], torch.inf)
        down[:, 1:] = self._gap(cube[:, 1:], cube[:, :-1]).masked_fill(~taken[:, :-1], torch.inf)
        far = side.clone()
        far[:, :, 0] = down[:, :, 0]
        by_above = (down[:, 1:, :-1] <= self.config.tolerance) & (side[:, :-1, 1:] > self.config.tolerance)
        far[:, 1:, 1:] = torch.where(by_above, down[:, 1:, 1:], side[:, 1:, 1:])
        return far

    def _by_diagonals(self, cube: Tensor, taken: Tensor) -> Tensor:
        """Neighbours are as filled in: a cell needs those of the two anti-diagonals before."""
        tolerance, known = self.config.tolerance, cube.clone()
        _, rows, columns = taken.shape
        far = torch.full(cube.shape[:3], torch.inf, device=cube.device)
        for diagonal in range(1, rows + columns - 1):
            row = torch.arange(max(0, diagonal - columns + 1), min(rows, diagonal + 1), device=cube.device)
            column = diagonal - row
            up, left = (row - 1).clamp_min(0), (column - 1).clamp_min(0)
            by_side, by_top = known[:, row, left], known[:, up, column]
            corner = known[:, up, left]
            inner = (row > 0) & (column > 0)
            take_top = (self._gap(corner, by_side) <= tolerance) & (self._gap(corner, by_top) > tolerance)
            take_top = (take_top & inner) | (column == 0)
            guess = torch.where(take_top[..., None], by_top, by_side)
            there = torch.where(take_top, taken[:, up, column], taken[:, row, left])
            gap = self._gap(cube[:, row, column], guess).masked_fill(~there, torch.inf)
            far[:, row, column] = gap
            known[:, row, column] = torch.where((gap <= tolerance)[..., None], guess, cube[:, row, column])
        return far

    def _gap(self, one: Tensor, two: Tensor) -> Tensor:
        """The distance of cells ``(..., D)``."""
        apart = (one - two).abs()
        if self.config.metric == "max":
            return apart.amax(-1)
        return apart.mean(-1) if self.config.metric == "mae" else apart.square().mean(-1).sqrt()
