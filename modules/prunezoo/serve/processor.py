"""How many placeholders an image has in the prompt, and what travels with it to the encoder."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from vllm.model_executor.models.transformers.multimodal import MultiModalProcessingInfo, MultiModalProcessor
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import PromptReplacement, PromptUpdateDetails

from ..core.errors import PruneZooError
from ..core.roles import ChatMarkers, Role
from ..host.signals.roles import chat_markers
from .settings import KEEP, Settings
from .shapes import ALONE, most_newlines, shapes_of

LEFT, WORDS, EXTENT = "prunezoo_left", "prunezoo_words", "prunezoo_extent"
OWN = (LEFT, WORDS, EXTENT)
"""Fields of an image beside those of the model's processor: tokens left, words read, how far the text behind it is."""
Words = tuple[int, ...]


class Info(MultiModalProcessingInfo):
    """As of any model of `transformers`, with shorter images and without clips."""

    _is_video_model = False

    @property
    def settings(self) -> Settings:
        """The server's."""
        return Settings.of(self.get_hf_config())

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Images a prompt: any number, or one."""
        return {"image": 1 if self.get_hf_config().model_type in ALONE else None}

    def _get_num_image_tokens(self, size: Any) -> int:
        """Of an image of ``size``; LLaVA's processor tells it for towers of CLIP alone, though all are of one."""
        config = self.get_hf_config()
        if config.model_type == "llava":
            return shapes_of(config, {"pixel_values": [size]})[0].patches
        return super()._get_num_image_tokens(size)

    def get_max_image_tokens(self) -> int:
        """Left of an image at most."""
        most = super().get_max_image_tokens()
        return min(self.settings.count(most) + most_newlines(self.get_hf_config()), most)


class Processor(MultiModalProcessor):
    """Makes images short where they stand in the prompt, and sees to it that what is kept decides what is cached."""

    info: Info

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        """For a pruner that reads the prompt, give each image its words."""
        own = {key: value for key, value in inputs.hf_processor_mm_kwargs.items() if key != WORDS}
        if self.info.settings.load().reads_prompt:
            own[WORDS] = self._words(inputs.prompt)
        return super().apply(replace(inputs, hf_processor_mm_kwargs=own), timing_ctx)

    def _words(self, prompt: Sequence[int]) -> tuple[Words, ...]:
        """For each image of a prompt what is said up to the answer to it: later turns leave it as it was kept."""
        image = self.info.get_hf_config().image_token_id
        places = [place for place, token in enumerate(prompt) if token == image]
        answers = self._answers(prompt)
        ends = [next((end for end in answers if end > place), len(prompt)) for place in places]
        return tuple(tuple(token for token in prompt[:end] if token != image) for end in ends)

    def _answers(self, prompt: Sequence[int]) -> list[int]:
        """Where the words of earlier answers stand, by the chat template, if there is one."""
        if not hasattr(self, "_markers"):
            self._markers: ChatMarkers | None
            try:
                self._markers = chat_markers(self.info.get_hf_processor())
            except PruneZooError:
                self._markers = None
        if self._markers is None:
            return []
        ids = torch.tensor([prompt], dtype=torch.long).view(1, -1)
        (roles,) = self._markers.roles(ids, torch.ones_like(ids, dtype=torch.bool)).tolist()
        return [place for place, role in enumerate(roles) if role == Role.ANSWER]

    def _get_mm_hashes(self, inputs: Any) -> Any:
        """An image is another one where other words choose; where they are not read, only `KEEP` makes it so."""
        own = dict(inputs.hf_processor_mm_kwargs)
        words = own.pop(WORDS, None)
        hashes = super()._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs=own))
        if words is not None and "image" in hashes:
            algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
            pairs = zip(hashes["image"], self._dealt(words, len(hashes["image"])), strict=True)
            hashes["image"] = [MultiModalHasher.hash_kwargs(algorithm, image=one, words=read) for one, read in pairs]
        return hashes

    def _get_cache_missing_processor_kwargs(self, inputs: Any, mm_is_cached: Any) -> Mapping[str, Any]:
        """The words of the images that are processed."""
        own = dict(inputs.hf_processor_mm_kwargs)
        if WORDS in own and "image" in mm_is_cached:
            cached = mm_is_cached["image"]
            pairs = zip(self._dealt(own[WORDS], len(cached)), cached, strict=True)
            own[WORDS] = tuple(words for words, there in pairs if not there)
        return own

    @staticmethod
    def _dealt(words: Sequence[Words], images: int) -> Sequence[Words]:
        """For each image; a prompt with too few placeholders is refused further on."""
        return [*words, *[()] * images][:images]

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        """What the model's own processor makes of images, and our fields."""
        others = {key: value for key, value in hf_kwargs.items() if key not in (KEEP, WORDS)}
        out = super()._apply_hf_processor_main(mm_items, others)
        if "image_replacement_ids" not in out:
            return out
        shapes = shapes_of(self.info.get_hf_config(), out)
        settings, asked = self.info.settings, hf_kwargs.get(KEEP)
        out[LEFT] = torch.tensor([shape.left(settings, asked) for shape in shapes])
        out[EXTENT] = torch.tensor([shape.extent for shape in shapes])
        if WORDS in hf_kwargs:
            words = self._dealt(hf_kwargs[WORDS], len(shapes))
            out[WORDS] = [torch.tensor(own, dtype=torch.long) for own in words]
        return out

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Mapping[str, Any]:
        """Ours go with their image."""
        own = [name for name in OWN if name in hf_inputs]
        others = type(hf_inputs)({key: value for key, value in hf_inputs.items() if key not in own})
        fields = super()._get_mm_fields_config(others, hf_processor_mm_kwargs)
        return {**fields, **{name: MultiModalFieldConfig.batched("image", keep_on_cpu=True) for name in own}}

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Sequence[Any]:
        """As many placeholders as tokens are left."""
        counts = [int(item[LEFT].data) for item in out_mm_kwargs.get("image", [])]
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        return [shortened(update, counts) for update in updates]


def shortened(update: Any, counts: Sequence[int]) -> PromptReplacement:
    """A replacement with the first so many of the tokens of each image, which are all the same."""

    def replacement(number: int) -> PromptUpdateDetails:
        tokens = update.replacement(number).full[: counts[number]]
        return PromptUpdateDetails.select_token_id(tokens, tokens[0])

    return PromptReplacement(modality=update.modality, target=update.target, replacement=replacement)
