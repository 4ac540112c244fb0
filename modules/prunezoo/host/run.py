"""One forward pass under any pruner, whatever its stage: what measuring and training call."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..core.budgets import Keep, counts_of
from ..core.checks import deferred, settle
from ..core.contract import PruneOutput, Pruner
from ..core.errors import PruneZooError
from ..core.memory import Memory
from ..core.plan import KeepPlan, gather_rows
from ..core.staging import STAGES
from .encode import add_decoder_signals, add_late_signals
from .encoded import Encoded
from .families import Family, find_family
from .parts.model import VLM
from .signals.language import check_signals, encode_needs
from .stages.cell_runs import choose_by_cells
from .stages.cut import Cut, Timer, layer_tokens
from .stages.input import check_input_stage, choose_by_pixels
from .stages.layer import LayerStage
from .stages.prompt import HostOutput, Positions, full_forward, gated_forward, shorten_prompt
from .stages.vision import check_vision_stage, choose

Parts = Sequence[tuple[Pruner, Keep]]


@dataclass(frozen=True)
class PrunedRun:
    """What the frozen model said of fewer tokens, and how many it read."""

    host: HostOutput
    layers: Tensor  # (R, depth) long: image tokens that each layer of the language model read
    output: PruneOutput  # what is left at the end, in slots of `encoded.inputs`; scores only where one stage ran
    cuts: tuple[Cut, ...]  # what each stage did
    blocks: Tensor | None = None  # (R, blocks, 2) of the tower, see PruneOutput; None: it ran on all tokens

    @property
    def tokens(self) -> Tensor:
        """``(R,)`` float: image tokens in the language model, mean over its layers."""
        return self.layers.float().mean(1)


def check_parts(family: Family, parts: Parts) -> None:
    """Raise PruneZooError on signals that there are not, or a tower that a stage cannot act in front of or inside."""
    for pruner, _ in parts:
        check_signals(pruner.needs)
        if pruner.stage == "input":
            check_input_stage(family, pruner)
        if pruner.stage == "vision":
            check_vision_stage(family.tower(), pruner)


def split_parts(parts: Parts, depth: int) -> tuple[Parts, tuple[Pruner, Keep] | None]:
    """Those in front of the language model, and the one between its layers; at most one of each stage, in order.

    A pruner of the layer stage that acts in front of layer 0 is among the former, and, if also later, is the latter.

    Args:
        parts: The pruners, each with its ``keep``.
        depth: Number of decoder layers.

    Raises:
        PruneZooError: Two of one stage, or the wrong order.
    """
    order = [STAGES.index(pruner.stage) for pruner, _ in parts]
    if order != sorted(set(order)):
        names = ", ".join(f"{pruner.name} ({pruner.stage})" for pruner, _ in parts)
        raise PruneZooError(f"pruners together must be of different stages, {', '.join(STAGES)} in turn: {names}")
    layer = parts[-1] if parts and parts[-1][0].stage == "layer" else None
    if layer is None:
        return parts, None
    stages = layer[0].stages(depth)
    return parts if stages[:1] == (0,) else parts[:-1], None if stages == (0,) else layer


@contextmanager
def adapted(vlm: VLM, pruners: Sequence[Pruner]) -> Iterator[None]:
    """Enter what each pruner changes in the model."""
    with ExitStack() as stack:
        for pruner in dict.fromkeys(pruners):
            stack.enter_context(pruner.adapt(vlm))
        yield


@dataclass(frozen=True)
class Early:
    """A batch behind the stages in front of the language model."""

    encoded: Encoded
    plans: tuple[KeepPlan, ...]  # what happened to the prompt's columns, by stage
    outputs: tuple[PruneOutput, ...]
    cuts: tuple[Cut, ...]


def find_early(vlm: VLM, encoded: Encoded, pruner: Pruner, keep: Keep) -> tuple[Encoded, Keep]:
    """What a pruner finds in front of the language model, and what it is asked to keep there.

    For a pruner of the layer stage this is its stage in front of layer 0. Nothing is cached there yet, so that the
    prompt itself can get shorter; its later stages keep to the schedule that is made here.
    """
    encoded = replace(encoded, inputs=replace(encoded.inputs, carry={}))  # of a pruner before
    if pruner.stage != "layer":
        return encoded, keep
    counts = encoded.inputs.counts
    asked, found = (torch.tensor(numbers) for numbers in (counts_of(keep, counts), counts))
    depth = find_family(vlm).decoder().depth
    first, *later = pruner.steps(asked, found, depth)
    encoded = add_decoder_signals(vlm, encoded, pruner.needs)
    inputs = replace(encoded.inputs, layer=0, depth=depth, step=0)
    return replace(encoded, inputs=inputs, planned=tuple(later)), pruner.step(inputs, first, len(later))


def reduce_early(
    vlm: VLM,
    encoded: Encoded,
    parts: Parts,
    positions: Positions,
    generating: bool = False,
    memory: Memory | None = None,
    needs: tuple[str, ...] = (),
) -> Early:
    """Prune in front of the language model.

    Args:
        vlm: The model that made ``encoded``.
        encoded: From :func:`encode`, with the signals that the pruners need, if none of them is of the input stage.
        parts: The pruners that act there, each with its ``keep``; from :func:`split_parts`.
        positions: As in :func:`attach`.
        generating: As in :func:`shorten_prompt`.
        memory: What those that remember hold of the streams; None: each call is the first.
        needs: Signals that are wanted behind a pruner of the input stage, here or in the layer stage.
    """
    inside = any(pruner.stage == "vision" for pruner, _ in parts)  # which runs the tower itself
    early = Early(encoded, (), (), ())
    for pruner, keep in parts:
        if encoded.clips and pruner.stage in ("input", "vision"):
            raise PruneZooError(
                f"pruner '{pruner.name}' acts where the tower sees frames one by one, so images cannot be one clip to "
                "it: leave `clips` out, or use a pruner of the prompt or layer stage"
            )
        timer = Timer(encoded.slots.device)
        with timer.running():
            found, asked = find_early(vlm, early.encoded, pruner, keep)
        if memory is not None:
            found = replace(found, inputs=memory.recall(pruner, found.inputs, found.rows, len(found.mask)))
        by_pixels = pruner.stage == "input" and len(found.sample) > 0
        if by_pixels:
            found, output = choose_by_pixels(vlm, found, pruner, asked, needs, not inside, timer)
        elif pruner.stage == "vision" and len(found.sample) and find_family(vlm).tower().joined is not None:
            found, output = choose_by_cells(vlm, found, pruner, asked, timer)
        else:
            output = choose(vlm, found, pruner, asked, timer)
        if memory is not None:
            memory.note(pruner, found.inputs, output, found.rows, len(found.mask))
        layer = 0 if pruner.stage == "layer" else None
        encoded, plan = shorten_prompt(vlm, found, output, positions, generating)
        if by_pixels:
            encoded = add_late_signals(vlm, encoded, needs)
        cut = Cut(pruner.stage, layer, found.tokens, encoded.tokens, timer)
        early = Early(encoded, (*early.plans, plan), (*early.outputs, output), (*early.cuts, cut))
    return early


def run_pruned(
    vlm: VLM,
    encoded: Encoded,
    pruner: Pruner,
    keep: Keep,
    positions: Positions = "original",
    memory: Memory | None = None,
    **options: Any,
) -> PrunedRun:
    """Prune and read on.

    Args:
        vlm: The model that made ``encoded``.
        encoded: From :func:`encode`, with the :func:`encode_needs` of the pruner.
        pruner: Of any stage, or a combination.
        keep: As in :meth:`Pruner.forward`; for the layer stage what its last stage leaves.
        positions: As in :func:`attach`.
        memory: As in :func:`reduce_early`.
        options: Passed to the model.
    """
    parts = pruner.parts(keep)
    depth = find_family(vlm).decoder().depth
    before, layer = split_parts(parts, depth)
    with adapted(vlm, [pruner, *(part for part, _ in parts)]), deferred() as checks:
        early = reduce_early(vlm, encoded, before, positions, memory=memory, needs=encode_needs(pruner))
        cuts, outputs, labels = list(early.cuts), list(early.outputs), early.encoded.labels
        if layer is None or not len(encoded.sample):
            host = full_forward(vlm, early.encoded, **options)
        else:
            labels = None if labels is None else labels.clone()
            with LayerStage(vlm, *layer, positions, memory=memory) as stage:
                prompt = stage.prefill(early.encoded, labels)
                host = full_forward(vlm, early.encoded, **options)
            cuts, outputs = cuts + prompt.cuts, [*outputs, prompt.output]
            checks += prompt.checks
            host = replace(host, labels=labels)
    settle(checks)
    blocks = next((output.blocks for output in outputs if output.blocks is not None), None)
    return PrunedRun(host, layer_tokens(cuts, depth), _chain(outputs), tuple(cuts), blocks)


def run_gated(
    vlm: VLM, encoded: Encoded, pruner: Pruner, keep: Keep, log_eps: float = 1e-6, **options: Any
) -> tuple[HostOutput, list[PruneOutput]]:
    """The model on all tokens, each weighing as much in every attention as the pruner's gates say: for training.

    Gates of the prompt stage act in all layers, those of a layer stage from its layer on; several multiply. Where gates
    are 0 or 1 this is :func:`run_pruned`, up to ``log_eps``, with gradients to every gate. A later stage does not see
    what a gate of value 0 has shut, and sees what is ajar.

    Args:
        vlm: The model that made ``encoded``; its attention must be sdpa or eager.
        encoded: From :func:`encode`, with the :func:`encode_needs` of the pruner.
        pruner: In training mode, of the prompt or layer stage, or a combination.
        keep: As in :func:`run_pruned`.
        log_eps: As in :func:`gated_forward`.
        options: Passed to the model.

    Returns:
        The model's output, labels as they came; and what the pruner said at each of its stages, in slots of
        ``encoded.inputs``.

    Raises:
        PruneZooError: A stage without gates (input, vision), merging, or a pruner that is not in training mode.
    """
    parts = pruner.parts(keep)
    before, layer = split_parts(parts, find_family(vlm).decoder().depth)
    outputs: list[PruneOutput] = []
    with ExitStack() as stack:
        stack.enter_context(adapted(vlm, [pruner, *(part for part, _ in parts)]))
        gates, left = None, encoded
        for part, share in before:
            found, asked = find_early(vlm, left, part, share)
            output = part(found.inputs, asked)
            if part.stage in ("input", "vision") or output.gates is None or output.features is not None:
                raise PruneZooError(f"pruner '{part.name}' gave no gates: put it in training mode; merging has none")
            gates = output.gates if gates is None else gates * output.gates
            left = found.still_open(output)
            outputs.append(output)
        prompt = None
        if layer is not None and len(encoded.sample):
            prompt = stack.enter_context(LayerStage(vlm, *layer, leak=log_eps)).prefill(left)
        if gates is None:
            host = full_forward(vlm, encoded, **options)
        else:
            host = gated_forward(vlm, encoded, gates, log_eps, **options)
        settle(prompt.checks if prompt else ())
        return host, outputs + (prompt.outputs if prompt else [])


def _chain(outputs: list[PruneOutput]) -> PruneOutput:
    """What is left behind several stages, in slots of what the first one found."""
    first, *rest = outputs
    for output in rest:
        index = gather_rows(first.index, output.index).masked_fill(~output.valid, 0)
        first = PruneOutput(index, output.valid, output.features)
    return first
