"""LLaVA-format data: what becomes an item, what is refused, and how conversations become batches."""

import json
from copy import deepcopy

import pytest
import torch
from PIL import Image
from tiny_llava import make_image

from prunezoo import PruneZooError
from trainers.data.conversation import IGNORED, ConversationCollator
from trainers.data.llava_json import LlavaJson
from trainers.data.loading import ResumableLoader
from trainers.data.suite import Item

ENTRY = {
    "id": "a1",
    "image": "sub/0.jpg",
    "conversations": [
        {"from": "human", "value": "<image>\nwhat color is the ball ?"},
        {"from": "gpt", "value": "red"},
        {"from": "human", "value": "is the ball right ?"},
        {"from": "gpt", "value": "1 2"},
    ],
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    for number in range(30):
        make_image(number).save(tmp_path / "sub" / f"{number}.jpg")
    (tmp_path.parent / "outside.jpg").write_bytes((tmp_path / "sub" / "0.jpg").read_bytes())
    return tmp_path


def write(folder, entries):
    path = folder / "data.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return path


def changed(**values):
    entry = deepcopy(ENTRY)
    for key, value in values.items():
        if value is None:
            del entry[key]
        else:
            entry[key] = value
    return entry


def test_each_answer_is_an_item_with_its_history(folder):
    text_only = {"id": "t", "conversations": [{"from": "human", "value": "hello"}]}
    data = LlavaJson(write(folder, [text_only, ENTRY]), folder)
    assert len(data) == 2
    assert data[0].turns == (("what color is the ball ?", "red"),)
    assert data[1].turns == (("what color is the ball ?", "red"), ("is the ball right ?", "1 2"))
    assert data[1].id == "a1/1" and data[1].image.mode == "RGB"


def test_a_picture_falls_into_one_split_only(folder):
    entries = [changed(id=f"{n}-{i}", image=f"sub/{n}.jpg") for n in range(30) for i in range(2)]
    data = LlavaJson(write(folder, entries), folder)
    pictures = {s: {i.id.split("-")[0] for i in data.part(s, 0.3)} for s in ("train", "validation")}
    assert not pictures["train"] & pictures["validation"]
    assert len(pictures["train"] | pictures["validation"]) == 30
    assert len(data.part("validation", 0.3, limit=3)) == 3


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([changed(conversations=None)], ["a1", "'conversations'"]),
        ([changed(image=None)], ["a1", "'image' is missing"]),
        ([changed(image="sub/none.jpg")], ["a1", "sub/none.jpg is missing"]),
        ([changed(image="../outside.jpg")], ["a1", "outside"]),
        ([changed(image="/etc/hostname")], ["a1", "outside"]),
        ([changed(image="..\\outside.jpg")], ["a1", "outside"]),
        ([changed(image=5)], ["a1", "'image' must be a path, not int"]),
        ([changed(conversations=ENTRY["conversations"][1:])], ["a1", "turn 0", "human"]),
        ([changed(conversations=ENTRY["conversations"][:1])], ["a1", "pairs"]),
        ([changed(conversations=[ENTRY["conversations"][0], {"from": "gpt", "value": " "}])], ["a1", "empty"]),
        (["text"], ["#0", "'conversations'"]),
        ("{", ["not readable as JSON"]),
        ({"id": 1}, ["list of entries"]),
    ],
)
def test_a_malformed_entry_is_one_line_with_file_and_entry(folder, entries, words):
    path = write(folder, entries)
    with pytest.raises(PruneZooError) as caught:
        LlavaJson(path, folder)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    assert all(word in message for word in words), message


def test_missing_files_are_named(folder):
    with pytest.raises(PruneZooError, match=r"none\.json: no such file"):
        LlavaJson(folder / "none.json", folder)
    with pytest.raises(PruneZooError, match="nowhere: no such folder"):
        LlavaJson(write(folder, [ENTRY]), folder / "nowhere")


