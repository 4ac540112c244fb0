"""Tiny random models of the supported families, made once a session, with processor and chat template."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from hub_server import hub  # noqa: F401 - a fixture
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

from trainers.callbacks import ExportPruner

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


@pytest.fixture(scope="session")
def tiny_llava_folder(tmp_path_factory):
    return save_llava(tmp_path_factory.mktemp("tiny-llava"))


@pytest.fixture(scope="session")
def tiny_llava(tiny_llava_folder):
    return load_llava(tiny_llava_folder)


@pytest.fixture(scope="session")
def deep_llava(tmp_path_factory):
    """As `tiny_llava`, with decoder layers enough for several stages between them."""
    return load_llava(save_llava(tmp_path_factory.mktemp("deep-llava"), num_hidden_layers=4))


@pytest.fixture(scope="session")
def ending_llava():
    """A random model that likes to end its answers, so that greedy decoding writes short answers and stops."""
    vlm = make_llava(seed=3)
    with torch.no_grad():
        special = torch.arange(len(SPECIAL))[:, None]  # other special tokens than the end are no words of an answer
        vlm.lm_head.weight[: len(SPECIAL)] *= torch.where(special == EOS, 2.0, 0.0)
    vlm.generation_config.eos_token_id = EOS
    vlm.generation_config.pad_token_id = 0
    return vlm, make_processor()


@pytest.fixture
def mixed(deep_llava):
    """A batch for `deep_llava`: prompts with one image, two, none, and one."""
    images = [[make_image(0)], [make_image(5), make_image(6)], [], [make_image(1)]]
    return deep_llava.batch([LONG, TWO, NONE, SHORT], images)


class StopAt(L.Callback):
    """Sends this process SIGTERM after so many steps of training."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def local(weight):
    """Elements of a parameter that are in this process."""
    return (weight.to_local() if hasattr(weight, "to_local") else weight).numel()


class Losses(L.Callback):
    """Writes the loss of every step and process, a line each, of its number and the loss in full; and in `share.RANK`
    how many of the frozen model's parameters a process keeps, and how many of them any optimizer has.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_start(self, trainer, pl_module):
        weights = list(pl_module.vlm.parameters())
        kept = sum(weight.ds_tensor.numel() if hasattr(weight, "ds_tensor") else local(weight) for weight in weights)
        known = {id(weight) for weight in pl_module.parameters()} | {
            id(weight)
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
            for weight in group["params"]
        }
        trained = sum(id(weight) in known for weight in weights)
        (self.folder / f"share.{trainer.global_rank}").write_text(f"{kept} {trained}")

    def on_before_backward(self, trainer, pl_module, loss):
        with (self.folder / f"losses.{trainer.global_rank}").open("a") as file:
            file.write(f"{trainer.global_step} {float(loss.detach())!r}\n")


class ExportOther(L.Callback):
    """At the end, takes the weights of another run's checkpoint, and exports them."""

    def __init__(self, checkpoint: str, folder: str) -> None:
        self.checkpoint, self.folder = checkpoint, folder

    def on_fit_end(self, trainer, pl_module):
        trainer.strategy.load_model_state_dict(torch.load(self.checkpoint, weights_only=False))
        ExportPruner(self.folder).export(trainer, pl_module)


class SpoilAt(L.Callback):
    """Makes one step go wrong: its loss is NaN, or a weight of the pruner is."""

    def __init__(self, step: int, weight: bool = False) -> None:
        self.step, self.weight, self.old = step, weight, None

    def on_train_batch_start(self, trainer, pl_module, *_):
        if trainer.global_step == self.step and self.weight:
            weight = next(pl_module.pruner.parameters())
            self.old = weight.detach().clone()
            weight.data.fill_(torch.nan)
        elif trainer.global_step == self.step:
            pl_module.rank_weight = torch.nan

    def on_exception(self, trainer, pl_module, exception):
        if self.old is not None:
            next(pl_module.pruner.parameters()).data.copy_(self.old)
