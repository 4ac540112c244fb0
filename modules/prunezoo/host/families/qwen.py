"""Qwen2-VL to Qwen3.5, and Qwen2.5-Omni's thinker: any resolution, positions in time, height and width, clips."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from ...core.errors import PruneZooError
from ..parts.tower import QwenTower, Tower
from .base import Family, Kind, Order
from .cells import grid
from .gaps import Short

TYPES: dict[Kind, int] = {"image": 1, "video": 2}  # of tokens, in mm_token_type_ids


class QwenVLFamily(Family):
    """Qwen2-VL and Qwen2.5-VL: an image is one grid of merged patches, a clip is one tile for each step of time."""

    title = "Qwen2-VL"
    patches: ClassVar[str] = "two by two neighbouring patches behind it"
    encoder_keys = {
        "image": ("pixel_values", "image_grid_thw"),
        "video": ("pixel_values_videos", "video_grid_thw"),
    }
    position_keys: ClassVar[tuple[str, ...]] = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")

    def cells(self, kind: Kind, batch: Mapping[str, Any]) -> list[Tensor]:
        """One tile for each step of time."""
        merge = self.config.vision_config.spatial_merge_size
        return [
            torch.cat([grid(height // merge, width // merge, time).flatten(0, 1) for time in range(times)])
            for times, height, width in batch[f"{kind}_grid_thw"].tolist()
        ]

    def deal(self, kind: Kind, batch: Mapping[str, Any], values: Tensor, order: Order = "tower") -> Tensor:
        """The patches that are merged; they follow one another, since the processor orders them so."""
        return values[0].unflatten(0, (-1, self.config.vision_config.spatial_merge_size**2))

    def tower(self) -> Tower:
        """Qwen's own."""
        return QwenTower(self.vlm.model.visual, -1, has_cls=False, joined=f"{self.title} merges {self.patches}")

    def short(self) -> Short:
        """Merged patches come back, and the levels of deepstack."""
        return self.merging(self.tower())

    def merging(self, tower: Tower) -> Short:
        """Of Qwen's make."""
        ends = (tower.model.merger, *getattr(tower.model, "deepstack_merger_list", ()))
        return Short(tower, ends, packed=True, joined=self.config.vision_config.spatial_merge_size**2)

    def positions(self, batch: Mapping[str, Any], real: Tensor, generating: bool) -> Tensor:
        """Time, height and width; for `generate` the place in the text before them."""
        place = super().positions(batch, real, generating)
        grids = {key: batch[key] for key in self.position_keys if batch.get(key) is not None}
        if batch.get("position_ids") is not None or not grids:
            return place
        ids = batch["input_ids"]
        types = sum((ids == token).long() * TYPES[kind] for kind, token in self.placeholders.items())
        spatial, _ = self.vlm.model.get_rope_index(ids, types, attention_mask=real.long(), **grids)
        return torch.cat([place[None], spatial]) if generating else spatial


class Qwen25VLFamily(QwenVLFamily):
    """Qwen2.5-VL."""

    title = "Qwen2.5-VL"
    patches = "two by two neighbouring patches behind it, and most blocks attend within windows"

    def deal(self, kind: Kind, batch: Mapping[str, Any], values: Tensor, order: Order = "tower") -> Tensor:
        """The tower has its tokens window by window."""
        dealt = super().deal(kind, batch, values)
        if order == "given":
            return dealt
        vision = self.config.vision_config
        side = vision.window_size // vision.patch_size // vision.spatial_merge_size
        cells = self.cells(kind, batch)
        image = torch.arange(len(cells)).repeat_interleave(torch.tensor([len(own) for own in cells]))
        window = torch.cat(cells) // torch.tensor([1, side, side])
        number = torch.cat([image[:, None], window], 1).unique(dim=0, return_inverse=True)[1]
        place = number.argsort(stable=True).argsort()  # where each token stands in the tower
        return dealt[place.to(values.device)]


class Qwen3VLFamily(QwenVLFamily):
    """Qwen3-VL: features of earlier vision blocks are added behind the first decoder layers (deepstack)."""

    title = "Qwen3-VL"
    first_layer_reason = "features of the image are added to all its tokens behind each layer before that (deepstack)"

    def encoder_output(self, features: Any, deep: list[Any]) -> Any:
        """With the deepstack levels."""
        return BaseModelOutputWithDeepstackFeatures(pooler_output=features, deepstack_features=deep)

    @property
    def first_layer(self) -> int:
        """Behind the last layer that deepstack is added to."""
        return max(super().first_layer, len(self.config.vision_config.deepstack_visual_indexes))


class Qwen3VLMoeFamily(Qwen3VLFamily):
    """Qwen3-VL with experts."""

    title = "Qwen3-VL-MoE"


class Qwen35Family(QwenVLFamily):
    """Qwen3.5: three of four layers keep a state instead of keys. No deepstack."""

    title = "Qwen3.5"
    first_layer_reason = "the cache of its first attention layer tells the model how long the conversation is"


class Qwen35MoeFamily(Qwen35Family):
    """Qwen3.5 with experts."""

    title = "Qwen3.5-MoE"


class Qwen25OmniFamily(Qwen25VLFamily):
    """The thinker of Qwen2.5-Omni: as Qwen2.5-VL; sound passes by untouched, but not the sound of a clip."""

    title = "Qwen2.5-Omni"
    position_keys = ("image_grid_thw", "video_grid_thw", "video_second_per_grid")

    def kinds(self, batch: Mapping[str, Any]) -> list[Kind]:
        """Without sound, whose lengths the positions would need."""
        for key in ("input_features", "feature_attention_mask", "use_audio_in_video"):
            if batch.get(key) is not None and batch[key] is not False:
                raise PruneZooError(f"{self.title} is pruned without sound: leave '{key}' out")
        return super().kinds(batch)

    def tower(self) -> Tower:
        """Its queries, keys and values are apart, which no reader knows."""
        return Family.tower(self)

    def short(self) -> Short:
        """It need not be read for that."""
        return self.merging(QwenTower(self.vlm.model.visual, -1, has_cls=False))

    def positions(self, batch: Mapping[str, Any], real: Tensor, generating: bool) -> Tensor:
        """Counted by the outer class, from ids, for text too."""
        place = Family.positions(self, batch, real, generating)
        if batch.get("position_ids") is not None:
            return place
        grids = {key: batch[key] for key in self.position_keys[:2] if batch.get(key) is not None}
        seconds = batch.get("video_second_per_grid")
        spatial, _ = self.vlm.get_rope_index(
            batch["input_ids"], attention_mask=real.long(), second_per_grids=seconds, **grids
        )
        return torch.cat([place[None], spatial]) if generating else spatial
