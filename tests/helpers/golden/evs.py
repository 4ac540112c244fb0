"""EVS: clips in which two fifths of the cells change from frame to frame."""

import numpy as np
import torch

from prunezoo import PruneInputs, build_pruner
from prunezoo.training_free.evs import published_count

INPUTS = ("seed", "frames", "grid", "q")


def clip(features, frames, rows, columns):
    """What a pruner is given of it."""
    cells = np.stack(np.meshgrid(*map(np.arange, (frames, rows, columns)), indexing="ij"), -1).reshape(1, -1, 3)
    cells = torch.from_numpy(cells)
    valid = torch.ones(cells.shape[:2], dtype=torch.bool)
    return PruneInputs(torch.from_numpy(features)[None], valid, cells, signals={"frame": cells[..., 0]})


def answer(case):
    random, frames, (rows, columns) = np.random.default_rng(case["seed"]), case["frames"], case["grid"]
    cells = rows * columns
    x = [random.standard_normal((cells, 12)).astype("float32")]
    for _ in range(frames - 1):
        moves = (random.random((cells, 1)) < 0.4).astype("float32")
        x.append(
            (x[-1] + moves * random.standard_normal((cells, 12)).astype("float32") * np.float32(0.7)).astype("float32")
        )
    inputs = clip(np.concatenate(x), frames, rows, columns)
    kept = build_pruner("evs").eval()(inputs, published_count(frames, cells, case["q"])).index[0].tolist()
    return {"count": len(kept), "kept": kept}
