"""Greedy methods as plain loops over one picture, straight from their formulas: what selection is timed against.

Each takes what a pruner is given, of one picture without padding, and returns the tokens in the order of choice.
"""

import torch
from torch import Tensor
from torch.nn import functional

from prunezoo.core.contract import PruneInputs


def divprune(inputs: PruneInputs, keep: int) -> list[int]:
    """The token whose nearest chosen one is farthest."""
    distance = 1 - _cosine(inputs.features[0])
    chosen = [int(distance.topk(2, dim=0, largest=False).values[1].argmax())]
    while len(chosen) < keep:
        chosen.append(_best(distance[chosen].amin(0), chosen))
    return chosen


def mmr(inputs: PruneInputs, keep: int) -> list[int]:
    """Score less likeness to the nearest chosen one."""
    scores, cosine = inputs.signal("cls_attention")[0], _cosine(inputs.features[0])
    shares = (scores - scores.min()) / (scores.max() - scores.min() + 1e-6)
    chosen = [int(scores.argmax())]
    while len(chosen) < keep:
        chosen.append(_best(0.5 * shares - 0.5 * cosine[chosen].amax(0), chosen))
    return chosen


def scope(inputs: PruneInputs, keep: int) -> list[int]:
    """What covers most that is not covered, times its saliency."""
    values, saliency = _cosine(inputs.signal("vision_states")[0]), inputs.signal("cls_head_attention")[0].sum(1)
    return _cover(values, keep, saliency)


def mmtok(inputs: PruneInputs, keep: int) -> list[int]:
    """The same of words and picture, by softmax."""
    assert inputs.text is not None
    tokens, words = (functional.normalize(own[0], dim=1) for own in (inputs.features, inputs.text))
    text = (words @ tokens.T / 0.02).softmax(1) / len(words)
    picture = (_cosine(inputs.signal("vision_states")[0]) / 0.2).softmax(1) / len(tokens)
    return _cover(torch.cat([text, 0.5 * picture]), keep, torch.ones(len(tokens), device=tokens.device))


def cdpruner(inputs: PruneInputs, keep: int) -> list[int]:
    """The largest determinant, by a growing Cholesky factor."""
    assert inputs.text is not None
    tokens, words = (functional.normalize(own[0], dim=1) for own in (inputs.features, inputs.text))
    raw = (tokens @ words.T).mean(1)
    relevance = (raw - raw.min() + 1e-6) / (raw.max() - raw.min())
    kernel = relevance[:, None] * (tokens @ tokens.T) * relevance
    left, factor = kernel.diagonal().clone(), kernel.new_zeros(keep, len(kernel))
    chosen: list[int] = []
    for step in range(keep):
        best = _best(left, chosen)
        row = kernel[best] - (factor[:step, best, None] * factor[:step]).sum(0)
        factor[step] = row / left[best].sqrt()
        left = left - factor[step] ** 2
        chosen.append(best)
    return chosen


def _cosine(tokens: Tensor) -> Tensor:
    """``(N, N)`` of ``(N, C)``."""
    unit = functional.normalize(tokens, dim=1)
    return unit @ unit.T


def _best(gains: Tensor, chosen: list[int]) -> int:
    """The token with the largest gain that is not chosen."""
    gains = gains.clone()
    gains[chosen] = -torch.inf
    return int(gains.argmax())


def _cover(values: Tensor, keep: int, weight: Tensor) -> list[int]:
    """Greedy coverage of the rows ``(R, N)``."""
    chosen: list[int] = []
    covered = values.new_zeros(len(values))
    while len(chosen) < keep:
        best = _best((values - covered[:, None]).clamp_min(0).sum(0) * weight, chosen)
        covered = covered.maximum(values[:, best])
        chosen.append(best)
    return chosen


LOOPS = {"divprune": divprune, "fastervlm?select=mmr": mmr, "scope": scope, "mmtok": mmtok, "cdpruner": cdpruner}
"""By the name of the pruner that chooses the same."""
