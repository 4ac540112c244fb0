"""PixelPrune: grids of one number a cell, and pictures whose cells are 4 by 4 pixels."""

import numpy as np
import torch

from prunezoo import PruneInputs, build_pruner

INPUTS = ("grid", "image", "metric", "tau", "anchored")


def rectangle(high, wide, *boxes):
    grid = np.zeros((high, wide))
    for top, bottom, left, right, value in boxes:
        grid[top : bottom + 1, left : right + 1] = value
    return grid


def grid_of(name):
    """``(rows, columns)`` or ``(rows, columns, D)``."""
    row, column = np.mgrid[:8, :12]
    line = np.array([0, 0, 1, 2, 2, 3, 5, 5, 4])
    grids = {
        "constant": lambda: np.full((6, 8), 7),
        "rectangle": lambda: rectangle(8, 10, (2, 5, 3, 7, 9)),
        "two_rectangles": lambda: rectangle(9, 11, (2, 5, 3, 7, 9), (4, 7, 6, 9, 5)),
        "text": lambda: (row % 3 != 2) & ((7 * row + 5 * column + (row * column) % 4) % 3 == 0),
        "gradient_columns": lambda: column[:6, :9],
        "gradient_rows": lambda: row[:6, :9],
        "gradient_diagonal": lambda: (row + column)[:6, :9] // 2,
        "noise": lambda: np.random.default_rng(0).integers(0, 6, (8, 10)),
        "binary_noise": lambda: np.random.default_rng(1).integers(0, 2, (8, 10)),
        "vector_cells": lambda: np.random.default_rng(2).integers(0, 3, (7, 8, 4)),
        "noisy_ramp": lambda: (row + column)[:, :10] + np.random.default_rng(3).integers(-1, 2, (8, 10)),
        "one_row": lambda: line[None],
        "one_column": lambda: line[:, None],
    }
    return grids[name]()


def image_of(name):
    """``(rows, columns, 16)``: the cells of a picture."""
    if name == "page":
        y, x = np.mgrid[:32, :48]
        ink = np.isin(y % 8, (2, 3, 4)) & (x >= 4) & (x < 40) & ((3 * x + 5 * (y // 8) + (x // 7) % 3) % 4 == 0)
        image = np.where(ink, 0, 255)
    elif name == "photo":
        y, x = np.mgrid[:24, :32]
        image = 2 * y + 3 * x + np.random.default_rng(4).integers(0, 3, (24, 32))
    else:
        box = (8, 23, 4, 19, 170) if name == "box" else (9, 22, 5, 18, 170)
        image = 30 + rectangle(32, 32, box)
    rows, columns = image.shape[0] // 4, image.shape[1] // 4
    return image.reshape(rows, 4, columns, 4).swapaxes(1, 2).reshape(rows, columns, 16)


def answer(case):
    cells = grid_of(case["grid"]) if "grid" in case else image_of(case["image"])
    rows, columns = cells.shape[:2]
    row, column = np.mgrid[:rows, :columns]
    places = torch.from_numpy(np.stack([np.zeros_like(row), row, column], -1).reshape(1, -1, 3))
    features = torch.from_numpy(cells.reshape(1, rows * columns, -1).astype("float32"))
    inputs = PruneInputs(features, torch.ones(1, rows * columns, dtype=torch.bool), places)
    options = {"tolerance": float(case["tau"]), "metric": case["metric"], "anchored": case["anchored"]}
    kept = build_pruner("pixelprune", **options).eval()(inputs, "auto").index[0].tolist()
    return {"count": len(kept), "kept": kept} | ({"of": rows * columns} if "image" in case else {})
