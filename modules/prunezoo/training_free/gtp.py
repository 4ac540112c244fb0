"""GTP-ViT: drop patches in every block of the vision tower, and hand what they held on to their neighbours in a graph.

GTP-ViT: Efficient Vision Transformers via Graph-based Token Propagation, Xu et al., WACV 2024,
https://arxiv.org/abs/2311.03035, code https://github.com/Ackesnal/GTP-ViT. Written from a description of the code.

The graph is made once, of what the first block is given: a patch is linked to its eight neighbours in the grid, and to
the eight patches most like it by cosine; G is 0 or 1, and its rows' degrees D make it D^-1/2 G D^-1/2. In each block,
between attention and MLP, a patch is rated by how much it looks at itself times how much it receives (each the largest
over heads; what is received, the sum over all rows). The lowest ones go, and

    kept = kept + alpha * graph[kept, dropped] dropped,

from where on the graph is that among the kept ones, as it stands.

| | authors' code | ours |
|---|---|---|
| how many in each block | a number P, or a list | as many in each block |
| order of what is kept | falling score | raster |
| theta: the share of each head's map that is left, the largest entries | in the attention, so in scores | in scores |
| token scales | `scales`: what a token is handed counts in attention | the same |
| a patch without links | divides by 0 | is handed nothing |
| no CLS | its rows are left out, 9 links by likeness | `attention="received"`: rows left out, 8 links |
| scores by CLS, mean over heads | `CLSAttnMean` | `standard="cls"` |
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ..core.config import PrunerConfig
from ..core.contract import PruneInputs, PruneOutput, Pruner
from ..core.errors import PruneZooError
from ..core.gates import topk_mask
from ..core.plan import gather_rows, mask_to_index
from ..core.registry import register_pruner
from ._tower_graph import SIGNALS, head_maps

STANDARDS = ("mixed", "cls")


@dataclass(frozen=True)
class GTPConfig(PrunerConfig):
    """Settings of GTP."""

    attention: str = "cls"  # "cls": the row of CLS counts too; "received" for vision towers without CLS
    standard: str = "mixed"  # what rates a patch: "mixed", to itself times received, or "cls", what CLS attends to
    alpha: float = 0.1  # how much of what is dropped is handed on, at least 0
    theta: float = 1.0  # share of the entries of a head's map that are counted, the largest ones, in (0, 1]
    links: int = 8  # links of a patch to those most like it, at least 0
    scales: bool = False  # what a token is handed lets it count more in the attention of the blocks behind

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check_choices("gtp", attention=SIGNALS, standard=STANDARDS)
        if self.standard == "cls" and self.attention != "cls":
            raise PruneZooError("standard='cls' of gtp reads what CLS attends to: set attention='cls'")
        if self.alpha < 0:
            raise PruneZooError(f"alpha={self.alpha} of gtp is out of range: it is at least 0")
        if not 0 < self.theta <= 1:
            raise PruneZooError(f"theta={self.theta} of gtp is out of range: it is a share in (0, 1]")
        if self.links < 0:
            raise PruneZooError(f"links={self.links} of gtp is out of range: it is at least 0")


@register_pruner("gtp")
class GTP(Pruner):
    """Rated by the attention map, propagated along a graph, in all blocks."""

    stage = "vision"
    criteria = ("attention", "similarity")
    merges = True
    config_class = GTPConfig
    config: GTPConfig

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]  # a class attribute where it is not configured
        """Maps of the block, and what enters it."""
        return (*SIGNALS[self.config.attention], "vision_inputs")

    def stages(self, depth: int) -> tuple[int, ...]:
        """All blocks."""
        return tuple(range(depth))

    def schedule(self, keep: Tensor, available: Tensor, depth: int) -> list[Tensor]:
        """As many fewer in each block."""
        fewer = (available - keep).double() / depth
        return [*((available - fewer * (block + 1)).round().long() for block in range(depth - 1)), keep]

    def rate(self, inputs: PruneInputs) -> Tensor:
        """``(B, N)`` float32."""
        maps = head_maps(inputs, SIGNALS[self.config.attention])
        maps = sparse(maps, inputs.counts, self.config.theta)
        prefix = maps.shape[2] - inputs.valid.shape[1]
        if self.config.standard == "cls":
            return maps[:, :, 0, prefix:].mean(1)
        own, received = maps.diagonal(dim1=2, dim2=3), maps.sum(2)
        return (own.amax(1) * received.amax(1))[:, prefix:]

    def reduce(self, inputs: PruneInputs, keep: Tensor) -> PruneOutput:
        """Rate, drop, hand on."""
        scores = self.rate(inputs)
        chosen = topk_mask(scores, inputs.valid, keep)
        index, valid = mask_to_index(chosen, inputs.most_asked)
        if "graph" in inputs.carry:
            rows, numbers = inputs.carry["graph"], inputs.carry["number"]  # columns are patches of the first block
            graph = rows.gather(2, numbers[:, None].expand(-1, rows.shape[1], -1))
        else:
            rows = graph = links(inputs, self.config.links)
            numbers = torch.arange(graph.shape[1], device=graph.device).expand(len(graph), -1)
        dropped = inputs.valid & ~chosen
        handed = self.config.alpha * gather_rows(graph, index) * dropped[:, None]  # (B, K, N)
        features = gather_rows(inputs.features, index) + (handed @ inputs.features.float()).to(inputs.features.dtype)
        sizes = None
        if self.config.scales:
            scale = inputs.valid.float() if inputs.sizes is None else inputs.sizes
            sizes = gather_rows(scale, index) + (handed @ scale[..., None])[..., 0]
        carry = {"graph": rows, "number": numbers}
        return PruneOutput(index, valid, features, scores=scores, carry=carry, sizes=sizes)


def sparse(maps: Tensor, counts: tuple[int, ...], theta: float) -> Tensor:
    """Maps whose entries below a quantile of each head's are 0.

    Args:
        maps: ``(B, H, S, S)`` of :func:`head_maps`.
        counts: (B) patches of each image; padding is no entry.
        theta: Share of the entries that is left.
    """
    if theta == 1:
        return maps
    prefix, flat = maps.shape[2] - max(counts), maps.flatten(2)
    floors = []
    for own, count in zip(flat, counts, strict=True):
        entries = (count + prefix) ** 2
        place = int(entries * (1 - theta)) + own.shape[1] - entries  # padding is 0, below all others
        floors.append(own.kthvalue(max(place, 1), dim=1, keepdim=True).values)
    return flat.masked_fill(flat < torch.stack(floors), 0).view_as(maps)


def links(inputs: PruneInputs, count: int) -> Tensor:
    """The graph of the patches that a first block is given.

    Args:
        inputs: With the signal ``vision_inputs``.
        count: Links of each patch by likeness.

    Returns:
        ``(B, N, N)`` float32; 0 on padding and on the diagonal.
    """
    tile, place = inputs.cells[..., :1], inputs.cells[..., 1:]
    near = ((place[:, :, None] - place[:, None]).abs().amax(-1) == 1) & (tile == tile.mT)
    both = inputs.valid[:, None] & inputs.valid[..., None]
    graph = ((near | most_like(inputs, count)) & both).float()
    degree = graph.sum(2).clamp_min(1).rsqrt()
    return degree[:, :, None] * graph * degree[:, None]


def most_like(inputs: PruneInputs, count: int) -> Tensor:
    """``(B, N, N)`` bool: the ``count`` others that a patch (row) is most like, by cosine; fewer where there are fewer.

    Rows of padding are arbitrary.
    """
    unit = functional.normalize(inputs.signal("vision_inputs").float(), dim=-1)
    itself = torch.eye(unit.shape[1], dtype=torch.bool, device=unit.device)
    others = inputs.valid[:, None] & ~itself
    best = (unit @ unit.mT).masked_fill(~others, -torch.inf).topk(min(count, unit.shape[1]), dim=2).indices
    return torch.zeros_like(others).scatter(2, best, True) & others
