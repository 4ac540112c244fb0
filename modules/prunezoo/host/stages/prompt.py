"""The prompt stage: run the language model on all image tokens, on some, or on gated ones.

Only the inputs of the model are rewritten; nothing inside it is touched.
Letters: B rows of the batch, L prompt tokens, R images (or clips), N patches, K kept, S tokens left of the prompt,
V words, D width.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ...core.contract import PruneOutput
from ...core.errors import PruneZooError
from ...core.near import near
from ...core.plan import KeepPlan
from ..encoded import Encoded, put
from ..families import find_family, require_float_mask
from ..parts.model import VLM

Positions = Literal["original", "compact"]
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
"""Inputs that have a value for each token of the prompt."""


@dataclass(frozen=True)
class HostOutput:
    """What the frozen model said."""

    logits: Tensor  # (B, S, V)
    labels: Tensor | None  # (B, S), shortened like the prompt
    hidden_states: tuple[Tensor, ...] | None = None  # where asked for with output_hidden_states
    attentions: tuple[Tensor, ...] | None = None  # (B, H, L, L) a layer, where asked for with output_attentions


def full_forward(vlm: VLM, encoded: Encoded, **options: Any) -> HostOutput:
    """The bare model on all tokens, from the encoding at hand: bit for bit what ``vlm(**batch)`` returns.

    Args:
        vlm: The model that made ``encoded``.
        encoded: From :func:`encode`.
        options: Passed to the model, as ``output_hidden_states=True``.
    """
    out = _call(vlm, encoded.model_inputs(vlm), options)
    return HostOutput(out.logits, encoded.labels, out.hidden_states, out.attentions)


def pruned_forward(
    vlm: VLM, encoded: Encoded, output: PruneOutput, positions: Positions = "original", **options: Any
) -> HostOutput:
    """The model on a prompt that really is shorter; logits and labels have its length S.

    Answers can be matched with those of :func:`full_forward` by ``labels != -100``: same tokens, same order.
    """
    shorter, _ = shorten_prompt(vlm, encoded, output, positions)
    return full_forward(vlm, shorter, **options)


def gated_forward(vlm: VLM, encoded: Encoded, gates: Tensor, log_eps: float = 1e-6, **options: Any) -> HostOutput:
    """The model on all tokens, where each visual token weighs as much in every attention as its gate says.

    ``log(gate + log_eps)`` is added to the attention logits of the visual keys, so a gate scales the token's weight
    before normalisation: 1 is the token itself, 0 is (up to ``log_eps``) the token dropped, with a useful gradient at
    both ends. Nothing gets shorter.

    Args:
        vlm: The model that made ``encoded``; its attention must be sdpa or eager.
        encoded: From :func:`encode`.
        gates: ``(R, N)`` in [0, 1].
        log_eps: Weight that a closed gate still leaks, > 0; what makes its gradient finite.
        options: Passed to the model.
    """
    family = find_family(vlm)
    require_float_mask(family.vlm)
    family.check_gates()
    real, weight = encoded.mask, gate_weights(encoded, gates, log_eps)
    allowed = family.visible(encoded.batch, real)
    dtype = family.vlm.dtype
    mask = torch.where(allowed, weight.log().to(dtype)[:, None, None], torch.finfo(dtype).min)
    batch = encoded.model_inputs(vlm, position_ids=family.positions(encoded.batch, real, generating=False))
    out = _call(vlm, {**batch, "attention_mask": family.own_mask(mask)}, options)
    return HostOutput(out.logits, encoded.labels, out.hidden_states, out.attentions)


def gate_weights(encoded: Encoded, gates: Tensor, log_eps: float) -> Tensor:
    """``(B, L)``: what each column of the prompt weighs in attention under ``gates (R, N)``; 1 where no image is."""
    valid, newlines = encoded.inputs.valid, encoded.newlines
    weight = torch.ones(encoded.mask.shape, dtype=gates.dtype, device=gates.device)
    weight = put(weight, encoded.sample, encoded.slots, valid, gates + log_eps)
    if newlines is not None:  # as open as the most open gate of its row
        open_ = gates.new_zeros(len(gates), newlines.valid.shape[1] + 1)
        open_ = open_.scatter_reduce(1, newlines.ends, gates.masked_fill(~valid, 0), "amax")[:, :-1]
        weight = put(weight, encoded.sample, newlines.slots, newlines.valid, open_ + log_eps)
    return weight


def shorten_prompt(
    vlm: VLM,
    encoded: Encoded,
    output: PruneOutput,
    positions: Positions = "original",
    generating: bool = False,
) -> tuple[Encoded, KeepPlan]:
    """Rewrite a batch to the shorter prompt, for the next stage or for the model.

    Args:
        vlm: The model that made ``encoded``.
        encoded: From :func:`encode`, or from here.
        output: What is left of each image, by a pruner of the vision or prompt stage.
        positions: "original": survivors keep the position ids that they had, and decoding goes on after the last
            original one. "compact": positions are numbered anew without gaps.
        generating: Count positions as `generate` does (over real tokens), not as `forward` does (over columns).

    Returns:
        The shorter batch, whose ``model_inputs`` the model takes; and what became of the columns.
    """
    check_positions(positions)
    family = find_family(vlm)
    ids, real = encoded.batch["input_ids"], encoded.mask
    plan, lines = encoded.plan(output)

    batch = dict(encoded.batch)
    if not plan.identity:
        old = family.positions(batch, real, generating)
        for key in ("position_ids", *family.position_keys):
            batch.pop(key, None)
        if positions == "original":
            batch["position_ids"] = plan.take(old.movedim(-2, 0).movedim(-1, 1), 0).movedim(1, -1).movedim(0, -2)
        elif old.dim() > 2:
            raise PruneZooError(
                f"positions='compact' means nothing where tokens have a place in time, height and width: "
                f"use 'original' with {family.title}"
            )
        batch["input_ids"] = plan.take(ids, family.filler)
        batch.update({name: plan.take(batch[name], 0) for name in TOKEN_TYPES if batch.get(name) is not None})
        # Always explicit, even where it is all ones: without a mask, gaps in the positions would be read as the seams
        # of packed sequences, and no word said.
        batch["attention_mask"] = plan.valid.long()
    return encoded.after(output, plan, lines, batch), plan


def check_positions(positions: str) -> None:
    """Raise PruneZooError unless ``positions`` is "original" or "compact"."""
    if positions not in get_args(Positions):
        raise PruneZooError(f"positions='{positions}' is unknown{near(positions, get_args(Positions))}")


def _call(vlm: VLM, inputs: dict[str, Any], options: dict[str, Any]) -> Any:
    """One forward; no cache is filled unless asked for, since nothing is decoded here."""
    return vlm(**{"use_cache": False, **inputs, **options})
