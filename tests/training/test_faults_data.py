"""Conversations of other people: texts, placeholders, none or several pictures."""

import json
import logging
import os
import tarfile

import datasets
import pytest
from families.base import PAD
from talking import TALK, add, encoded, family_processor, item, talk, write_hub, write_json, write_shard
from tiny_llava import make_image

from prunezoo import PruneZooError
from trainers.data.conversation import ConversationCollator
from trainers.data.hub_dataset import HubDataset
from trainers.data.llava_json import LlavaJson
from trainers.data.web_shards import WebShards

# Texts


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_a_mark_in_front_and_unicode_line_ends_are_no_harm(name, tmp_path):
    asked = "what\u2028color\u0085is\u2029the\x0cball ?"
    entries = [{"id": str(n), "image": f"{n}.png", "conversations": talk(asked, "red")} for n in range(3)]
    (tmp_path / "raw").mkdir()
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(encoded(number))
    lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
    text = "\r\n".join(lines) if name.endswith("l") else f"[{','.join(lines)}]"
    (tmp_path / name).write_text("\ufeff" + text, encoding="utf-8", newline="")
    data = LlavaJson(tmp_path / name, tmp_path)
    assert len(data) == 3 and data[2].turns == ((asked, "red"),)


def test_a_lone_surrogate_is_replaced_and_read_by_the_model(tmp_path, tiny_llava):
    said = talk("what \ud83d color ?", "red \udc00")
    data = write_json(tmp_path, [{"id": "\ud800", "image": "0.png", "conversations": said}])
    shard = write_shard(tmp_path / "a.tar", [said])
    for items in (data, shard):
        assert items[0].turns == (("what \ufffd color ?", "red \ufffd"),)
        assert ConversationCollator(tiny_llava.processor)([items[0]])["input_ids"].shape[0] == 1
        items.id_of(0).encode()
        assert len(items.part("validation", 0.5)) == 1


def test_deep_nesting_is_one_line_with_its_place(tmp_path):
    deep = "[" * 10**5 + "]" * 10**5
    (tmp_path / "a.json").write_text(deep)
    (tmp_path / "a.jsonl").write_text("{}\n" + deep)
    for name, words_ in (("a.json", "JSON "), ("a.jsonl", "JSON, line 2 ")):
        with pytest.raises(PruneZooError, match=f"{name}: not readable as {words_}.more than 32 levels deep"):
            LlavaJson(tmp_path / name, tmp_path)
    with pytest.raises(PruneZooError, match=r"a\.tar: sample '0': its \.json is not readable .more than 32 levels"):
        write_shard(tmp_path / "a.tar", [deep.encode()])


# One picture, none, several


def test_entries_with_none_or_several_pictures_are_left_out_and_counted(tmp_path, caplog):
    text_only, several = talk("hello ?", "yes"), ["0.png", "1.png"]
    entries = [
        {"id": "none", "conversations": text_only},
        {"id": "empty", "image": "", "conversations": text_only},
        {"id": "null", "image": None, "conversations": text_only},
        {"id": "no list", "image": [], "conversations": text_only},
        {"id": "list", "image": ["1.png"], "conversations": TALK},
        {"id": "two", "image": several, "conversations": talk("<image><image> ?", "yes")},
        {"id": "three", "image": [*several, "2.png"], "conversations": TALK},
        {"id": 8, "image": "2.png", "conversations": TALK},
    ]
    with caplog.at_level(logging.WARNING):
        data = write_json(tmp_path, entries)
    assert [data.id_of(place) for place in range(len(data))] == ["list/0", "8/0"]
    assert data[0].image.tobytes() == make_image(1).tobytes()
    assert "2 entries with several pictures are left out: two, three" in caplog.text


def test_rows_with_none_or_several_pictures_are_left_out_and_counted(tmp_path, caplog):
    one = {"bytes": encoded(1), "path": None}
    write_hub(tmp_path, [one, None, one, None], conversations=[TALK] * 4).save_to_disk(tmp_path / "null")
    data = HubDataset(str(tmp_path / "null"))
    assert [item.id for item in data] == ["train-0/0", "train-2/0"]
    lists = datasets.Dataset.from_dict(
        {"image": [[one], [], [one, one], None], "conversations": [TALK] * 4},
        features=datasets.Features({
            "image": datasets.List(datasets.Image()),
            "conversations": datasets.List({"from": datasets.Value("string"), "value": datasets.Value("string")}),
        }),
    )  # fmt: skip
    lists.save_to_disk(tmp_path / "lists")
    with caplog.at_level(logging.WARNING):
        (item,) = HubDataset(str(tmp_path / "lists"))
    assert item.id == "train-0/0" and item.image.tobytes() == make_image(1).tobytes()
    assert "1 entries with several pictures are left out: train-2" in caplog.text


