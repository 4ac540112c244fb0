"""A few numbers on each patch behind a vision block, which any tower has, whatever its width; and a head on them."""

import torch
from torch import Tensor, nn

from ..core.contract import PruneInputs
from ..core.signals import TOWER_ATTENTION

KINDS = ("vision_inputs", "vision_keys", "vision_values")
FACTS = 7
"""How many, besides those that are chosen."""


def facts_needed(attention: str) -> tuple[str, ...]:
    """The signals, with the option `attention`: "received", or "cls" for what CLS attends to besides."""
    more = (TOWER_ATTENTION["cls"],) if attention == "cls" else ()
    return (TOWER_ATTENTION["received"], *more, *KINDS)


def patch_facts(inputs: PruneInputs, attention: str) -> Tensor:
    """Numbers on each patch.

    How far in the block is; then, each with mean 0 and spread 1 over the patches of an image: the logarithm of what it
    receives (and of what CLS gives it), norms of its key, its value and its state, the cosine of its state to what the
    block was given, and to the mean state.

    Args:
        inputs: Behind a block: its output as features, with the signals of :func:`facts_needed`.
        attention: As there.

    Returns:
        ``(B, N, FACTS)`` float32, one more with "cls"; 0 on padding.
    """
    valid = inputs.valid
    count = valid.sum(1, keepdim=True).clamp_min(1)
    states = inputs.features.float()
    entered = inputs.signal("vision_inputs").float()
    mean = states.masked_fill(~valid[..., None], 0).sum(1, keepdim=True) / count[..., None]
    names = [name for name in facts_needed(attention) if name not in KINDS]
    found = [inputs.signal(name).float().clamp_min(torch.finfo(torch.float32).tiny).log() for name in names]
    found += [inputs.signal(name).float().flatten(2).norm(dim=-1) for name in ("vision_keys", "vision_values")]
    found += [states.norm(dim=-1)]
    found += [torch.cosine_similarity(states, other, dim=-1) for other in (entered, mean)]
    values = torch.stack(found, -1).masked_fill(~valid[..., None], 0)  # (B, N, FACTS - 1 or FACTS)
    values = (values - values.sum(1, keepdim=True) / count[..., None]).masked_fill(~valid[..., None], 0)
    spread = (values.square().sum(1, keepdim=True) / count[..., None]).sqrt()
    values = values / spread.clamp_min(1e-6)
    depth = inputs.depth or 1
    place = torch.full_like(values[..., :1], min((inputs.layer or 0) + 1, depth) / depth)
    return torch.cat([place, values], -1).masked_fill(~valid[..., None], 0)


class FactsHead(nn.Module):
    """Facts to one number: two linear maps."""

    def __init__(self, attention: str, hidden: int) -> None:
        super().__init__()
        self.attention = attention
        self.first = nn.Linear(FACTS + (attention == "cls"), hidden)
        self.last = nn.Linear(hidden, 1)

    def forward(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)`` in the type of the weights."""
        facts = patch_facts(inputs, self.attention).to(self.first.weight.dtype)
        return self.last(nn.functional.gelu(self.first(facts)))[..., 0]
