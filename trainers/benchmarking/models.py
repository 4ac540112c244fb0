"""What is measured: a model from disk or Hub, or one of a given size made up here, and requests of a given length."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

from prunezoo.core.config import fit_width
from prunezoo.core.contract import Pruner
from prunezoo.core.errors import PruneZooError
from prunezoo.core.near import near
from prunezoo.core.prefill import Prefill
from prunezoo.core.registry import build_pruner, list_pruners, load_pruner, set_choice, split_options
from trainers.cli.names import has_weights
from trainers.data.conversation import ConversationCollator
from trainers.data.suite import Item
from trainers.evaluation.loading import DTYPES, check_device, default_device, default_dtype, load_vlm
from trainers.pretraining.build import SCENES, WORD_IDS, World, new_processor

RANDOM = "random:"
SIDE, PATCH = 336, 14  # 24 x 24 = 576 image tokens, as LLaVA-1.5


@dataclass(frozen=True)
class Sizes:
    """Sizes of a LLaVA: of the CLIP tower, and of the language model."""

    tower_width: int
    tower_inner: int
    tower_layers: int
    width: int
    inner: int
    layers: int
    heads: int  # of the language model
    vocabulary: int
    tied: bool  # input and output embedding are one


SIZES = {
    "llava-120m": Sizes(256, 1024, 6, 768, 2048, 15, heads=12, vocabulary=8192, tied=True),
    "llava-500m": Sizes(512, 2048, 12, 1024, 4096, 30, heads=16, vocabulary=8192, tied=True),
    "llava-7b": Sizes(1024, 4096, 24, 4096, 11008, 32, heads=32, vocabulary=32064, tied=False),  # LLaVA-1.5-7B's
}
"""Models that `--vlm random:NAME` makes up. How long a model takes depends on its sizes, not on its weights.

The small ones have a small vocabulary, since with the usual one the output embedding, whose cost does not depend on the
prompt, would be a fifth of the first; of LLaVA-1.5-7B it is a fiftieth.
"""


def random_llava(sizes: Sizes, device: str, dtype: torch.dtype) -> Any:
    """A LLaVA with random weights and 576 image tokens."""
    vision = CLIPVisionConfig(
        hidden_size=sizes.tower_width, intermediate_size=sizes.tower_inner, num_hidden_layers=sizes.tower_layers,
        num_attention_heads=sizes.tower_width // 64, image_size=SIDE, patch_size=PATCH,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=sizes.vocabulary, hidden_size=sizes.width, intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, max_position_embeddings=4096,
        tie_word_embeddings=sizes.tied,
        pad_token_id=WORD_IDS["<pad>"], bos_token_id=WORD_IDS["<s>"], eos_token_id=WORD_IDS["</s>"],
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=WORD_IDS["<image>"],
        image_seq_length=(SIDE // PATCH) ** 2, tie_word_embeddings=sizes.tied,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(config, dtype=dtype).eval().requires_grad_(False)


def load_model(source: str, device: str | None, dtype: str | None) -> tuple[Any, Any]:
    """A frozen model and its processor.

    Args:
        source: Local folder, Hub id, or ``random:`` and a name from :data:`SIZES`.
        device: As :func:`load_vlm` takes it.
        dtype: Likewise.

    Raises:
        PruneZooError: There is no such model.
    """
    if not source.startswith(RANDOM):
        return load_vlm(source, device, dtype)
    name = source.removeprefix(RANDOM)
    if name not in SIZES:
        raise PruneZooError(f"--vlm {source}: no such size{near(source, (RANDOM + known for known in SIZES))}")
    device = device or default_device()
    check_device(device)
    processor = new_processor(World(SCENES.words, SIDE, PATCH))
    return random_llava(SIZES[name], device, DTYPES[dtype or default_dtype(device)]), processor


def load_for_timing(source: str, width: int, tower_width: int | None = None, prefill: Prefill | None = None) -> Pruner:
    """A pruner as :func:`load_pruner` gives it; a learned method by its registry name is built, untrained.

    How long a pruner takes does not depend on its weights, so that none need be trained for a model to be timed on it;
    only its ``width`` and ``tower_width``, if it has them, must be those of the model's tokens and of its tower, and
    sizes that it leaves open suit the ``prefill``, if that is given: 1 % of it, or as ``ppm?budget_flops=0.005`` says.
    """
    name, options = split_options(source)
    if name not in list_pruners() or (options and not has_weights(str(name))):
        return load_pruner(source)
    choice = {word: options.pop(word, None) for word in ("select", "schedule")}
    pruner = fit_width(build_pruner(str(name), **options), width, tower_width, prefill).eval()
    set_choice(pruner, **choice)
    return pruner


class Request:
    """The same question about different pictures, as the processor makes it: raw pictures in, tensors out.

    Args:
        vlm: The model that it is for.
        processor: Its processor.
        batch: Pictures.
        length: Tokens of the prompt beside the image's, the template's own included.
        picture: Width and height of the pictures in pixels.

    Raises:
        PruneZooError: The template alone is longer than ``length``.
    """

    def __init__(self, vlm: Any, processor: Any, batch: int, length: int, picture: Sequence[int]) -> None:
        self.device, self.length = vlm.device, length
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 255, (batch, picture[1], picture[0], 3), dtype=np.uint8)
        question = " ".join(["picture"] * length)  # at least a token each; what is too much is cut off
        self.items = [Item(str(i), Image.fromarray(image), ((question, ""),), "") for i, image in enumerate(pixels)]
        self.collate = ConversationCollator(processor, answers=False)
        ids = self.collate(self.items)["input_ids"]
        is_image = ids[0] == vlm.config.image_token_id
        self.image_tokens = int(is_image.sum())
        self.columns = self.image_tokens + length
        least = int(is_image.nonzero().max()) + 1 - self.image_tokens
        if not least <= length <= ids.shape[1] - self.image_tokens:
            raise PruneZooError(f"--length {length}: the chat template alone has {least} tokens before the question")

    def __call__(self) -> dict[str, Any]:
        """Preprocess: what the processor returns, cut to the length and on the model's device."""
        raw = self.collate(self.items)
        whole = raw["input_ids"].shape
        batch = {}
        for name, value in raw.items():
            if isinstance(value, Tensor):
                value = (value[:, : self.columns] if value.shape[:2] == whole else value).to(self.device)
            batch[name] = value
        return batch
