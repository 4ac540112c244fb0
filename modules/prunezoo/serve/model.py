"""The served model: vLLM's own for any model of `transformers`, whose images are brought to fewer tokens.

Tower and projector are the modules of `transformers`, so families, signals and pruners are those of `attach`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.models.interfaces import SupportsMultiModalPruning
from vllm.model_executor.models.transformers import TransformersMultiModalForCausalLM
from vllm.model_executor.models.transformers.multimodal import MultiModalDummyInputsBuilder, MultiModalMixin
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..core.signals import parse_signal
from ..host.families import Visual
from ..host.parts.tower import FusedAttention
from ..host.signals.vision import watch_tower
from .layout import prune_images
from .positions import append_offsets, correct_positions, distance, lay_positions, move_tokens, split_offsets
from .processor import EXTENT, LEFT, WORDS, Info, Processor
from .settings import Settings
from .shapes import AXES, PLAIN, family_of, offsets_of


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=MultiModalDummyInputsBuilder)
class PrunezooForConditionalGeneration(TransformersMultiModalForCausalLM, SupportsMultiModalPruning):
    """Any family that can be served, under the pruner that `--hf-overrides` names."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        settings = Settings.of(self.config)
        self.family = family_of(self.config, self)
        self.axes = AXES[self.config.model_type]
        self.places = settings.positions == "original"
        self.pruner = settings.load()
        self._late: tuple[Tensor, Tensor] | None = None

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The frozen model's; the pruner has its own already."""
        loaded = super().load_weights(weights)
        self.pruner.to(next(self.model.parameters()).device)
        return loaded | {f"pruner.{name}" for name, _ in self.pruner.named_parameters()}

    def embed_multimodal(self, **kwargs: Any) -> list[Tensor]:
        """What is left of each image, with where it stands where that is kept; images may be of several requests."""
        visuals = self._encode(kwargs)
        if not visuals:
            return []
        text = None
        if WORDS in kwargs:
            device = visuals[0].features.device
            text = [self.model.get_input_embeddings()(own.flatten().to(device)) for own in kwargs[WORDS]]
        kept = prune_images(self.pruner, visuals, kwargs[LEFT].flatten().tolist(), text)
        if not self.places:
            return [one.features for one in kept]
        places = [offsets_of(self.config, own.cells, one.slots) for own, one in zip(visuals, kept, strict=True)]
        return [append_offsets(one.features, own) for one, own in zip(kept, places, strict=True)]

    def _encode(self, kwargs: dict[str, Any]) -> list[Visual]:
        """Images through tower and projector, with the signals that the pruner needs."""
        batch = {key: kwargs[key] for key in self.family.encoder_keys["image"] if key in kwargs}
        visuals = [
            visual
            for own in self._alike(batch)
            for visual in self.family.visuals(own, partial(watch_tower, self.family.tower, self.pruner.needs))
        ]
        processes = get_tensor_model_parallel_world_size()
        shared = isinstance(self.family.tower().attention(0), FusedAttention)
        if processes == 1 or not shared:
            return visuals
        return [
            replace(one, signals={name: across_heads(name, own, processes) for name, own in one.signals.items()})
            for one in visuals
        ]

    def _alike(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """Batches that the encoder takes: pictures of several requests may have been padded to several sizes."""
        pixels = batch.get("pixel_values")
        if not isinstance(pixels, list):
            return [batch]
        parts = (self._select_item_kwargs(batch, i, len(pixels)) for i in range(len(pixels)))
        return [{**part, "pixel_values": pixels[i][None]} for i, part in enumerate(parts)]

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Of a prompt before its images are encoded."""
        images = [
            (feature.mm_position.offset, feature.mm_position.length, int(feature.data[EXTENT].data))
            for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        ]
        table = lay_positions(len(input_tokens), images)
        return table, distance(table)

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """With the tokens of images that are being encoded where they stand."""
        pairs = [self._split(one) for one in multimodal_embeddings]
        if pairs:
            ids = torch.as_tensor(input_ids, device=mrope_positions.device)
            offsets = torch.cat([own for _, own in pairs]).to(mrope_positions.device)
            placeholder = ids == self.config.image_token_id
            mrope_positions = correct_positions(mrope_positions, placeholder, offsets, num_computed_tokens)
        return [features for features, _ in pairs], mrope_positions, distance(mrope_positions)

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None
    ) -> Tensor:
        """Where vLLM's runner has not asked for corrected positions, as the one of CPUs, keep them for `forward`."""
        self._late = None
        if multimodal_embeddings and multimodal_embeddings[0].shape[-1] > self.text_config.hidden_size:
            assert is_multimodal is not None
            multimodal_embeddings, offsets = zip(*map(self._split, multimodal_embeddings), strict=True)
            self._late = is_multimodal.nonzero()[:, 0], torch.cat(offsets)
        return super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)

    def forward(self, input_ids: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The language model, which reads one row of the table of positions, or all."""
        if positions.dim() == 2:
            if self._late is not None:
                (where, offsets), self._late = self._late, None
                positions = move_tokens(positions, where, offsets)
            if self.axes == PLAIN:
                return super(MultiModalMixin, self).forward(input_ids, positions[1], *args, **kwargs)
        return super().forward(input_ids, positions, *args, **kwargs)

    def _split(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features and offsets."""
        return split_offsets(features, self.axes)


def across_heads(name: str, values: Tensor, processes: int) -> Tensor:
    """A signal of all heads of a tower, from the share of them that each process has.

    Args:
        name: Of the signal.
        values: It, ``(n, ...)``, of the heads of this process.
        processes: That divide the heads.
    """
    axes = parse_signal(name).axes[1:]
    if "H" in axes:
        return tensor_model_parallel_all_gather(values.contiguous(), dim=axes.index("H"))
    return tensor_model_parallel_all_reduce(values) / processes
