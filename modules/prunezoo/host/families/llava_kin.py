"""LLaVA-NeXT-Video, Video-LLaVA, ViP-LLaVA, Granite 4 Vision, and FastVLM and PerceptionLM with towers of `timm`."""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ...core.errors import PruneZooError
from ..parts.tower import Tower
from .base import Family, Kind, Order
from .cells import grid, tiles
from .gaps import Short
from .llava import LlavaFamily, LlavaNextFamily


class VipLlavaFamily(LlavaFamily):
    """ViP-LLaVA: each token joins the states of several blocks of CLIP."""

    title = "ViP-LLaVA"
    as_tensor = ("image",)

    def check(self) -> None:
        """Its encoder takes CLS off, whatever the config says."""

    def tower(self) -> Tower:
        """The states of several blocks make a token."""
        return Family.tower(self)

    def short(self) -> Short:
        """Behind the projector, which joins the states of a patch."""
        tower = Tower(self.vlm.model.vision_tower, self.config.vision_feature_layers)
        return Short(tower, (self.vlm.model.multi_modal_projector,))


class LlavaNextVideoFamily(LlavaNextFamily):
    """LLaVA-NeXT-Video: images as LLaVA-NeXT; a clip is pooled frames, each a tile, without newlines."""

    title = "LLaVA-NeXT-Video"
    encoder_keys = {"image": ("pixel_values", "image_sizes"), "video": ("pixel_values_videos",)}
    as_tensor = ("video",)
    joined = "LLaVA-NeXT-Video puts its crops together to one grid, which must be whole"

    def cells(self, kind: Kind, batch: Mapping[str, Any]) -> list[Tensor]:
        """Clips frame by frame."""
        if kind == "image":
            return super().cells(kind, batch)
        clips, frames = batch["pixel_values_videos"].shape[:2]
        return [tiles(frames, self.side // self.config.spatial_pool_stride)] * clips

    def tower(self) -> Tower:
        """Frames are pooled behind it by a kernel of the config."""
        return Family.tower(self)

    def short(self) -> Short:
        """Of images; behind the projector, patch by patch."""
        return Short(LlavaFamily.tower(self), (self.vlm.model.multi_modal_projector,))

    def check_gaps(self, kind: Kind, batch: Mapping[str, Any]) -> None:
        """Images only."""
        if kind == "video":
            raise PruneZooError(
                f"{self.title} pools the patches of a frame by a kernel of its config: for clips use a pruner of the "
                "prompt stage"
            )


class VideoLlavaFamily(LlavaFamily):
    """Video-LLaVA: one tower for images, one for clips, whose frames keep their CLS: it lives as long as its frame."""

    title = "Video-LLaVA"
    encoder_keys = {"image": ("pixel_values",), "video": ("pixel_values_videos",)}
    as_tensor = ("image", "video")

    def cells(self, kind: Kind, batch: Mapping[str, Any]) -> list[Tensor]:
        """Clips frame by frame, CLS first."""
        if kind == "image":
            return super().cells(kind, batch)
        clips, frames = batch["pixel_values_videos"].shape[:2]
        patches = grid(self.side, self.side).flatten(0, 1)
        frame = torch.cat([torch.tensor([[0, -1, -1]]), patches])
        return [torch.cat([frame + torch.tensor([tile, 0, 0]) for tile in range(frames)])] * clips

    def check(self) -> None:
        """Images without CLS."""
        strategy = self.config.vision_feature_select_strategy
        if strategy != "default":
            raise PruneZooError(
                f"{self.title} with vision_feature_select_strategy='{strategy}' is not supported; supported: 'default'"
            )

    def tower(self) -> Tower:
        """There are two."""
        return Family.tower(self)


class Granite4VisionFamily(LlavaNextFamily):
    """Granite 4 Vision: as LLaVA-NeXT with fewer tokens, which enter the language model in parts, at several layers."""

    title = "Granite 4 Vision"
    first_layer_reason = "features of the image are added to all its tokens in front of layers before that"

    def check(self) -> None:
        """Its encoder takes CLS off, whatever the config says."""

    @property
    def side(self) -> int:
        """Queries along a tile."""
        vision = self.config.vision_config
        return int(vision.image_size // vision.patch_size * Fraction(self.config.downsample_rate))

    @property
    def levels(self) -> list[int]:
        """Decoder layers, in the order of the encoder's list."""
        return [layer for _, layer in self.config.deepstack_layer_map] + list(self.config.spatial_target_layers)

    @property
    def first_layer(self) -> int:
        """Behind the last that features are added in front of."""
        return max(self.levels) + 1

    def run_encoder(self, kind: Kind, batch: Mapping[str, Any]) -> Any:
        """The first level as features, the others as levels."""
        output = super().run_encoder(kind, batch)
        output.pooler_output, *output.deepstack_features = (own for _, own in output.deepstack_features)
        return output

    def encoder_output(self, features: Any, deep: list[Any]) -> Any:
        """All levels, with their layers."""
        from transformers.models.granite4_vision.modeling_granite4_vision import Granite4VisionImageFeaturesOutput

        levels = list(zip(self.levels, [features, *deep], strict=True))
        return Granite4VisionImageFeaturesOutput(deepstack_features=levels)

    def deal(self, kind: Kind, batch: Mapping[str, Any], values: Tensor, order: Order = "tower") -> Tensor:
        """No token is of some patches."""
        return Family.deal(self, kind, batch, values, order)

    def tower(self) -> Tower:
        """Queries look at windows of it."""
        return Family.tower(self)


class FastVlmFamily(Family):
    """FastVLM: convolutions, and few tokens."""

    title = "FastVLM"
    as_tensor = ("image",)

    def cells(self, kind: Kind, batch: Mapping[str, Any]) -> list[Tensor]:
        """One tile an image."""
        if batch.get("image_sizes") is not None:
            raise PruneZooError(f"'image_sizes' in the call is not supported for {self.title}: its images are squares")
        side = math.isqrt(self.config.image_seq_length)
        return [grid(side, side).flatten(0, 1)] * len(batch["pixel_values"])


class PerceptionLmFamily(Family):
    """PerceptionLM: tiles, the thumbnail first; the frames of a clip go through the same encoder."""

    title = "PerceptionLM"
    encoder_keys = {"image": ("pixel_values",), "video": ("pixel_values_videos",)}
    as_tensor = ("image", "video")

    def run_encoder(self, kind: Kind, batch: Mapping[str, Any]) -> Any:
        """One for both."""
        return self.vlm.model.get_image_features(batch[self.encoder_keys[kind][0]], return_dict=True)

    def cells(self, kind: Kind, batch: Mapping[str, Any]) -> list[Tensor]:
        """Pooled patches of each tile, or frame: as many as the prompt has, since no config tells the tower's patch."""
        images, count = batch[self.encoder_keys[kind][0]].shape[:2]
        found = int((batch["input_ids"] == self.placeholders[kind]).numpy().sum())
        side = math.isqrt(found // (images * count))
        if found != images * count * side**2:
            raise PruneZooError(
                f"{self.title}: {found} {kind} placeholders are no squares for {images} times {count} tiles: use one "
                "processor for text and images"
            )
        return [tiles(count, side)] * images