def test_columns_of_numbers_are_named_or_read_as_they_are_written(tmp_path):
    wrong = {"image": [1, 2], "question": ["what ?"] * 2, "answer": ["red"] * 2}
    datasets.Dataset.from_dict(wrong).save_to_disk(tmp_path / "ints")
    with pytest.raises(PruneZooError, match=r"column 'image' holds int64 instead of pictures; .* data\.columns: image"):
        HubDataset(str(tmp_path / "ints"))
    rows = write_hub(tmp_path, question=["what ?"] * 4, answer=[1, 2, 0, 1])
    rows.save_to_disk(tmp_path / "counts")
    assert [item.answer for item in HubDataset(str(tmp_path / "counts"))] == ["1", "2", "0", "1"]
    named = rows.cast_column("answer", datasets.ClassLabel(names=["red", "blue", "green"]))
    named.save_to_disk(tmp_path / "names")
    assert [item.answer for item in HubDataset(str(tmp_path / "names"))] == ["blue", "green", "red", "blue"]
    write_hub(tmp_path, question=["what ?"] * 4, answer=["a", None, "b", "c"]).save_to_disk(tmp_path / "gap")
    with pytest.raises(PruneZooError, match="row 1: turn 1 must be"):
        HubDataset(str(tmp_path / "gap"))


def test_odd_names_of_files_are_read_or_named(tmp_path):
    odd = os.fsdecode(b"\xff\xfe.png")
    (tmp_path / odd).write_bytes(encoded(3))
    entries = [{"id": "odd", "image": odd, "conversations": TALK}]
    data = write_json(tmp_path, entries)
    assert data[0].image.tobytes() == make_image(3).tobytes() and len(data.part("validation", 0.5)) == 1
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("a" * 300 + ".png", "\ud800.png", "a\0b.png", "pipe.png"):
        with pytest.raises(PruneZooError, match=r"entry 'odd': image .* is missing or empty"):
            write_json(tmp_path, [{"id": "odd", "image": name, "conversations": TALK}])
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        add(shard, odd, encoded(3))
        add(shard, odd.replace("png", "json"), json.dumps({"conversations": TALK}).encode())
    shards = WebShards(str(tmp_path / "a.tar"), tmp_path / "index")
    assert shards[0].image.tobytes() == make_image(3).tobytes() and len(shards.part("validation", 0.5)) == 1
    assert len(WebShards(str(tmp_path / "a.tar"), tmp_path / "index")) == 1


# The picture's turn, and what only looks like a picture


def test_a_picture_stays_in_its_turn(tmp_path, tiny_llava):
    said = talk("is the ball red ?", "yes", "<image>\nwhat color is the box ?", "blue", "left ?", "no")
    data = write_json(tmp_path, [{"id": "a", "image": "0.png", "conversations": said}])
    assert [item.id for item in data] == ["a/1", "a/2"], "before the picture there is nothing to prune"
    shards = write_shard(tmp_path / "a.tar", [said])
    write_hub(tmp_path, conversations=[said] * 4).save_to_disk(tmp_path / "hub")
    for items in (data, shards, HubDataset(str(tmp_path / "hub"))):
        assert len(items[0].turns) == 2 and items[0].turns[1][0] == "what color is the box ?"
        batch = ConversationCollator(tiny_llava.processor)([items[0], items[1]])
        for row in batch["input_ids"]:
            text = tiny_llava.processor.tokenizer.decode(row)
            assert "USER: is the ball red ? ASSISTANT: yes </s> USER: <image> <image>" in text
    length = ConversationCollator(tiny_llava.processor)([data[1]])["input_ids"].shape[1]
    for asked in ("what color is the box ?", "left ?"):  # the oldest turn goes, then the picture's own
        cut = ConversationCollator(tiny_llava.processor, max_length=length - 2)([data[1]])["input_ids"][0]
        text = tiny_llava.processor.tokenizer.decode(cut)
        assert text.startswith("<s> USER: <image>") and f"<image> {asked}" in text and text.count("<image>") == 36
        length = len(cut)


def test_an_answer_may_speak_of_the_placeholder(tmp_path, tiny_llava):
    said = talk("<image>\nwhat ?", "write <image> in the text", "and <ima<x>ge> ?", "yes")
    data = write_json(tmp_path, [{"id": "a", "image": "0.png", "conversations": said}])
    assert data[1].turns[0][1] == "write <image> in the text" and data[1].picture_turn == 0
    batch = ConversationCollator(tiny_llava.processor)([data[1]])
    assert int((batch["input_ids"] == tiny_llava.vlm.config.image_token_id).sum()) == 36


PLACEHOLDERS = ["<image>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<IMG_CONTEXT>", "<start_of_image>",
                "<image_soft_token>", "<fake_token_around_image>", "</s>", "<s>", "<pad>", "<ima<image>ge>",
                "<|ima<|image_pad|>ge_pad|>"]  # fmt: skip


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3",
                                  "gemma3"])  # fmt: skip
def test_what_looks_like_a_placeholder_is_text_for_every_processor(name):
    processor = family_processor(name)
    special = processor.tokenizer.all_special_ids
    collate = ConversationCollator(processor)
    plain = collate([item("w10 w12")])
    own = {token: int((plain["input_ids"] == token).sum()) for token in special}
    for text in PLACEHOLDERS:
        for question, answer in ((f"w10 {text} w12", "w11"), ("w10 w12", f"w11 {text}"), (f"{text}{text}", "w11")):
            batch = collate([item(question, answer)])
            found = {token: int((batch["input_ids"] == token).sum()) for token in special}
            assert {**found, PAD: 0} == {**own, PAD: 0}, (text, question)  # it stands for unknown words here
            assert int((batch["labels"] == processor.tokenizer.convert_tokens_to_ids("</s>")).sum()) <= 1
