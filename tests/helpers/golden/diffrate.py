"""DiffRate: 197 tokens, CLS first, of width 24; CLS is no token of a pruner, so it is put back.

The rates of block 1 drop to 180 patches and merge to 160; the proxy's figures are those of other logits.
"""

import numpy as np
import torch

from prunezoo import PruneInputs, build_pruner
from prunezoo.host.families.cells import grid
from prunezoo.learned.diffrate import kept_number, rank_probability

INPUTS = ("seed", "pruned_to", "merged_to")
ROUNDED = {"grad_of_mask_dot_ramp": 4, "grad_of_kept_number": 4}
COUNT = 196
PLACES = [0, 1, 2, 50, 100, 196]


def proxy(logits):
    """Figures of 197 ranks, of which CLS has rank 0, and always stays."""
    candidates = torch.arange(COUNT, 0, -4).float()
    number = kept_number(logits, candidates) + 1
    ranks = torch.arange(COUNT + 1)
    probability = rank_probability(logits, candidates, ranks)
    hard = (ranks < number.detach()).float()
    mask = hard + probability - probability.detach()
    ramp = ranks / (COUNT + 1)
    (by_mask,) = torch.autograd.grad((mask * ramp).sum(), logits, retain_graph=True)
    (by_number,) = torch.autograd.grad(number, logits)
    return {
        "kept_number": int(number),
        "token_probability_first_and_last": probability[PLACES].tolist(),
        "mask_ones": int(hard.sum()),
        "grad_of_mask_dot_ramp": by_mask[:8].tolist(),
        "grad_of_kept_number": by_number[:8].tolist(),
    }


def answer(case):
    """Rows stand in falling order of attention in the authors' output, and in raster order in ours."""
    random = np.random.default_rng(case["seed"])
    states = torch.from_numpy(random.standard_normal((1, 197, 24)).astype("float32"))
    attention = torch.from_numpy((2 * random.standard_normal((1, COUNT))).astype("float32")).softmax(-1)
    logits = torch.from_numpy(random.standard_normal(49).astype("float32")).requires_grad_()
    pruner = build_pruner("diffrate", blocks=2, tokens=COUNT).eval()
    drop, merge = case["pruned_to"] - 1, case["merged_to"] - 1
    with torch.no_grad():
        pruner.drop[0, (pruner.candidates == drop).nonzero()] = 1000
        pruner.merge[0, (pruner.candidates == merge).nonzero()] = 1000
    cells, valid = grid(14, 14).flatten(0, 1)[None], torch.ones(1, COUNT, dtype=torch.bool)
    inputs = PruneInputs(states[:, 1:], valid, cells, signals={"cls_attention": attention}, layer=1, depth=2)
    with torch.no_grad():
        output = pruner(inputs, merge)
    order = output.scores[0].argsort(descending=True, stable=True).tolist()
    index = output.index[0].tolist()
    columns = [index.index(slot) for slot in order[:merge]]
    rank = {slot: number for number, slot in enumerate(order, 1)}
    groups = output.groups[0].tolist()
    rows, sizes = output.features[0, columns], [1.0, *output.sizes[0, columns].tolist()]
    alive = [slot for slot in range(COUNT) if groups[slot] >= 0]
    return {
        "order_first20": [0, *(slot + 1 for slot in order[:19])],
        "kept_after_prune_are_first_181_of_order": set(alive) == set(order[:drop]),
        "merge_target_of_each_tail_token": [rank[index[groups[slot]]] for slot in order[merge:drop]],
        "x_sum": rows.double().sum().item() + states[0, 0].double().sum().item(),
        "x_rows_1_2": rows[:2].tolist(),
        "size_sum": sum(sizes),
        "sizes_first20": sizes[:20],
        **proxy(logits),
    }
