"""The frozen VLMs that ship: small, plain, and they see."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from trainers.data.conversation import ConversationCollator
from trainers.data.suite import load_suite

SHIPPED = Path(__file__).parent.parent.parent / "checkpoints"
TOKENS = {"tiny-llava": ("scenes", 144), "small-llava": ("pages", 256), "tiny-llava-multi": ("several", 3 * 36)}
# measured over more questions in each model's card; so few scatter by 4 points
ANSWERS = {"tiny-llava": (70, 0.8, 0.5), "small-llava": (80, 0.75, 0.4), "tiny-llava-multi": (54, 0.85, 0.5)}


@pytest.fixture(scope="module", params=TOKENS)
def shipped(request):
    folder = SHIPPED / request.param
    vlm = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return request.param, vlm, AutoProcessor.from_pretrained(folder)


def test_a_shipped_vlm_is_small_and_plain(shipped):
    name, vlm, processor = shipped
    suite, tokens = TOKENS[name]
    files = list((SHIPPED / name).iterdir())
    assert sum(file.stat().st_size for file in files) < 15e6
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".jinja", ".md"}
    assert type(vlm).__name__ == "LlavaForConditionalGeneration"
    ids = ConversationCollator(processor)([load_suite(suite, "test", None)[0]])["input_ids"]
    assert int((ids == vlm.config.image_token_id).sum()) == tokens


def test_a_shipped_vlm_answers_and_needs_the_picture(shipped):
    name, vlm, processor = shipped
    count, least, most_blind = ANSWERS[name]
    suite = load_suite(TOKENS[name][0], "test", None)
    items = [suite[i] for i in range(count)]
    batch = ConversationCollator(processor, answers=False)(items)
    asked = batch["input_ids"].shape[1]
    blind = dict(batch, pixel_values=torch.zeros_like(batch["pixel_values"]))
    share = []
    for inputs in (batch, blind):
        ids = vlm.generate(**inputs, max_new_tokens=8, do_sample=False)[:, asked:]
        said = [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
        share.append(sum(text == item.answer for text, item in zip(said, items, strict=True)) / len(items))
    assert {item.group for item in items} == set(suite.groups)
    assert share[0] >= least and share[1] <= most_blind
