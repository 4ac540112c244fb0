"""CLIP's text tower, as the `text_encoder` of `attach`: what the question says, in the space of the image's patches.

A language model's own ids mean nothing to CLIP, so its words are written out and read anew by CLIP's tokenizer; and a
vision-language model leaves the projections into the common space away, so they are taken from the whole CLIP.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..core.errors import PruneZooError


class ClipText:
    """Text and image features of a CLIP model; a text encoder with `image_features`.

    ::

        clip = CLIPModel.from_pretrained("openai/clip-vit-large-patch14-336")
        words = AutoTokenizer.from_pretrained("openai/clip-vit-large-patch14-336")
        encoder = ClipText(clip, words, processor.tokenizer)
        with attach(vlm, "cdpruner?relevance=clip", keep=64, markers=chat_markers(processor), text_encoder=encoder):
            ...

    Args:
        clip: A `CLIPModel` whose vision tower is the one that the language model has; in eval mode. Its own tower is
            not run, only its last norm and its projections.
        clip_tokenizer: Of CLIP.
        tokenizer: Of the language model: it writes out the ids of a prompt.
    """

    def __init__(self, clip: Any, clip_tokenizer: Any, tokenizer: Any) -> None:
        self.clip, self.clip_tokenizer, self.tokenizer = clip, clip_tokenizer, tokenizer

    @torch.no_grad()
    def __call__(self, ids: Tensor, asked: Tensor) -> Tensor:
        """The mean over pieces of the question, as long as CLIP reads, of their features of length 1.

        Args:
            ids: ``(B, L)`` of the language model.
            asked: ``(B, L)`` bool, which of them are the question; special ones among them are left out.

        Returns:
            ``(B, E)`` float32. The mean's product with a patch of length 1 is the mean of its cosines to the pieces.
        """
        length = self.clip.config.text_config.max_position_embeddings
        pieces: list[Tensor] = []
        counts: list[int] = []
        for own, shown in zip(ids.tolist(), asked.tolist(), strict=True):
            kept = [one for one, is_asked in zip(own, shown, strict=True) if is_asked]
            text = self.tokenizer.decode(kept, skip_special_tokens=True)
            read = torch.tensor(self.clip_tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)
            pieces += read.split(length)
            counts.append(len(pieces) - sum(counts))
        batch = torch.zeros(len(pieces), length, dtype=torch.long)
        mask = torch.zeros_like(batch)
        for row, piece in enumerate(pieces):
            batch[row, : len(piece)], mask[row, : len(piece)] = piece, 1
        place = self.clip.text_projection.weight.device
        states = self.clip.text_model(input_ids=batch.to(place), attention_mask=mask.to(place)).pooler_output
        unit = functional.normalize(self.clip.text_projection(states).float(), dim=-1)
        return torch.stack([own.mean(0) for own in unit.split(counts)]).to(ids.device)

    @torch.no_grad()
    def image_features(self, states: Tensor) -> Tensor:
        """Patches in the common space: CLIP's last norm and projection, which the caption sees of CLS alone.

        Args:
            states: ``(R, N, C)`` of a block of the vision tower.

        Returns:
            ``(R, N, E)`` float32.

        Raises:
            PruneZooError: Another width than that of this CLIP.
        """
        weight = self.clip.visual_projection.weight
        if states.shape[-1] != weight.shape[1]:
            raise PruneZooError(
                f"ClipText has a CLIP with a vision tower {weight.shape[1]} wide, and this model's is "
                f"{states.shape[-1]} wide: give the CLIP that it was made from"
            )
        normed = self.clip.vision_model.post_layernorm(states.to(weight))
        return self.clip.visual_projection(normed).float().to(states.device)
