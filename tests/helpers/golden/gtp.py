"""GTP: 197 tokens, CLS first, of width 24; the maps of three heads. CLS is no token of a pruner, so it is put back."""

import numpy as np
import torch

from prunezoo import PruneInputs, build_pruner
from prunezoo.host.families.cells import grid
from prunezoo.training_free.gtp import links, most_like

INPUTS = ("seed", "theta", "standard", "num_prop")
STANDARDS = {"MixedAttnMax": "mixed", "CLSAttnMean": "cls"}
COUNT = 196


def made(seed):
    random = np.random.default_rng(seed)
    states = torch.from_numpy(random.standard_normal((1, 197, 24)).astype("float32"))
    maps = torch.from_numpy((1.5 * random.standard_normal((1, 3, 197, 197))).astype("float32")).softmax(-1)
    signals = {
        "vision_head_attention": maps[:, :, 1:, 1:].movedim(1, 3),
        "cls_head_attention": maps[:, :, 0, 1:].movedim(1, 2),
        "vision_inputs": states[:, 1:],
    }
    cells, valid = grid(14, 14).flatten(0, 1)[None], torch.ones(1, COUNT, dtype=torch.bool)
    return states, PruneInputs(states[:, 1:], valid, cells, signals=signals)


@torch.no_grad()
def answer(case):
    """Kept tokens stand in the order of falling score in the authors' output, and in raster order in ours."""
    states, inputs = made(case["seed"])
    if "standard" not in case:
        semantic, graph = most_like(inputs, 8), links(inputs, 8)
        return {
            "links_of_semantic_graph": int(semantic.sum()),
            "links_of_mixed_graph": int((graph > 0).sum()),
            "graph_sum": graph.sum().item(),
        }
    pruner = build_pruner(
        "gtp", alpha=0.2, standard=STANDARDS[case["standard"]], theta=float(case["theta"]), scales=True
    )
    output = pruner(inputs, COUNT - case["num_prop"])
    order = output.scores[0].argsort(descending=True, stable=True)[: COUNT - case["num_prop"]].tolist()
    kept = output.index[0].tolist()
    column = {slot: number for number, slot in enumerate(kept)}
    scales = [1.0, *(output.sizes[0, column[slot]].item() for slot in order)]
    return {
        "kept_order_first30": order[:30],
        "gone": sorted(set(range(COUNT)) - set(kept)),
        "x_sum": (output.features.double().sum() + states[:, 0].double().sum()).item(),
        "x_row1": output.features[0, column[order[0]]].tolist(),
        "scale_sum": sum(scales),
        "scales_first10": scales[:10],
    }
