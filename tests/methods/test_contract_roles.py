"""Which words of a prompt are question, instruction, earlier answer or template, read by the markers of a template."""

import dataclasses

import pytest
import torch
from made_inputs import build, make_inputs
from tiny_llava import CHAT_TEMPLATE, make_image, make_processor

from prunezoo import PruneZooError, attach, encode
from prunezoo.core.contract import Pruner
from prunezoo.core.roles import ChatMarkers, Role
from prunezoo.host import chat_markers
from trainers.cli.names import ROOT
from trainers.evaluation.loading import load_vlm

# As Qwen and many others write: a system text, and every turn begins and ends alike.
CHATML = (
    "{% for message in messages %} <s> {{ message['role'] }} {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %} <image> {% else %} {{ part['text'] }} {% endif %}{% endfor %} </s> {% endfor %}"
    "{% if add_generation_prompt %} <s> assistant {% endif %}"
)
# As LLaVA-1.5 and Vicuna: a default instruction, and no end of a question.
VICUNA = "the red box {% for message in messages %}" + CHAT_TEMPLATE.split("{% for message in messages %}", 1)[1]
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system text') }}{% endif %}" + CHAT_TEMPLATE
TALK = [("user", "what color ?"), ("assistant", "red"), ("user", "is the ball left ?")]
LETTERS = {Role.QUESTION: "q", Role.INSTRUCTION: "i", Role.ANSWER: "a", Role.TEMPLATE: "."}


def with_template(template):
    processor = make_processor()
    processor.chat_template = template
    return processor


def rendered(processor, turns):
    first = next(i for i, (role, _) in enumerate(turns) if role == "user")
    messages = [
        {"role": role, "content": [*([{"type": "image"}] if i == first else []), {"type": "text", "text": text}]}
        for i, (role, text) in enumerate(turns)
    ]
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def told(processor, turns):
    """Each word of the prompt with the letter of its role, without the image's."""
    markers = chat_markers(processor)
    words = [w for w in rendered(processor, turns).split() if w != "<image>"]
    ids = torch.tensor([processor.tokenizer.convert_tokens_to_ids(words)])
    roles = markers.roles(ids, torch.ones_like(ids, dtype=torch.bool))[0].tolist()
    return " ".join(LETTERS[role] for role in roles), words


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, STRICT])
def test_a_template_of_turns_is_read(template):
    said, words = told(with_template(template), TALK)
    assert words == "<s> USER: what color ? ASSISTANT: red </s> USER: is the ball left ? ASSISTANT:".split()
    assert said == ". . q q q . a . . q q q q q ."


def test_a_default_instruction_is_template():
    said, _ = told(with_template(VICUNA), TALK[:1])
    assert said == ". . . . q q q ."


def test_a_system_text_is_instruction():
    processor = with_template(CHATML)
    processor.tokenizer.add_tokens(["user", "assistant", "system"])
    said, words = told(processor, [("system", "the box is red"), *TALK])
    assert words[:8] == "<s> system the box is red </s> <s>".split()
    assert said == ". . i i i i . . . q q q . . . a . . . q q q q q . . ."


def test_padding_and_prompts_of_another_hand():
    markers = ChatMarkers({(7,): Role.QUESTION, (8,): Role.ANSWER}, ((8,),), frozenset({0}))
    ids = torch.tensor([[7, 7, 3, 4, 0, 8], [3, 4, 5, 0, 8, 1]])
    real = torch.tensor([[False, True, True, True, True, True], [True, True, True, True, True, False]])
    q, t = Role.QUESTION, Role.TEMPLATE
    assert markers.roles(ids, real).tolist() == [[t, t, q, q, t, t], [q, q, q, q, q, t]]
    assert markers.roles(ids[:, :0], real[:, :0]).shape == (2, 0)


def test_without_a_template_it_is_refused():
    for template, message in (
        (None, "has no chat template"),
        ("{{ messages[0]['content'][0]['text'] }}", "nothing in"),
    ):
        with pytest.raises(PruneZooError, match=message):
            chat_markers(with_template(template))


class Spy(Pruner):
    """Shows what it was given."""

    name = "spy"

    def score(self, inputs):
        self.seen = inputs
        return inputs.features[..., 0]


def test_attach_and_encode_hand_the_roles_on(tiny_llava):
    markers = chat_markers(tiny_llava.processor)
    prompts = [
        "<s> USER: <image> what color ? ASSISTANT: red </s> USER: is it red ? ASSISTANT:",
        "<s> USER: <image> what ? ASSISTANT:",
    ]
    for side in ("left", "right"):
        batch = tiny_llava.batch(prompts, [[make_image(0)], [make_image(1)]], padding_side=side)
        inputs = encode(tiny_llava.vlm, batch, markers=markers).inputs
        told = [
            "".join(LETTERS[role] for role, real in zip(row, shown, strict=True) if real)
            for row, shown in zip(inputs.text_roles.tolist(), inputs.text_valid.tolist(), strict=True)
        ]
        assert told == ["..qqq.a..qqqq.", "..qq."]
        assert inputs.text_roles.masked_select(~inputs.text_valid).eq(Role.TEMPLATE).all()
        assert encode(tiny_llava.vlm, batch).inputs.text_roles is None
    spy = Spy()
    with torch.no_grad(), attach(tiny_llava.vlm, spy, keep=4, markers=markers):
        tiny_llava.vlm(**batch)
    assert torch.equal(spy.seen.text_roles, inputs.text_roles)


def test_the_embedded_model_has_roles():
    _, processor = load_vlm(f"{ROOT}/checkpoints/tiny-llava", "cpu", "float32")
    markers = chat_markers(processor)
    words = "what color is the ball ?"
    text = rendered(processor, [("user", words)]).replace("<image>", "")
    ids = torch.tensor([processor.tokenizer(text, add_special_tokens=False)["input_ids"]])
    roles = markers.roles(ids, torch.ones_like(ids, dtype=torch.bool))[0]
    question = processor.tokenizer(words, add_special_tokens=False)["input_ids"]
    assert ids[0, roles == Role.QUESTION].tolist() == question and len(question) >= 5
    assert (roles == Role.TEMPLATE).sum() == len(roles) - len(question) >= 2


def test_asked_reads_only_the_question():
    inputs, pruner = make_inputs(pad=2), build("asked")
    inputs.features[:, 4] = inputs.text[:, 0]
    inputs.features[:, 9] = inputs.text[:, 2]
    both = {4, 9}
    assert [set(row.tolist()) for row in pruner(inputs, 2).index[:1]] == [both]
    roles = torch.full(inputs.text.shape[:2], Role.QUESTION)
    roles[:, 0] = Role.TEMPLATE
    marked = dataclasses.replace(inputs, text_roles=roles)
    assert pruner(marked, 1).index[0].tolist() == [9]
    nothing = dataclasses.replace(inputs, text_roles=torch.full_like(roles, Role.TEMPLATE))
    assert pruner(nothing, 2).count.tolist() == [2, 2, 2]
