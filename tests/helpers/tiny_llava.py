"""A tiny random LLaVA with processor and chat template, in memory or in a folder as a user has it."""

from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

IMAGE_SIZE, PATCH = 24, 4  # 6 x 6 = 36 image tokens


WORDS = ["what", "color", "is", "the", "ball", "box", "left", "right", "red", "blue", "yes", "no", "1", "2", "3", "?"]


SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:"]


CHAT_TEMPLATE = (
    "<s>{% for message in messages %}{% if message['role'] == 'user' %} USER: {% else %} ASSISTANT: {% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %} <image> {% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %}{% if message['role'] == 'assistant' %} </s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


EOS = SPECIAL.index("</s>")


LONG = "<s> USER: <image> what color is the ball left ? ASSISTANT:"


SHORT = "<s> USER: <image> what ? ASSISTANT:"


TWO = "<s> USER: <image> <image> what box ? ASSISTANT:"


NONE = "<s> USER: is the ball red ? ASSISTANT:"


def make_processor():
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def make_llava(seed: int = 0, **text_options) -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=24,
    )
    text = LlamaConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,  # far from uniform, so that what changes inside shows at the logits
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **{"num_hidden_layers": 2, **text_options},
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=SPECIAL.index("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(IMAGE_SIZE // PATCH) ** 2,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    for part in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        torch.nn.init.normal_(part.weight, std=0.3)
    model.requires_grad_(False)
    return model


def make_image(seed: int) -> Image.Image:
    """Coarse random colours: different in every part of the picture, unlike noise."""
    grid = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(grid).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.NEAREST)


def save_llava(folder, **text_options):
    """A folder as a user has it: model, processor, chat template."""
    make_llava(**text_options).save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


def load_llava(folder):
    """``vlm``, ``processor`` and ``batch(prompts, images, **options)``; the model has been seen to use its images."""
    vlm = AutoModelForImageTextToText.from_pretrained(folder).eval().requires_grad_(False)
    processor = AutoProcessor.from_pretrained(folder)

    def batch(prompts, images, **options):
        flat = [image for group in images for image in group]
        return processor(text=prompts, images=flat or None, return_tensors="pt", padding=True, **options)

    # Without this every comparison of logits below could hold by vacuity.
    one = batch(["<s> USER: <image> what color is the ball ? ASSISTANT:"], [[make_image(0)]])
    other = {**one, "pixel_values": batch(["<image>"], [[make_image(1)]])["pixel_values"]}
    ids, mask = one["input_ids"], one["input_ids"] != vlm.config.image_token_id
    with torch.no_grad():
        logits = vlm(**one).logits[:, -1]
        assert (logits - vlm(**other).logits[:, -1]).abs().max() > 0.1, "the image does not reach the logits"
        assert (logits - vlm(input_ids=ids[mask][None]).logits[:, -1]).abs().max() > 0.1, "dropping it changes nothing"
    return SimpleNamespace(vlm=vlm, processor=processor, batch=batch, folder=folder)
