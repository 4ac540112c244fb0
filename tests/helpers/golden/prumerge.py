"""PruMerge and PruMerge+: 577 tokens, CLS first, of width 16, with the queries and keys of one head."""

import numpy as np
import torch

from prunezoo import PruneInputs, build_pruner
from prunezoo.host.signals.vision import joint_attention

INPUTS = ("seed", "variant", "adaptive", "ratio")
ROUNDED = {"norms": 4, "sum_of_all": 4}
COUNT = 576


def made(seed):
    """What a pruner is given; attention as the tap of the tower makes it of query and keys."""
    random = np.random.default_rng(seed)
    features = torch.from_numpy(random.standard_normal((1, 577, 16)).astype("float32"))
    query = torch.from_numpy((2 * random.standard_normal((1, 577, 16))).astype("float32"))[:, :, None]
    key = torch.from_numpy(random.standard_normal((1, 577, 16)).astype("float32"))[:, :, None]
    signals = {
        "cls_joint_attention@next": joint_attention(query[:, :1], key, None)[:, 1:],
        "vision_keys@next": key[:, 1:],
    }
    valid, cells = torch.ones(1, COUNT, dtype=torch.bool), torch.zeros(1, COUNT, 3).long()
    return PruneInputs(features[:, 1:], valid, cells, signals=signals)


def in_their_order(inputs, output, top):
    """Rows ``(count, 16)``: the ``top`` most attended as attention falls, those of the grid, the rest."""
    attention, index, valid = output.scores[0], output.index[0], output.valid[0]
    index = index[valid].tolist()
    rest = next(column for column, slot in enumerate(index) if (output.groups[0] == column).sum() > 1)
    order = attention.argsort(descending=True, stable=True)[:top].tolist()
    first = {slot: index.index(slot) for slot in order}
    columns = [first[slot] for slot in order]
    columns += [column for column in range(len(index)) if column not in {*columns, rest}]
    return output.features[0, [*columns, rest]].double()


@torch.no_grad()
def answer(case):
    inputs, given = made(case["seed"]), "variant" in case
    if not given:
        pruner = build_pruner("prumerge", rest="none")
        order = inputs.signals["cls_joint_attention@next"][0].argsort(descending=True, stable=True)
        return {
            "cls_order_first_64": order[:64].tolist(),
            "adaptive_ratio": int(pruner.choose_budget(inputs, None)[0]) / COUNT,
        }
    options = {"rest": "beside"}
    if case["variant"] == "prumerge+":
        options["grid"] = "adaptive" if case["adaptive"] else "fixed"
    pruner = build_pruner("prumerge", **options)
    keep = int(pruner.choose_budget(inputs, None)[0]) if case["adaptive"] else int(COUNT * case["ratio"])
    rows = in_their_order(inputs, pruner(inputs, "auto" if case["adaptive"] else keep), keep)
    return {
        "count": len(rows),
        "features_first4": rows[:4].tolist(),
        "features_last3": rows[-3:].tolist(),
        "sum_of_all": rows.sum().item(),
        "norms": rows.norm(dim=1).tolist(),
    }
