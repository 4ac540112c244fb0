"""`ClipText`: the question in the space of the patches; a tiny random CLIP around the tower of a tiny LLaVA."""

import pytest
import torch
from tiny_llava import LONG, NONE, SHORT, TWO, make_image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from prunezoo import ClipText, PruneZooError, attach, build_pruner, encode
from prunezoo.host import chat_markers, run_pruned

NEEDS = ("text_features", "image_features")
WORDS = ["<start>", "<end>", "<unk>", "?", "ball", "box", "color", "is", "left", "red", "the", "what"]
START, END = 0, len(WORDS)  # CLIP's end has the largest id


def make_clip(vlm, length=77, **vision):
    """Around the vision tower of a VLM, whose weights it shares unless its shape is another."""
    text = {"vocab_size": END + 1, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "max_position_embeddings": length, "bos_token_id": START, "eos_token_id": END}
    tower = {**vlm.config.vision_config.to_dict(), **vision}
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=tower, projection_dim=12)).eval()
    for weight in clip.text_model.parameters():  # so that words differ, and are told to the end
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=0.3)
    if not vision:
        clip.vision_model.load_state_dict(vlm.model.vision_tower.state_dict())
    return clip


def make_words():
    """CLIP's tokenizer: other ids than the language model's, its own start and end."""
    tokenizer = Tokenizer(models.WordLevel({**{w: i for i, w in enumerate(WORDS)}, "<|end|>": END}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("<start>", START), ("<|end|>", END)]
    tokenizer.post_processor = processors.TemplateProcessing("<start> $A <|end|>", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", model_max_length=77)


@pytest.fixture(scope="module")
def clip(deep_llava):
    return make_clip(deep_llava.vlm)


@torch.no_grad()
def test_the_question_and_the_patches_are_in_one_space(deep_llava, clip):
    vlm, words = deep_llava.vlm, make_words()
    pictures = [[make_image(0)], [make_image(5), make_image(6)], [], [make_image(1)]]
    batch = deep_llava.batch([LONG, TWO, NONE, SHORT], pictures)
    encoder = ClipText(clip, words, deep_llava.processor.tokenizer)
    markers = chat_markers(deep_llava.processor)
    inputs = encode(vlm, batch, NEEDS, markers=markers, text_encoder=encoder).inputs
    assert set(inputs.signals) == set(NEEDS), "states that nobody asked for are not kept"
    questions = ["what color is the ball left ?", "what box ?", "what box ?", "what ?"]
    for row, question in enumerate(questions):
        ids = torch.tensor([words(question)["input_ids"]])
        assert ids[0, 0] == START and ids[0, -1] == END
        alone = functional.normalize(clip.get_text_features(ids).pooler_output, dim=-1)[0]
        torch.testing.assert_close(inputs.signal("text_features")[row], alone, rtol=1e-4, atol=1e-6)
    seen = clip.vision_model(batch["pixel_values"], output_hidden_states=True)
    normed = clip.vision_model.post_layernorm(seen.hidden_states[-2][:, 1:])
    torch.testing.assert_close(inputs.signal("image_features"), clip.visual_projection(normed), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_long_question_is_read_in_pieces(deep_llava):
    clip, words = make_clip(deep_llava.vlm, length=6), make_words()
    encoder = ClipText(clip, words, deep_llava.processor.tokenizer)
    texts = ["what color is the red ball left ?", "is the box red"]  # 10 and 6 with start and end: two pieces and one
    ids = [deep_llava.processor.tokenizer(text)["input_ids"] for text in texts]
    given = torch.tensor([ids[0], ids[1] + [0] * 4])
    features = encoder(given, given != 0)
    for row, text in enumerate(texts):
        read = words(text)["input_ids"]
        pieces = [torch.tensor(read[at : at + 6]) for at in range(0, len(read), 6)]
        assert len(pieces) == 2 - row
        pooled = [
            clip.text_projection(clip.text_model(functional.pad(own, (0, 6 - len(own)))[None]).pooler_output)[0]
            for own in pieces
        ]
        mean = torch.stack([functional.normalize(own, dim=0) for own in pooled]).mean(0)
        torch.testing.assert_close(features[row], mean, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_cdpruner_runs_with_it_attached(deep_llava, clip):
    vlm, encoder = deep_llava.vlm, ClipText(clip, make_words(), deep_llava.processor.tokenizer)
    batch = deep_llava.batch([LONG, LONG.replace("left", "red")], [[make_image(0)], [make_image(0)]])
    pruner = build_pruner("cdpruner", relevance="clip")
    with attach(vlm, "cdpruner?relevance=clip", keep=9, text_encoder=encoder) as run:
        logits = vlm(**batch).logits
    expected = run_pruned(vlm, encode(vlm, batch, NEEDS, text_encoder=encoder), pruner, 9)
    assert torch.equal(logits, expected.host.logits) and run.stats.after == [9, 9]
    one, two = expected.output.index
    assert not torch.equal(one, two), "the question makes a difference"


@torch.no_grad()
def test_what_cannot_be_compared_is_refused(deep_llava, clip):
    vlm, words, batch = deep_llava.vlm, make_words(), deep_llava.batch([SHORT], [[make_image(0)]])

    class Odd(ClipText):
        def image_features(self, states):
            return super().image_features(states)[:, 1:]

    encoders = {
        "signal 'image_features' needs a text encoder that has a method image_features, such as ClipText": None,
        "signal 'image_features' needs a text encoder that has a method": lambda ids, asked: torch.zeros(len(ids), 4),
        "vision tower 32 wide, and this model's is 24 wide: give the CLIP": ClipText(
            make_clip(vlm, hidden_size=32), words, deep_llava.processor.tokenizer
        ),
        r"image_features gave torch.float32 \(1, 35, 12\) for 1 images of 36 tokens": Odd(
            clip, words, deep_llava.processor.tokenizer
        ),
    }
    for message, encoder in encoders.items():
        with (
            pytest.raises(PruneZooError, match=message) as error,
            attach(vlm, "cdpruner?relevance=clip", keep=9, text_encoder=encoder),
        ):
            vlm(**batch)
        assert "\n" not in str(error.value)
