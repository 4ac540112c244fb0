"""The model that lmms-eval is given, without lmms-eval; `make test-extras` runs the real one."""

from types import SimpleNamespace

import pytest
import torch

from prunezoo import PruneZooError, attach
from prunezoo.lmms import PruneZooModel, generation_options, parse_keep, read_messages
from trainers.cli.names import ROOT
from trainers.data.conversation import ConversationCollator
from trainers.data.suite import load_suite

VLM, PPM = str(ROOT / "checkpoints" / "tiny-llava"), str(ROOT / "checkpoints" / "ppm-tiny")
ITEMS = [load_suite("scenes", "test")[i] for i in range(7)]  # a group each: some have an earlier turn


def messages_of(item):
    found = []
    for number, (question, answer) in enumerate(item.turns):
        image = [{"type": "image", "url": item.image}] if number == 0 else []
        found.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        found.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return found[:-1]


def requests(**options):
    """As lmms-eval makes them: context, messages of a document, options, its number, task and split."""
    return [
        SimpleNamespace(args=("", messages_of, {"max_new_tokens": 8, "until": ["\n\n"], **options}, i, "task", "test"))
        for i in range(len(ITEMS))
    ]


@torch.no_grad()
def test_batches_answer_as_the_library_does():
    model = PruneZooModel(VLM, pruner=PPM, keep="1/18", batch_size=3, device="cpu")
    model.task_dict = {"task": {"test": ITEMS}}
    answers = model.generate_until(requests())
    expected = []
    for item in ITEMS:
        batch = ConversationCollator(model.processor, answers=False)([item])
        with attach(model.vlm, model.pruner, keep=1 / 18):
            ids = model.vlm.generate(**batch, max_new_tokens=8, do_sample=False)
        expected.append(model.processor.decode(ids[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    assert answers == expected
    assert sum(a == item.answer for a, item in zip(answers, ITEMS, strict=True)) >= 5  # it does see the pictures
    model.batch_size = 1
    assert model.generate_until(requests()) == answers
    assert model.generate_until(requests(until=answers[0])) != answers  # an answer ends where it is told to stop
    first, *rest = requests()
    mixed = [first, *requests(num_beams=2)[1:3], *rest[2:]]
    model.batch_size = 7
    assert len(model.generate_until(mixed)) == len(ITEMS)


def test_what_cannot_be_asked_of_it():
    for text in ("", "x", "1/0", "0.1.2"):
        with pytest.raises(PruneZooError, match="write tokens"):
            parse_keep(text)
    assert [parse_keep(text) for text in ("64", 64, "1/9", "0.25", 0.25, "1.0")] == [64, 64, 1 / 9, 0.25, 0.25, 1.0]
    assert isinstance(parse_keep(64), int) and isinstance(parse_keep("1.0"), float)
    with pytest.raises(PruneZooError, match="'kepe' is unknown; did you mean 'keep'"):
        PruneZooModel(VLM, kepe=4)
    with pytest.raises(PruneZooError, match="keep=0 is out of range"):
        PruneZooModel(VLM, pruner="divprune", keep=0, device="cpu")
    with pytest.raises(PruneZooError, match="dtype=int3"):
        PruneZooModel(VLM, dtype="int3")
    with pytest.raises(PruneZooError, match="no video"):
        read_messages([{"role": "user", "content": [{"type": "video", "url": "x.mp4"}]}])


def test_it_is_greedy_unless_the_task_sets_a_temperature():
    assert generation_options({"temperature": 0, "max_new_tokens": 5}) == {
        "max_new_tokens": 5, "num_beams": 1, "do_sample": False,
    }  # fmt: skip
    assert generation_options({"temperature": 0.7})["do_sample"]
