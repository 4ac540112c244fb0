"""Recoverable Compression: 577 tokens, CLS first, of width 64, with queries and keys of one head and a text score."""

from unittest.mock import patch

import numpy as np
import torch

from prunezoo import PruneInputs
from prunezoo.host.signals.vision import joint_attention
from prunezoo.training_free import recoverable

INPUTS = ("seed",)
ROUNDED = {"norms_of_last_rows": 4}
COUNT = 576


class Given(recoverable.Recoverable):
    """Is told how near the text is: further apart than cosines can be."""

    def near_text(self, inputs):
        return self.near


def made(seed):
    """What a pruner is given, and the text score."""
    random = np.random.default_rng(seed)
    features = random.standard_normal((1, 577, 64)).astype("float32")
    query = (3 * random.standard_normal((1, 577, 64))).astype("float32")
    key = (random.standard_normal((1, 577, 64)) + 0.3 * random.standard_normal((1, 577, 1))).astype("float32")
    near = (0.05 * random.standard_normal((1, 1, COUNT)) ** 3).astype("float32")
    query, key = (torch.from_numpy(part)[:, :, None] for part in (query, key))
    attention = joint_attention(query[:, :1], key, None)[:, 1:]
    signals = {"cls_joint_attention@next": attention, "vision_keys@next": key[:, 1:]}
    valid, cells = torch.ones(1, COUNT, dtype=torch.bool), torch.zeros(1, COUNT, 3).long()
    return PruneInputs(torch.from_numpy(features)[:, 1:], valid, cells, signals=signals), torch.from_numpy(near)[0]


@torch.no_grad()
def answer(case):
    """Theirs stand behind each other: chosen ones, centres as attention falls, the rest; ours in raster order."""
    inputs, near = made(case["seed"])
    pruner = Given(split="outliers", centres_of="width", keys="shifted", weight=50.0).eval()
    pruner.near, calls = near, []

    def watched(values, valid, neighbours):
        found = local(values, valid, neighbours)
        calls.append([int(valid.sum()), neighbours, round(int(found.sum()) / int(valid.sum()), 6)])
        return found

    local = recoverable.local_outliers
    with patch.object(recoverable, "local_outliers", watched):
        count = int(pruner.choose_budget(inputs, None)[0])
    output = pruner(inputs, "auto")
    index, groups, attention = output.index[0].tolist(), output.groups[0], inputs.signal(pruner.needs[0])[0]
    (rest,) = (column for column in range(len(index)) if (groups == column).sum() > 1)
    changed = (output.features[0] != inputs.features[0, index]).any(1).nonzero()[:, 0].tolist()
    centres = sorted(set(changed) - {rest}, key=lambda column: -attention[index[column]])
    rows = output.features[0, [*centres, rest]]
    return {
        "count": count,
        "main_tokens": [slot for column, slot in enumerate(index) if column not in changed],
        "lof_calls_size_neighbours_ratio": calls,
        "clusters": len(centres),
        "int_C_times_last_ratio": int(64 * calls[-1][-1]),
        "norms_of_last_rows": rows.norm(dim=1).tolist(),
        "last_row": rows[-1].tolist(),
    }
