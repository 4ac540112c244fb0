"""The layer stage, before it runs: where a pruner acts on a model, what it reads there, and whether that can work."""

from dataclasses import dataclass
from typing import Self

import torch

from ...core.budgets import Keep
from ...core.contract import Pruner
from ...core.errors import PruneZooError
from ...core.signals import DECODER_SIGNALS, PREVIOUS, Signal, parse_signal
from ..families import Family, find_family, require_float_mask
from ..parts.decoder import Decoder
from ..parts.model import VLM
from .prompt import Positions

Readings = dict[tuple[int, bool], dict[str, Signal]]
"""Signals to read, by name, of the input of a layer (its number), and whether they are for the stage in front of it."""


@dataclass(frozen=True)
class LayerPlan:
    """A pruner of the layer stage, held against a model."""

    family: Family
    decoder: Decoder
    pruner: Pruner
    keep: Keep  # what its last stage leaves of each image
    positions: Positions
    leak: float | None  # of closed gates; None: tokens are dropped
    begun: bool  # its first stage stands in front of all layers, and `run.reduce_early` has seen to it
    stages: tuple[int, ...]  # the layers in front of which the others stand
    readings: Readings

    @classmethod
    def make(cls, vlm: VLM, pruner: Pruner, keep: Keep, positions: Positions, leak: float | None) -> Self:
        """Arguments and errors as of :class:`layer.LayerStage`."""
        family = find_family(vlm)
        decoder = family.decoder()
        stages = pruner.stages(decoder.depth)
        if pruner.given_schedule is not None:
            one = torch.ones(1, dtype=torch.long)
            pruner.steps(one, one, decoder.depth)  # which says whether it fits
        begun = stages[:1] == (0,)
        stages = stages[begun:]
        check_model(family, decoder, pruner.name, stages, positions)
        if pruner.comes_back:
            check_return(family, pruner, begun, leak)
        if leak is not None:
            require_float_mask(vlm)
            family.check_gates()
        return cls(family, decoder, pruner, keep, positions, leak, begun, stages, plan_readings(pruner, stages))


def check_model(family: Family, decoder: Decoder, name: str, stages: tuple[int, ...], positions: Positions) -> None:
    """Refuse what cannot work, naming what would."""
    if not stages or list(stages) != sorted(set(stages)) or stages[-1] >= decoder.depth:
        raise PruneZooError(
            f"pruner '{name}' acts in front of layers {list(stages)}, the decoder has {decoder.depth}: configure "
            "layers that it has, in ascending order"
        )
    first = family.first_layer
    if first == decoder.depth:
        raise PruneZooError(
            f"pruner '{name}' acts between layers of {family.title}, which is not supported: "
            f"{family.first_layer_reason}; use a pruner of the prompt stage"
        )
    if stages[0] < first:
        raise PruneZooError(
            f"pruner '{name}' acts in front of layer {stages[0]}, and {family.title} needs all image tokens in front "
            f"of layer {first} ({family.first_layer_reason}): configure layers from {first} on"
        )
    if stages[-1] > decoder.last_to_cut:
        last = decoder.last_to_cut
        raise PruneZooError(
            f"pruner '{name}' acts in front of layer {stages[-1]}, and later layers of {family.title} attend to the "
            f"keys of layer {last}: configure layers up to {last}"
        )
    if decoder.flash and decoder.scales_by_position:
        raise PruneZooError(
            f"flash attention reads the gaps in the positions of {family.title} as seams: "
            "use attn_implementation 'sdpa'"
        )
    if decoder.kernel not in ("sdpa", "eager") and not decoder.flash:
        raise PruneZooError(f"attn_implementation '{decoder.kernel}' cannot be cut between layers: use 'sdpa'")
    if positions == "compact" and decoder.multimodal_positions:
        raise PruneZooError("positions='compact' means nothing between layers with M-RoPE: use 'original'")


def check_return(family: Family, pruner: Pruner, begun: bool, leak: float | None) -> None:
    """Refuse what tokens cannot come back from."""
    if leak is not None:
        raise PruneZooError(
            f"pruner '{pruner.name}' has tokens come back, which gates cannot: train it with subsets really pruned"
        )
    if begun:
        raise PruneZooError(
            f"pruner '{pruner.name}' drops tokens in front of layer 0, and none that never was in the prompt can come "
            "back: configure layers from 1 on"
        )
    if pruner.comes_back == "raw" and family.first_layer > 1:
        raise PruneZooError(
            f"pruner '{pruner.name}' brings tokens back as they entered layer 0, and with {family.title} "
            f"{family.first_layer_reason}: let them come back as they left"
        )


def plan_readings(pruner: Pruner, stages: tuple[int, ...]) -> Readings:
    """The signals to read, and of which layers' inputs.

    A stage reads the layer that it stands in front of as it would run, a later stage reads it as it did run.
    """
    plan: Readings = {}
    for name in pruner.needs:
        signal = parse_signal(name)
        for stage in stages if signal.kind in DECODER_SIGNALS else ():
            layer = stage - (signal.at == PREVIOUS) if signal.number is None else signal.number
            if layer > stage:
                raise PruneZooError(
                    f"pruner '{pruner.name}' needs '{name}' in front of layer {stage}: that layer runs later"
                )
            plan.setdefault((layer, layer == stage), {})[name] = signal
    return plan
