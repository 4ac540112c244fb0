"""The prompt stage: encode the images once, then run the language model on all, on some, or on gated tokens.

Only the inputs of the model are rewritten; nothing inside it is touched.
Letters: B rows of the batch, L prompt tokens, R images, N image tokens, K kept, S tokens left of the prompt, V words.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..core.contract import PruneInputs, PruneOutput
from ..core.errors import PruneZooError
from ..core.plan import KeepPlan, gather_rows, mask_to_index
from .families import as_encoder_output, find_family, require_float_mask
from .signals import check_signals, decoder_signals, watch_tower

Positions = Literal["original", "compact"]
IGNORED = -100  # label of a token that is not trained on


@dataclass(frozen=True)
class Encoded:
    """A batch whose images have been through tower and projector, once."""

    inputs: PruneInputs  # a row for each image; no rows where the batch has none
    batch: dict[str, Any]  # what the caller gave, without pixels and labels
    labels: Tensor | None  # (B, L)
    sample: Tensor = field(repr=False)  # (R,) long: the row of the batch that an image belongs to
    slots: Tensor = field(repr=False)  # (R, N) long: the column of each image token; 0 on padding

    @property
    def mask(self) -> Tensor:
        """``(B, L)`` bool, False for padding."""
        return _real(self.batch)

    def image_list(self) -> list[Tensor]:
        """The features of each image without padding: R tensors ``(N, D)``."""
        return [row[valid] for row, valid in zip(self.inputs.features, self.inputs.valid, strict=True)]


@dataclass(frozen=True)
class HostOutput:
    """What the frozen model said."""

    logits: Tensor  # (B, S, V)
    labels: Tensor | None  # (B, S), shortened like the prompt
    hidden_states: tuple[Tensor, ...] | None = None  # where asked for with output_hidden_states
    attentions: tuple[Tensor, ...] | None = None  # (B, H, L, L) a layer, where asked for with output_attentions


def encode(vlm: PreTrainedModel, batch: Mapping[str, Any], needs: tuple[str, ...] = ()) -> Encoded:
    """Run vision tower and projector once, and lay out what pruners and forwards need.

    Args:
        vlm: A supported model.
        batch: What the processor returned, perhaps with ``labels (B, L)``. With labels the pruner's ``text`` is the
            unlabelled tokens before the last labelled one, so an answer never leaks into it.
        needs: Signals to compute, `Pruner.needs`.

    Raises:
        PruneZooError: Unsupported family, unknown signal, or placeholders that do not fit the images.
    """
    check_signals(needs)
    family = find_family(vlm)
    if batch.get("input_ids") is None:
        raise PruneZooError("pruning needs input_ids: inputs_embeds alone do not say where the images are")
    given = {k: v for k, v in batch.items() if k not in ("pixel_values", "labels")}
    given = {k: v.to(vlm.device) if isinstance(v, Tensor) else v for k, v in given.items()}
    ids = given["input_ids"]
    labels = batch["labels"].to(ids.device) if batch.get("labels") is not None else None

    signals: dict[str, Tensor] = {}
    features: list[Tensor] = []
    if batch.get("pixel_values") is not None:
        with watch_tower(family.tower, needs) as signals:
            features = family.features(dict(batch))
    sample, slots, valid = _place(ids == family.image_token_id, [len(f) for f in features])
    embed = vlm.get_input_embeddings()
    padded = _pad(features, embed.weight.new_zeros(0, 0, embed.weight.shape[1]), 0)
    cells = _pad(family.cells(features), slots.new_zeros(0, 0, 3), -1)

    is_prompt = _real(given) & (ids != family.image_token_id)
    if labels is not None:
        # From the right, a labelled token has been met: everything later is template around the end of the answer.
        before_last = (labels != IGNORED).flip(1).cumsum(1).flip(1) > 0
        is_prompt &= (labels == IGNORED) & (before_last | ~before_last.any(1, keepdim=True))
    columns, column_valid = mask_to_index(is_prompt)
    text = embed(ids.gather(1, columns)) if columns.shape[1] else embed(ids[:, :0])
    inputs = PruneInputs(padded, valid, cells, text[sample], column_valid[sample], signals)
    encoded = Encoded(inputs, given, labels, sample, slots)
    signals.update(decoder_signals(vlm, encoded, (columns, column_valid), needs))
    return encoded


def full_forward(vlm: PreTrainedModel, encoded: Encoded, **options: Any) -> HostOutput:
    """The bare model on all tokens, from the encoding at hand: bit for bit what ``vlm(**batch)`` returns.

    Args:
        vlm: The model that made ``encoded``.
        encoded: From :func:`encode`.
        options: Passed to the model, as ``output_hidden_states=True``.
    """
    out = _call(vlm, {**encoded.batch, "mm_encoder_outputs": as_encoder_output(encoded.image_list())}, options)
    return HostOutput(out.logits, encoded.labels, out.hidden_states, out.attentions)


def pruned_forward(
    vlm: PreTrainedModel, encoded: Encoded, output: PruneOutput, positions: Positions = "original", **options: Any
) -> HostOutput:
    """The model on a prompt that really is shorter; logits and labels have its length S.

    Answers can be matched with those of :func:`full_forward` by ``labels != -100``: same tokens, same order.
    """
    shorter, labels, _ = shorten_prompt(vlm, encoded, output, positions)
    out = _call(vlm, shorter, options)
    return HostOutput(out.logits, labels, out.hidden_states)


def gated_forward(
    vlm: PreTrainedModel, encoded: Encoded, gates: Tensor, log_eps: float = 1e-6, **options: Any
) -> HostOutput:
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
    require_float_mask(vlm)
    ids = encoded.batch["input_ids"]
    rows, length = ids.shape
    valid = encoded.inputs.valid
    where = (encoded.sample[:, None].expand_as(encoded.slots)[valid], encoded.slots[valid])
    bias = torch.zeros(rows, length, dtype=gates.dtype, device=ids.device)
    bias = bias.index_put(where, (gates[valid] + log_eps).log())
    causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
    allowed = causal & encoded.mask[:, None, None]
    mask = torch.where(allowed, bias[:, None, None], torch.finfo(vlm.dtype).min).to(vlm.dtype)
    images = as_encoder_output(encoded.image_list())
    out = _call(vlm, {**encoded.batch, "attention_mask": mask, "mm_encoder_outputs": images}, options)
    return HostOutput(out.logits, encoded.labels, out.hidden_states)


def shorten_prompt(
    vlm: PreTrainedModel,
    encoded: Encoded,
    output: PruneOutput,
    positions: Positions = "original",
    generating: bool = False,
) -> tuple[dict[str, Any], Tensor | None, KeepPlan]:
    """Rewrite the inputs of a model to the shorter prompt.

    Args:
        vlm: The model that made ``encoded``.
        encoded: From :func:`encode`.
        output: What is left of each image.
        positions: "original": survivors keep the position ids that they had, and decoding goes on after the last
            original one. "compact": positions are numbered anew without gaps.
        generating: Count positions as `generate` does (over real tokens), not as `forward` does (over columns).

    Returns:
        Inputs for ``vlm(**inputs)``, made anew and free to be edited; the labels ``(B, S)`` or None; the plan.
    """
    check_positions(positions)
    ids, real = encoded.batch["input_ids"], encoded.mask
    keep = torch.ones_like(real)
    rows = encoded.sample[:, None]
    keep[rows.expand_as(encoded.slots)[encoded.inputs.valid], encoded.slots[encoded.inputs.valid]] = False
    kept = gather_rows(encoded.slots, output.index) if output.index.shape[1] else output.index
    keep[rows.expand_as(kept)[output.valid], kept[output.valid]] = True
    plan = KeepPlan.from_mask(keep, real)

    batch = dict(encoded.batch)
    if not plan.identity:
        old = batch.pop("position_ids", None)
        if positions == "original":
            if old is None:
                column = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
                old = (real.long().cumsum(1) - 1).clamp_min(0) if generating else column
            batch["position_ids"] = plan.take(old.expand_as(ids), 0)
        batch["input_ids"] = plan.take(ids, int(find_family(vlm).image_token_id == 0))  # any id but the placeholder's
        # Always explicit, even where it is all ones: without a mask, gaps in the positions would be read as the seams
        # of packed sequences, and no word said.
        batch["attention_mask"] = plan.valid.long()
    features = output.kept_features(encoded.inputs).to(encoded.inputs.features.dtype)
    images = [row[valid] for row, valid in zip(features, output.valid, strict=True) if bool(valid.any())]
    if images:
        batch["mm_encoder_outputs"] = as_encoder_output(images)
    labels = plan.take(encoded.labels, IGNORED) if encoded.labels is not None else None
    return batch, labels, plan


def check_positions(positions: str) -> None:
    """Raise PruneZooError unless ``positions`` is "original" or "compact"."""
    if positions not in ("original", "compact"):
        raise PruneZooError(f"positions='{positions}' is unknown: choose 'original' or 'compact'")


def _call(vlm: PreTrainedModel, inputs: dict[str, Any], options: dict[str, Any]) -> Any:
    """One forward; no cache is filled unless asked for, since nothing is decoded here."""
    return vlm(**{"use_cache": False, **inputs, **options})


def _real(batch: Mapping[str, Any]) -> Tensor:
    """``(B, L)`` bool: the attention mask, all true where none was given."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def _place(is_image: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Deal the placeholders ``(B, L)`` out to images of ``sizes``, in row-major order: sample, slots, valid."""
    row, column = is_image.nonzero(as_tuple=True)
    if len(row) != sum(sizes):
        raise PruneZooError(
            f"the prompt has {len(row)} image placeholders, the images have {sum(sizes)} tokens: use one processor"
        )
    device = is_image.device
    lengths = torch.tensor(sizes, dtype=torch.long, device=device)
    width = max(sizes, default=0)
    step = torch.arange(width, device=device)
    valid = step < lengths[:, None]
    flat = (lengths.cumsum(0) - lengths)[:, None] + step
    flat = flat.masked_fill(~valid, 0)
    sample = row[flat[:, 0]] if sizes else torch.zeros(0, dtype=torch.long, device=device)
    if bool(((row[flat] != sample[:, None]) & valid).any() if sizes else False):
        raise PruneZooError("an image's placeholders run over two samples: use one processor for text and images")
    slots = column[flat].masked_fill(~valid, 0) if sizes else flat
    return sample, slots, valid


def _pad(items: list[Tensor], empty: Tensor, filler: int) -> Tensor:
    """Stack R tensors ``(n, C)`` to ``(R, N, C)``; ``empty`` where there are none."""
    return pad_sequence(items, batch_first=True, padding_value=filler) if items else empty
