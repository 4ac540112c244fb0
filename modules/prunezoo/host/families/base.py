"""What the host asks of a family of vision-language models, and what most families have in common.

Letters: B rows of the batch, L prompt tokens, n tokens of one image or clip, D width of the language model.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ...core.errors import PruneZooError
from ..parts.decoder import Decoder
from ..parts.tower import Tower
from .gaps import PIXELS, Gaps, Kind, Shortening, no_gaps
from .spread import Values, spread

Order = Literal["tower", "given"]
TAKES_FEATURES = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 19)
"""Whether models take encoded images beside ``input_ids``. 5.18 does, but deals them out to the wrong beams."""

Watch = Callable[[], AbstractContextManager[Mapping[str, Values]]]


def no_signals() -> AbstractContextManager[Mapping[str, Values]]:
    """Watches nothing."""
    return nullcontext({})


@dataclass(frozen=True)
class Visual:
    """An image or a clip that has been through tower and projector: its tokens in the order of their placeholders."""

    kind: Kind
    features: Tensor  # (n, D)
    cells: Tensor  # (n, 3) long, on the host: tile, row, column; see Family.cells
    deep: tuple[Tensor, ...] = ()  # (n, D) each: what is added to them behind the first decoder layers (deepstack)
    signals: Mapping[str, Tensor] = field(default_factory=dict)  # (n, ...) each, by name: those of the tower


class Family(Shortening):
    """Adapter of a family: where its parts are, what its tokens are, and in which form it takes its inputs.

    Args:
        vlm: The model.

    Raises:
        PruneZooError: A configuration of the family that would be pruned wrongly without a word.
    """

    encoder_keys: ClassVar[Mapping[Kind, tuple[str, ...]]] = {"image": ("pixel_values",)}  # inputs of the encoder
    position_keys: ClassVar[tuple[str, ...]] = ()  # those among them that the positions depend on too
    as_tensor: ClassVar[tuple[Kind, ...]] = ()  # kinds whose features the model wants as one tensor, not as a list
    first_layer_reason: ClassVar[str] = "its cache tells the model how long the conversation is"

    def __init__(self, vlm: PreTrainedModel) -> None:
        self.vlm: Any = vlm
        self.config: Any = vlm.config
        self.check()

    def check(self) -> None:
        """Refuse what is not supported of the family."""

    # What the tokens are

    @property
    def placeholders(self) -> dict[Kind, int]:
        """The token that stands for each visual token in the prompt, by kind."""
        return {kind: getattr(self.config, f"{kind}_token_id") for kind in self.encoder_keys}

    @property
    def filler(self) -> int:
        """A token that is no placeholder, for columns of padding."""
        return next(token for token in range(len(PIXELS) + 1) if token not in self.placeholders.values())

    @property
    def consumed(self) -> set[str]:
        """Inputs that are of no more use once the images are encoded."""
        return {key for keys in self.encoder_keys.values() for key in keys} - set(self.position_keys)

    def is_visual(self, ids: Tensor) -> Tensor:
        """``(B, L)`` bool: which ids are placeholders."""
        return torch.isin(ids, torch.tensor(list(self.placeholders.values()), device=ids.device))

    def visuals(self, batch: Mapping[str, Any], watch: Watch = no_signals, gaps: Gaps = no_gaps) -> list[Visual]:
        """Run tower and projector once: all images, in the order of their placeholders, then all clips.

        Args:
            batch: The processor's output, on the model's device, but ``input_ids``, which are on the host.
            watch: Entered around each run of the tower; gives the signals that it made of it, by name.
            gaps: Likewise; leaves patches out.

        Raises:
            PruneZooError: Inputs that the family does not know, or that do not fit one another; what ``watch`` raises.
        """
        found = []
        for kind in self.kinds(batch):
            cells = self.cells(kind, batch)  # first: it tells plainly which inputs are missing
            with gaps(kind, batch) as gap, watch() as seen:
                output = self.run_encoder(kind, batch)
            sizes = [len(own) for own in cells]
            levels = [_rows(level) for level in getattr(output, "deepstack_features", None) or ()]
            rows = _rows(self.pooled(kind, output))
            if sum(sizes) != len(rows):
                raise PruneZooError(
                    f"{self.title}: the prompt's placeholders stand for {sum(sizes)} {kind} tokens, the pixels make "
                    f"{len(rows)}: use one processor for text and images"
                )
            whole = {name: values if name == "pixels" else gap.whole(values) for name, values in seen.items()}
            signals = {name: spread(self, kind, batch, name, values, sizes) for name, values in whole.items()}
            parts = zip(rows.split(sizes), cells, *(level.split(sizes) for level in levels), strict=True)
            for i, (own, where, *deep) in enumerate(parts):
                own_signals = {name: values[i] for name, values in signals.items()}
                found.append(Visual(kind, own, where, tuple(deep), own_signals))
        return found

    def outlines(self, batch: Mapping[str, Any], like: Tensor) -> list[Visual]:
        """What :meth:`visuals` gives, with zeros of the type and width of ``like`` for features: nothing is run."""
        return [
            Visual(kind, like.new_zeros(len(cells), like.shape[-1]), cells)
            for kind in self.kinds(batch)
            for cells in self.cells(kind, batch)
        ]

    def kinds(self, batch: Mapping[str, Any]) -> list[Kind]:
        """What there are pixels of.

        Raises:
            PruneZooError: Inputs that the family does not know.
        """
        for key in ("vision_feature_layer", "vision_feature_select_strategy", "vision_aspect_ratio"):
            if batch.get(key) is not None:
                raise PruneZooError(f"'{key}' in the call is not supported while pruning: set it in the model's config")
        kinds = [kind for kind, pixels in PIXELS.items() if batch.get(pixels) is not None]
        for kind in kinds:
            if kind not in self.encoder_keys:
                raise PruneZooError(
                    f"{self.title} reads no {PIXELS[kind]} while pruning: pass a clip's frames as images"
                )
        return kinds

    def run_encoder(self, kind: Kind, batch: Mapping[str, Any]) -> Any:
        """What the model's own tower and projector give."""
        pixels, *others = self.encoder_keys[kind]
        inputs = {key: batch[key] for key in others if batch.get(key) is not None}
        return getattr(self.vlm.model, f"get_{kind}_features")(batch[pixels], **inputs, return_dict=True)

    def deal(self, kind: Kind, batch: Mapping[str, Any], values: Tensor, order: Order = "tower") -> Tensor:
        """Deal what the tower has of each patch out to the tokens of the language model.

        Args:
            kind: What was run.
            batch: What it was run on.
            values: ``(R, N, C)``, a row for each picture that the tower saw, in an order of its patches.
            order: The "tower"'s own, or that in which the patches are "given" to it.

        Returns:
            ``(n, k, C)``, images in the order of their placeholders: the k patches of each token, rows of a square one
            after the other, 0 where it has none; k is 1 where features, and so ``values``, are interpolated.

        Raises:
            PruneZooError: ``values`` are whole numbers, and tokens are made by interpolation.
        """
        return values.flatten(0, 1)[:, None]

    def pooled(self, kind: Kind, output: Any) -> Any:
        """What the model puts in the place of the placeholders, from the output of its own encoder."""
        return output.pooler_output

    def cells(self, kind: Kind, batch: Mapping[str, Any]) -> list[Tensor]:
        """Where the tokens of each image (or clip) come from.

        A tile is a picture that the tower saw as one: a crop, the thumbnail, a frame. Crops that the family puts
        together to one grid again count as one tile. A token that is no patch but ends a row of them has column -1: it
        stands behind row ``row`` of tile ``tile``, where -1 means all of them, and lives as long as a patch of these.

        Returns:
            For each, in the order of the placeholders, ``(n, 3)`` long: tile, row, column.
        """
        raise NotImplementedError

    # In which form the model takes its inputs

    def positions(self, batch: Mapping[str, Any], real: Tensor, generating: bool) -> Tensor:
        """The position ids that the model itself would give to a prompt.

        Args:
            batch: With ``input_ids (B, L)``; ``position_ids`` in it are taken as they are.
            real: ``(B, L)`` bool, False for padding.
            generating: As `generate` counts (over real tokens), not as `forward` does (over columns).

        Returns:
            ``(B, L)``, or ``(3 or 4, B, L)`` where a token has a place in time, height and width.
        """
        given = batch.get("position_ids")
        if given is not None:
            return given.expand(*given.shape[:-2], *real.shape)
        if generating:
            return (real.long().cumsum(1) - 1).clamp_min(0)
        return torch.arange(real.shape[1], device=real.device).expand_as(real)

    def visible(self, batch: Mapping[str, Any], real: Tensor) -> Tensor:
        """``(B, 1, L, L)`` bool: which column each row of the prompt attends to, sliding windows aside."""
        length = real.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=real.device).tril()
        return causal & real[:, None, None]

    def check_gates(self) -> None:
        """Refuse gates where a mask cannot hide tokens."""
        decoder = self.decoder()
        if any(map(decoder.recurrent, range(decoder.depth))):
            raise PruneZooError(
                "gates cannot be put on a language model with recurrent layers, from which no mask hides tokens: train "
                "with subsets really pruned, by policy gradient"
            )

    def own_mask(self, mask: Tensor) -> Any:
        """The form in which the model takes a float mask ``(B, 1, L, L)`` in place of its own.

        Raises:
            PruneZooError: Its language model has a sliding window that is shorter than the prompt.
        """
        text = self.config.get_text_config()
        window, kinds = getattr(text, "sliding_window", None), getattr(text, "layer_types", None)
        if window is not None and window < mask.shape[-1] and (kinds is None or "sliding_attention" in kinds):
            raise PruneZooError(
                f"gates cannot be put on a prompt of {mask.shape[-1]} tokens in a model with a sliding window of "
                f"{window}: use shorter prompts or smaller images"
            )
        return mask

    def hand_over(self, batch: dict[str, Any], tokens: Mapping[Kind, Sequence[list[Tensor]]]) -> dict[str, Any]:
        """Add visual tokens to the inputs of the model.

        Made anew for each call, because beam search edits it in place.

        Args:
            batch: Inputs with ``input_ids (B, L)``.
            tokens: By kind: the features ``(n, D)`` of each row of the batch that has any; then likewise, for each
                level of deepstack, what is added behind the first decoder layers.
        """
        outputs = {}
        for kind, parts in tokens.items():
            # A list has one entry for each row of the batch that has images; a tensor has one for each token,
            # which is the only way in which beam search can deal out rows that keep different numbers of them.
            features, *levels = (torch.cat(rows)[:, None] if kind in self.as_tensor else rows for rows in parts)
            outputs[kind] = self.encoder_output(features, levels)
        return {**batch, "mm_encoder_outputs": outputs}

    def hand_over_embedded(
        self, batch: dict[str, Any], values: Tensor, deep: list[Tensor], generating: bool
    ) -> dict[str, Any]:
        """What older releases take instead: the whole prompt embedded, with its position ids.

        Args:
            batch: Inputs with ``input_ids (B, L)``; with ``position_ids``, if ``attention_mask`` is not ``(B, L)``.
            values: ``(B, L, D)`` features in their columns; others do not matter.
            deep: Likewise, what is added behind the first decoder layers.
            generating: The inputs are for `generate`.

        Raises:
            PruneZooError: A release of `transformers` in which this family does not take them.
        """
        taken = inspect.signature(self.vlm.prepare_inputs_for_generation if generating else self.vlm.forward).parameters
        if deep or "inputs_embeds" not in taken:
            raise PruneZooError(f"{self.title} can be pruned with transformers 5.19 or later: upgrade it")
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        embedded = {key: value for key, value in batch.items() if key not in self.position_keys}
        embedded["inputs_embeds"] = self.embed(ids, values)
        if "position_ids" not in batch:
            real = torch.ones_like(ids) if mask is None else mask
            embedded["position_ids"] = self.positions(batch, real.bool(), generating)
        if not generating:  # `generate` wants both
            del embedded["input_ids"]
        return embedded

    def embed(self, ids: Tensor, values: Tensor | None = None) -> Tensor:
        """``(B, L, D)``: the embedded prompt, ``values (B, L, D)`` at the placeholders (else those of token 0)."""
        visual = self.is_visual(ids)
        # A placeholder may lie outside the vocabulary.
        words = self.vlm.get_input_embeddings()(ids.masked_fill(visual, 0))
        return words if values is None else torch.where(visual[..., None], values.to(words.dtype), words)

    def encoder_output(self, features: Any, deep: list[Any]) -> Any:
        """Features as the model's own encoder would give them."""
        return BaseModelOutputWithPooling(pooler_output=features)

    # Its parts

    @property
    def first_layer(self) -> int:
        """The first decoder layer in front of which the prompt may get shorter; see ``first_layer_reason``."""
        return self.decoder().keyed[0] + 1

    def tower(self) -> Tower:
        """The vision tower.

        Raises:
            PruneZooError: It is not of a make that is known.
        """
        raise PruneZooError(
            "this vision tower is not of a make whose blocks can be read or shortened: use a pruner of the prompt or "
            "layer stage that needs no signals of the tower"
        )

    def decoder(self) -> Decoder:
        """The language model."""
        return Decoder(self.vlm)


def _rows(features: Any) -> Tensor:
    """``(n, D)``: the tokens of all images, from a list of tensors or a tensor by image."""
    if isinstance(features, Tensor):
        return features.flatten(0, -2)
    own = list(features)
    return own[0] if len(own) == 1 else torch.cat(own)
