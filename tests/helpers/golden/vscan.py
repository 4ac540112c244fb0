"""VScan's first stage: 24 blocks of random attention of CLS, random features; and the walk over windows with Qwen."""

import numpy as np
import torch

from prunezoo import PruneInputs, build_pruner
from prunezoo.training_free.vscan import VScanConfig, scan_windows, windows_of

INPUTS = ("seed", "T", "grid", "n", "part")


def softmax(values):
    return torch.from_numpy(values).softmax(-1)


def picture(height, width, features, signals):
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    cells = torch.stack([torch.zeros_like(rows), rows, columns], -1)
    valid = torch.ones(1, height * width, dtype=torch.bool)
    return PruneInputs(features, valid, cells.view(1, -1, 3), signals=signals)


def answer(case):
    random = np.random.default_rng(case["seed"])
    if case.get("part") == "qwen_window":
        height, width = case["grid"]
        scores = softmax((2 * random.standard_normal(height * width)).astype("float32"))[None]
        inputs = picture(height, width, torch.zeros(1, height * width, 1), {})
        windows = windows_of(inputs, VScanConfig(window=4))
        taken = scan_windows(scores, windows, inputs.valid, torch.tensor([case["n"]]), True)[0]
        return {"picked": sorted(taken.nonzero()[:, 0].tolist(), key=lambda i: -float(scores[0, i]))}
    features = torch.from_numpy(random.standard_normal((1, 576, 16)).astype("float32"))
    attention = softmax((2 * random.standard_normal((24, 1, 2, 576))).astype("float32")).mean(2)
    scan, _ = (part for part, _ in build_pruner("vscan", count="floor").parts(1.0))
    signals = {scan.config.early: attention[5], scan.config.late: attention[22]}
    output = scan(picture(24, 24, features, signals), case["T"])
    norms = output.features[0].norm(dim=-1)
    return {
        "count": len(output.index[0]),
        "kept": output.index[0].tolist(),
        "norms_of_first_12_merged": [round(norm, 4) for norm in norms[:12].tolist()],
        "sum_of_norms": round(float(norms.sum()), 3),
        "first_merged_row": [round(value, 4) for value in output.features[0, 0].tolist()],
    }
