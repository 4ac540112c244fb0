"""AIM: one matching of 100 tokens by a metric of its own; and the importance of 60 tokens by the logits of 4 heads."""

import numpy as np
import torch

from prunezoo import PruneInputs, build_pruner
from prunezoo.training_free.aim import MAPS, match

INPUTS = ("seed",)
IMAGE = slice(10, 50)
"""Which of the 60 are the image's: any split must give the same."""


def parts(values, dim):
    """Of the image, and of the words."""
    order = torch.arange(values.shape[dim])
    words = torch.cat([order[: IMAGE.start], order[IMAGE.stop :]])
    return values.index_select(dim, order[IMAGE]), values.index_select(dim, words)


def importance(logits):
    """In the order of the sequence."""
    weights = logits.softmax(-1)
    (of_image, of_words), maps = parts(weights, 2), {}
    maps["layer_head_attention"], maps["seen_word_head_attention"] = parts(of_image, 3)
    looked, maps["among_words_head_attention"] = parts(of_words, 3)
    maps["word_head_attention"] = looked.mT
    signals = {name: maps[name].movedim(1, -1) for name in MAPS}
    valid, text_valid = torch.ones(1, 40, dtype=torch.bool), torch.ones(1, 20, dtype=torch.bool)
    inputs = PruneInputs(torch.zeros(1, 40, 1), valid, torch.zeros(1, 40, 3).long(), None, text_valid, signals)
    ours = build_pruner("aim").rank.importance(inputs)[0]
    return torch.cat([ours[40 : 40 + IMAGE.start], ours[:40], ours[40 + IMAGE.start :]])


@torch.no_grad()
def answer(case):
    """Theirs stand in the order of the list: even ones by falling likeness, then the odd ones."""
    random = np.random.default_rng(case["seed"])
    values = torch.from_numpy(random.standard_normal((1, 100, 16)).astype("float32"))
    metric = torch.from_numpy(random.standard_normal((1, 100, 24)).astype("float32"))
    logits = torch.from_numpy(random.standard_normal((1, 4, 60, 60)).astype("float32"))
    above = torch.ones(60, 60, dtype=torch.bool).triu(1)

    valid, cells = torch.ones(1, 100, dtype=torch.bool), torch.zeros(1, 100, 3).long()
    signals = {"vision_keys@next": metric[:, :, None]}
    output = build_pruner("aim", metric="keys").merge(PruneInputs(values, valid, cells, signals=signals), 60)
    _, _, strength = match(metric, valid, torch.arange(100)[None], torch.tensor([40]))
    falling = (2 * strength[0, ::2].argsort(descending=True, stable=True)).tolist()
    order = [*falling[40:], *range(1, 100, 2)]
    rows = output.features[0, output.groups[0, order]]
    return {
        "merged_count": int(output.count[0]),
        "unmerged_then_merged_first3": rows[:3].tolist(),
        "last3": rows[-3:].tolist(),
        "sum": rows.sum().item(),
        "even_tokens_by_descending_best_similarity": falling,
        "importance": importance(logits.masked_fill(above, torch.finfo(torch.float32).min)).tolist(),
    }
