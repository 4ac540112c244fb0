"""Train a tokenizer beside a frozen vision-language model: TexTok reads its words, TokenFlow learns from its tower.

Letters: B pictures, S side in pixels, G cells along a side of the tokenizer, D width of the tower.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from prunezoo.core.errors import PruneZooError
from prunezoo.host.parts.loading import load_processor
from prunezoo.tokenizers.base import Painted, Text, Tokenizer
from prunezoo.tokenizers.captions import embed_captions
from prunezoo.tokenizers.textok import TexTok
from prunezoo.tokenizers.tokenflow import TokenFlow

from .frozen import Dtype, load_frozen
from .sight import Sight
from .tokenizer import TokenizerModule


class GuidedTokenizerModule(TokenizerModule):
    """A TexTok or a TokenFlow, and the frozen model that guides it.

    Args:
        tokenizer: What is trained.
        guide: Folder or Hub id of the model. It stays frozen and out of the checkpoints.
        guide_dtype: Type that it is held in: auto (as stored), float32, bfloat16 or float16.
        meaning_weight: Weight of one less the cosine between what TokenFlow makes of its codes and what the tower sees.
        options: See :class:`TokenizerModule`.
    """

    guide: Any
    words: Any

    def __init__(
        self,
        tokenizer: Tokenizer,
        guide: str,
        guide_dtype: Dtype = "auto",
        meaning_weight: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(tokenizer, **options)
        if not isinstance(tokenizer, TexTok | TokenFlow):
            raise PruneZooError(
                f"tokenizer '{tokenizer.name}' needs no guide: train it by trainers.training.tokenizer.TokenizerModule"
            )
        self.meaning_weight = meaning_weight
        processor = load_processor(guide)
        model = load_frozen(guide, guide_dtype)
        # no submodules: in no checkpoint, no optimizer and no call of train()
        self.__dict__["guide"], self.__dict__["words"] = model, processor.tokenizer
        if isinstance(tokenizer, TexTok):
            self.check_width("text_width", model.get_input_embeddings().weight.shape[-1])
            return
        self.sight = Sight(model, processor, f"guide {guide}")
        self.check_width("tower_width", self.sight.width)

    def check_width(self, field: str, width: int) -> None:
        """Refuse a tokenizer that was built for another model."""
        if (own := getattr(self.tokenizer.config, field)) != width:
            raise PruneZooError(f"tokenizer.config.{field}={own}, and the guide has {width}: set it to {width}")

    def setup(self, stage: str) -> None:
        """See TokenizerModule; and move the frozen model to where training happens."""
        super().setup(stage)
        self.guide.to(self.trainer.strategy.root_device)

    def read(self, batch: Any) -> tuple[Tensor, Text | None]:
        """Pictures, and the text of their captions where the tokenizer reads it."""
        if isinstance(batch, Tensor):
            if self.tokenizer.reads_text:
                raise PruneZooError(
                    f"tokenizer '{self.tokenizer.name}' reads captions and the data has none: take "
                    "trainers.data.captioned.CaptionedDataModule"
                )
            return batch, None
        images, captions = batch
        text = embed_captions(self.guide, self.words, captions) if self.tokenizer.reads_text else None
        return images, text

    def other_terms(self, made: Painted, images: Tensor) -> dict[str, Tensor]:
        """How far the meaning points from what the tower sees."""
        if made.meaning is None:
            return {}
        apart = 1 - F.cosine_similarity(made.meaning.float(), self.seen(images), dim=-1)
        return {"meaning": self.meaning_weight * apart.mean()}

    def seen(self, images: Tensor) -> Tensor:
        """What the frozen tower sees, (B, G², D) float32 at our cells, of the layer that the model reads."""
        return self.sight.at(images, self.tokenizer.config.grid)