@pytest.mark.parametrize("content", [b"no picture at all", None])
def test_a_broken_picture_is_named_when_it_is_read(folder, content):
    path = folder / "sub" / "0.jpg"
    path.write_bytes(path.read_bytes()[:300] if content is None else content)
    data = LlavaJson(write(folder, [ENTRY]), folder)  # nothing is decoded yet
    with pytest.raises(PruneZooError, match="a1") as caught:
        data[0]
    assert "sub/0.jpg" in str(caught.value) and "\n" not in str(caught.value)


def item(*turns, seed=0):
    return Item(id="x", image=make_image(seed), turns=turns, group="all")


SHORT = item(("what color ?", "red"))
LONG = item(("what color is the ball ?", "red"), ("is the ball right ?", "1 2"), seed=1)


def labelled(processor, batch):
    return [processor.tokenizer.decode(row[row != IGNORED]) for row in batch["labels"]]


def test_only_the_last_answer_and_its_end_are_labelled(tiny_llava):
    batch = ConversationCollator(tiny_llava.processor)([SHORT, LONG])
    assert labelled(tiny_llava.processor, batch) == ["red </s>", "1 2 </s>"]
    assert batch["attention_mask"][0, -1] == 0, "padding stands on the right"
    real = batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][real], batch["input_ids"][real])
    assert "ASSISTANT: red </s> USER: is the ball right ? ASSISTANT: 1 2" in tiny_llava.processor.tokenizer.decode(
        batch["input_ids"][1]
    )


def test_for_generation_the_text_stops_before_the_answer(tiny_llava):
    batch = ConversationCollator(tiny_llava.processor, answers=False)([SHORT, LONG])
    assert "labels" not in batch and batch["attention_mask"][0, 0] == 0
    assert tiny_llava.processor.tokenizer.decode(batch["input_ids"][0, -2:]) == "? ASSISTANT:"


def test_a_template_without_end_token_gets_one(tiny_llava, monkeypatch):
    template = tiny_llava.processor.chat_template.replace(" </s>", " ")
    monkeypatch.setattr(tiny_llava.processor, "chat_template", template)
    batch = ConversationCollator(tiny_llava.processor)([LONG, SHORT])
    assert labelled(tiny_llava.processor, batch) == ["1 2 </s>", "red </s>"]


def test_what_is_too_long_loses_old_turns_then_the_answers_tail(tiny_llava):
    processor = tiny_llava.processor
    whole = ConversationCollator(processor)([LONG])
    last = ConversationCollator(processor)([item(LONG.turns[-1], seed=1)])
    length = last["input_ids"].shape[1]
    assert length < whole["input_ids"].shape[1]
    shorter = ConversationCollator(processor, max_length=length)([LONG])
    assert torch.equal(shorter["input_ids"], last["input_ids"])
    cut = ConversationCollator(processor, max_length=length - 1)([LONG, SHORT])
    assert labelled(processor, cut)[0] == "1 2" and cut["attention_mask"].shape == cut["input_ids"].shape
    with pytest.raises(PruneZooError, match="max_length=20"):
        ConversationCollator(processor, max_length=20)([SHORT])


def test_the_loader_goes_on_in_mid_epoch_and_deals_to_all_ranks():
    def loader(rank=0, world=1):
        return ResumableLoader(list(range(23)), 4, list, world_size=world, rank=rank, seed=3)

    straight = loader()
    batches = [batch for _ in range(3) for batch in straight]
    assert len(batches) == 15 and batches[:5] != batches[5:10]
    for stop in (2, 5, 7):
        first, second = loader(), loader()
        stream = (batch for _ in range(3) for batch in first)
        done = [next(stream) for _ in range(stop)]
        second.load_state_dict(first.state_dict())
        rest = [batch for _ in range(3) for batch in second][: 15 - stop]
        assert done + rest == batches, stop
    ranks = [[i for batch in loader(rank, 2) for i in batch] for rank in range(2)]
    assert not set(ranks[0]) & set(ranks[1])


def test_pictures_of_every_mode_are_read(folder):
    Image.new("P", (24, 24)).save(folder / "sub" / "palette.png")
    data = LlavaJson(write(folder, [changed(image="sub/palette.png")]), folder)
    assert data[0].image.mode == "RGB"
