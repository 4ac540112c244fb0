"""The processors of the families, made without files, with words that the tiny models know."""

from families import IMAGE, SIDE
from families.base import CELL, WORD
from families.llava import PINPOINTS
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3Processor,
    Idefics3Processor,
    InternVLProcessor,
    LlavaNextProcessor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

SQUARE = {"height": SIDE, "width": SIDE}


PLAIN = ["<image>", "<video>", "<start>", "<end>", "\n", "<global>"]  # the strings of tokens 3 to 8


QWEN = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "\n", "<global>"]


INTERN = ["<IMG_CONTEXT>", "<video>", "<img>", "</img>", "\n", "<global>"]


IDEFICS = ["<image>", "<video>", "<fake_token_around_image>", "<end>", "\n", "<global-img>"]


GEMMA = ["<image_soft_token>", "<video>", "<start_of_image>", "<end_of_image>", "\n\n", "<global>"]


def tokenizer(special, **named):
    cells = [f"<row_{i}_col_{j}>" for i in (1, 2, 3) for j in (1, 2, 3)]
    words = {f"w{i}": i for i in range(WORD, 64)}
    special = ["<pad>", "<s>", "</s>", *special, *cells, "<end_of_utterance>"]
    assert special[CELL] == "<row_1_col_1>" and special[IMAGE] == special[3]
    table = Tokenizer(models.WordLevel({**{t: i for i, t in enumerate(special)}, **words}, unk_token="<pad>"))
    table.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    table.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=table, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                   padding_side="left", extra_special_tokens=named)  # fmt: skip


def without_video(kind):
    """A processor less its video half, which torchvision is needed for."""

    class Images(kind):
        @classmethod
        def get_attributes(cls):
            return ["image_processor", "tokenizer"]

    return Images


def qwen(kind):
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 1 << 20})
    return without_video(kind)(images, tokenizer(QWEN)), "<|vision_start|><|image_pad|><|vision_end|>"


def make(name):
    """The processor, and what a prompt says where a picture is to be."""
    image = {"image_token": "<image>"}
    if name == "llava":
        images = CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE)
        return LlavaProcessor(images, tokenizer(PLAIN, **image), patch_size=6, num_additional_image_tokens=1,
                              vision_feature_select_strategy="default"), "<image>"  # fmt: skip
    if name == "llava_siglip":
        return LlavaProcessor(SiglipImageProcessorPil(size=SQUARE), tokenizer(PLAIN, **image), patch_size=6,
                              vision_feature_select_strategy="full"), "<image>"  # fmt: skip
    if name == "llava_next":
        images = LlavaNextImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SQUARE,
                                            image_grid_pinpoints=PINPOINTS)  # fmt: skip
        return LlavaNextProcessor(images, tokenizer(PLAIN, **image), patch_size=6, num_additional_image_tokens=1,
                                  vision_feature_select_strategy="default"), "<image>"  # fmt: skip
    if name == "llava_onevision":
        images = LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=PINPOINTS)
        return without_video(LlavaOnevisionProcessor)(images, tokenizer(PLAIN, **image), num_image_tokens=16,
                                       vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_2"
                                       ), "<image>"  # fmt: skip
    if name == "qwen2_vl":
        return qwen(Qwen2VLProcessor)
    if name == "qwen2_5_vl":
        return qwen(Qwen2_5_VLProcessor)
    if name == "qwen3_vl":
        return qwen(Qwen3VLProcessor)
    if name == "internvl":
        images = GotOcr2ImageProcessorPil(size=SQUARE, crop_to_patches=True, min_patches=1, max_patches=4)
        named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
                 "video_token": "<video>"}  # fmt: skip
        return without_video(InternVLProcessor)(images, tokenizer(INTERN, **named), image_seq_length=9), "<IMG_CONTEXT>"
    if name == "idefics3":
        images = Idefics3ImageProcessorPil(max_image_size={"longest_edge": SIDE}, do_resize=False)
        return Idefics3Processor(images, tokenizer(IDEFICS), image_seq_len=9), "<image>"
    if name == "gemma3":
        named = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
        images = Gemma3ImageProcessorPil(size=SQUARE)
        return Gemma3Processor(images, tokenizer(GEMMA, **named), image_seq_length=9), "<start_of_image>"
    images = SiglipImageProcessorPil(size=SQUARE)
    images.image_seq_length = 16
    return PaliGemmaProcessor(images, tokenizer(PLAIN, **image)), "<image>"
