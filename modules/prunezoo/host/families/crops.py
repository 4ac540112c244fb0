"""Families whose pictures are crops with tags between them, put together as the prompt says: Command A Vision, Aya
Vision, Ovis2, Llama 4, LFM2-VL; and MiniCPM-V, whose slices are images of their own.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ...core.errors import PruneZooError
from ..parts.tower import Tower
from .base import Family, Kind, Order
from .cells import blocks, grid, runs
from .gaps import Short, before_joining

Run = tuple[int, int, int]


class CropsFamily(Family):
    """Crops of one image, each a run of placeholders, perhaps several; a tile each, in the order of the prompt."""

    end: ClassVar[int] = 0  # how far behind the last run of an image the token stands by which it ends

    def crops(self, batch: Mapping[str, Any]) -> Iterable[tuple[int, int]]:
        """Rows and columns of tokens, of each crop of the batch."""
        raise NotImplementedError

    def ends(self, ids: Tensor, found: Sequence[Run]) -> list[bool]:
        """Whether a run is the last of its image: behind it stands what stands behind the last of all."""
        host = torch.nn.functional.pad(ids, (0, self.end + 1), value=-1).numpy()
        marks = [int(host[row, start + length + self.end]) for row, start, length in found]
        rows = [row for row, _, _ in found] + [-1]
        return [mark == marks[-1] or row != after for mark, row, after in zip(marks, rows, rows[1:], strict=False)]

    def cells(self, kind: Kind, batch: Mapping[str, Any]) -> list[Tensor]:
        """Crops are dealt out to images until the placeholders of each are used up."""
        ids, crops = batch["input_ids"], iter(self.crops(batch))
        found = runs(ids == self.placeholders[kind])
        cells: list[Tensor] = []
        tiles: list[Tensor] = []
        wanted = 0
        for (_, _, length), last in zip(found, self.ends(ids, found), strict=True):
            wanted += length
            if not last:
                continue
            while (had := sum(map(len, tiles))) < wanted and (size := next(crops, None)) is not None:
                tiles.append(grid(*size, len(tiles)).flatten(0, 1))
            if had != wanted:
                raise PruneZooError(
                    f"{self.title}: the crops of an image have {had} tokens, the prompt {wanted} placeholders for it: "
                    "use one processor for text and images"
                )
            cells.append(torch.cat(tiles))
            tiles, wanted = [], 0
        return cells


class SquaresFamily(CropsFamily):
    """Crops that are all squares of one size."""

    as_tensor = ("image",)

    @property
    def side(self) -> int:
        """Tokens along a crop."""
        raise NotImplementedError

    def crops(self, batch: Mapping[str, Any]) -> Iterable[tuple[int, int]]:
        """One for each picture of the tower."""
        return [(self.side, self.side)] * len(batch["pixel_values"])


class AyaVisionFamily(SquaresFamily):
    """Aya Vision: a tag in front of each crop; the whole picture is the last."""

    title = "Aya Vision"

    def check(self) -> None:
        """Patches only."""
        strategy = getattr(self.config, "vision_feature_select_strategy", "full")
        if strategy != "full":
            raise PruneZooError(
                f"{self.title} with vision_feature_select_strategy='{strategy}' is not supported; supported: 'full'"
            )

    @property
    def side(self) -> int:
        """Patches are joined by a pixel shuffle."""
        vision = self.config.vision_config
        return vision.image_size // vision.patch_size // self.config.downsample_factor

    def deal(self, kind: Kind, batch: Mapping[str, Any], values: Tensor, order: Order = "tower") -> Tensor:
        """The patches that the shuffle joins."""
        return blocks(values, self.config.downsample_factor)

    def short(self) -> Short:
        """Before the shuffle, which needs the square."""
        layer = getattr(self.config, "vision_feature_layer", -1)
        return before_joining(Tower(self.vlm.model.vision_tower, layer, has_cls=False))


class Cohere2VisionFamily(AyaVisionFamily):
    """Command A Vision: a line break behind each crop, and the end behind that of the last."""

    title = "Command A Vision"
    end = 1


class Ovis2Family(SquaresFamily):
    """Ovis2: tokens of a visual vocabulary; the whole picture first, tags between crops."""

    title = "Ovis2"

    @property
    def side(self) -> int:
        """Patches are joined by the stride."""
        vision = self.config.vision_config
        return -(-(vision.image_size // vision.patch_size) // vision.hidden_stride)

    def ends(self, ids: Tensor, found: Sequence[Run]) -> list[bool]:
        """The last tag stands somewhere in front of the next run, or that is in another prompt."""
        last = self.config.visual_indicator_token_ids[-1]
        after = [*found[1:], (-1, 0, 0)]
        return [
            row != other or bool((ids[row, start + length : begin] == last).any())
            for (row, start, length), (other, begin, _) in zip(found, after, strict=True)
        ]

    def encoder_output(self, features: Any, deep: list[Any]) -> Any:
        """With the rows of the visual table that stand for tags."""
        from transformers.models.ovis2.modeling_ovis2 import BaseModelOutputWithVisualIndicatorFeatures

        model = self.vlm.model
        count, words = model.vision_tower.num_visual_indicator_tokens, model.visual_vocab_size
        tags = model.visual_embeddings_table(torch.arange(words - count, words, device=features.device))
        return BaseModelOutputWithVisualIndicatorFeatures(pooler_output=features, visual_indicator_features=tags)


class Llama4Family(SquaresFamily):
    """Llama 4: it takes what the tower gives, and projects it itself; so that travels along, as a level of its own."""

    title = "Llama 4"

    @property
    def side(self) -> int:
        """Patches are joined by a pixel shuffle."""
        vision = self.config.vision_config
        return int(vision.image_size // vision.patch_size * vision.pixel_shuffle_ratio)

    def crops(self, batch: Mapping[str, Any]) -> Iterable[tuple[int, int]]:
        """In a prompt within one chunk of attention and without scaling, which both count columns."""
        text, length = self.config.text_config, batch["input_ids"].shape[1]
        most = min(
            filter(None, (text.attention_chunk_size, text.attn_temperature_tuning and text.floor_scale)), default=0
        )
        if most and length > most:
            raise PruneZooError(
                f"{self.title} attends within chunks of columns, and scales by their number, from {most} on: the "
                f"prompt has {length}; use shorter prompts or smaller images"
            )
        return super().crops(batch)

    def run_encoder(self, kind: Kind, batch: Mapping[str, Any]) -> Any:
        """Projected, and as it was."""
        output = self.vlm.get_image_features(batch["pixel_values"], return_dict=True)
        raw = output.last_hidden_state
        output.pooler_output = self.vlm.multi_modal_projector(raw.flatten(0, 1)).unflatten(0, raw.shape[:2])
        output["deepstack_features"] = [raw]
        return output

    def encoder_output(self, features: Any, deep: list[Any]) -> Any:
        """Only what becomes the features when it is projected: what was dropped to, and means."""
        (raw,) = deep
        made = self.vlm.multi_modal_projector(raw.flatten(0, 1)).to(features.dtype)
        wanted = features.flatten(0, 1)
        if not torch.allclose(made, wanted, rtol=0, atol=1e-3 * float(wanted.detach().abs().amax()) + 1e-6):
            raise PruneZooError(
                f"{self.title} takes tokens from in front of its projector: use a pruner that only drops"
            )
        return BaseModelOutputWithPooling(last_hidden_state=raw)


class Lfm2VlFamily(CropsFamily):
    """LFM2-VL: tiles of any shape, tags between, the thumbnail last; short convolutions between attention layers."""

    title = "LFM2-VL"
    encoder_keys = {"image": ("pixel_values", "spatial_shapes", "pixel_attention_mask")}
    first_layer_reason = "the cache of its first attention layer tells the model how long the conversation is"

    def crops(self, batch: Mapping[str, Any]) -> Iterable[tuple[int, int]]:
        """Patches are joined, at the edges with padding."""
        factor = self.config.downsample_factor
        return [(-(-rows // factor), -(-columns // factor)) for rows, columns in batch["spatial_shapes"].tolist()]


class MiniCpmV46Family(Family):
    """MiniCPM-V 4.6: slices of any shape, which the config gives no tag to put together: each is an image.

    Its language model is Qwen3.5's, with plain positions.
    """

    title = "MiniCPM-V 4.6"
    encoder_keys = {"image": ("pixel_values", "target_sizes", "downsample_mode")}
    first_layer_reason = Lfm2VlFamily.first_layer_reason

    def cells(self, kind: Kind, batch: Mapping[str, Any]) -> list[Tensor]:
        """Patches are joined four by four, or two by two where the call or the config says so."""
        factor = 2 if (batch.get("downsample_mode") or self.config.downsample_mode) == "4x" else 4
        sizes = batch["target_sizes"].tolist()
        return [grid(rows // factor, columns // factor).flatten(0, 1) for rows, columns in sizes]
