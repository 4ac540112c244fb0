"""Pictures that a processor refuses or nobody can read, splits, loaders, and who is to blame; free text."""

import json
import logging
import tarfile
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from talking import TALK, add, encoded, family_processor, item, talk, write_hub, write_json
from trainings import words

from prunezoo import PruneZooError
from trainers import fit
from trainers.data.broken import skip_broken
from trainers.data.conversation import ConversationCollator
from trainers.data.llava_json import LlavaJson
from trainers.data.loading import kill_left_behind
from trainers.data.modules import HubDataModule, LlavaJsonDataModule, WebShardsDataModule
from trainers.data.pictures import BrokenImage
from trainers.data.suite import Item
from trainers.training.callbacks import ExportPruner, StopAtNaN

# What the processor refuses


def test_a_picture_that_the_processor_refuses_is_named():
    collate = ConversationCollator(family_processor("qwen2_vl"))
    good, thin = item("w10", name="good"), item("w10", size=(900, 4), name="a/thin")
    with pytest.raises(BrokenImage, match=r"^a/thin: \w+ refuses its picture of 900 x 4 pixels \(.*aspect ratio"):
        collate([good, thin])
    with pytest.raises(TypeError):  # no fault of a picture: it stays what it is
        collate([item("w10", name="a"), Item("b", Image.new("RGB", (48, 48)), ((None, "w11"),), "all")])


def test_refused_pictures_count_as_broken(tmp_path):
    entries = [{"id": str(n), "image": f"{n % 4}.png", "conversations": talk("<image> w10", "w11")} for n in range(10)]
    write_json(tmp_path, entries)
    Image.new("RGB", (2100, 10)).save(tmp_path / "2.png")
    data = LlavaJson(tmp_path / "data.json", tmp_path)
    collate = ConversationCollator(family_processor("qwen2_vl"))
    items = skip_broken({"train": data}, 0.2, collate)["train"]
    assert [item.id for item in items] == [f"{n + (n % 4 == 2)}/0" for n in range(10)] and items.tally.broken == 2
    with pytest.raises(PruneZooError, match=r"2 of 10 items have broken images, more than broken_share=0\.1"):
        list(skip_broken({"train": data}, 0.1, collate)["train"])
    with pytest.raises(BrokenImage, match=r"^2/0: .* refuses its picture of 2100 x 10 pixels"):
        list(skip_broken({"train": data}, 0.0, collate)["train"])


SOURCES = {
    "json": lambda vlm, folder, **options: LlavaJsonDataModule(vlm, folder / "data.json", folder, **options),
    "hub": lambda vlm, folder, **options: HubDataModule(vlm, str(folder / "hub"), **options),
    "shards": lambda vlm, folder, **options: WebShardsDataModule(vlm, str(folder / "a.tar"), **options),
}


@pytest.fixture
def forty_eight(tmp_path):
    """The same 48 pictures in each source; that of item 5 is broken."""
    pictures = [encoded(n) if n != 5 else b"no picture" for n in range(48)]
    entries = [{"id": str(n), "image": f"p{n}.png", "conversations": TALK} for n in range(48)]
    for number, data in enumerate(pictures):
        (tmp_path / f"p{number}.png").write_bytes(data)
    write_json(tmp_path, entries)
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for number, data in enumerate(pictures):
            add(shard, f"{number}.png", data)
            add(shard, f"{number}.json", json.dumps({"conversations": TALK}).encode())
    images = [{"bytes": data, "path": None} for data in pictures]
    write_hub(tmp_path, images, conversations=[TALK] * 48).save_to_disk(tmp_path / "hub")
    return tmp_path


@pytest.mark.parametrize("source", SOURCES)
def test_of_few_pictures_at_least_one_validates(source, forty_eight, tiny_llava_folder):
    data = SOURCES[source](str(tiny_llava_folder), forty_eight, batch_size=4, workers=0, validation_share=0.01)
    data.setup()
    assert len(data.validation_set) == 1 and len(data.train_set) == 47
    assert data.validation_set.id_of(0) not in [data.train_set.id_of(n) for n in range(47)]


@pytest.mark.parametrize("source", SOURCES)
def test_broken_pictures_are_counted_over_all_splits(source, forty_eight, tiny_llava_folder):
    options = {"batch_size": 4, "workers": 0}
    for share in (0.01, 0.3, 0.9):
        for allowed, fine in ((1 / 48, True), (0.9 / 48, False)):
            data = SOURCES[source](
                str(tiny_llava_folder), forty_eight, validation_share=share, broken_share=allowed, **options
            )
            data.setup()
            if fine and min(len(data.train_set), len(data.validation_set)) > 1:
                assert len(list(data.train_set)) + len(list(data.validation_set)) == 48
                assert data.train_set.tally is data.validation_set.tally and data.train_set.tally.broken == 1
            elif not fine:
                with pytest.raises(PruneZooError, match="1 of 48 items have broken images"):
                    list(data.train_set), list(data.validation_set)


def test_a_split_of_broken_pictures_alone_is_an_error_and_no_endless_search(forty_eight):
    data = LlavaJson(forty_eight / "data.json", forty_eight)
    splits = {"train": data.first(40), "validation": data.first(6)}
    splits["validation"].places = splits["validation"].places[5:]
    with pytest.raises(PruneZooError, match="all 1 items of a split have broken images"):
        skip_broken(splits, 0.5)["validation"][0]
    both = skip_broken({"train": data.first(6), "validation": data.first(6)}, 0.5)
    assert both["train"][5].id == both["validation"][5].id == "0/0"
    assert both["train"].tally.broken == 2, "each split's own item, though they have the same number"


def test_another_file_can_be_the_validation(forty_eight, tiny_llava_folder, caplog):
    held = [{"id": f"v{n}", "image": f"{n}.png", "conversations": TALK} for n in range(3)]
    (forty_eight / "held.json").write_text(json.dumps(held))
    with caplog.at_level(logging.WARNING):
        data = SOURCES["json"](
            str(tiny_llava_folder), forty_eight, validation_json=forty_eight / "held.json", validation_items=2
        )
        data.setup()
    assert len(data.train_set) == 48 and [item.id for item in data.validation_set] == ["v0/0", "v1/0"]
    assert "trained on" not in caplog.text and "held.json" in str(data.source)
    data = SOURCES["json"](str(tiny_llava_folder), forty_eight, validation_json=forty_eight / "data.json")
    data.setup()
    assert "48 of its pictures are trained on as well" in caplog.text


def test_the_command_line_names_the_other_file(forty_eight, tiny_llava_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["fit"])
    (forty_eight / "images").symlink_to(forty_eight)
    held = forty_eight / "held.json"
    held.write_text(json.dumps([{"id": "v", "image": "1.png", "conversations": TALK}]))
    built = fit.build(words(forty_eight, tiny_llava_folder, tmp_path / "out", f"--data.validation_json={held}"))
    built.datamodule.setup()
    assert [item.id for item in built.datamodule.validation_set] == ["v/0"]


# Who is to blame


@pytest.fixture
def no_workers_left():
    """After an error torch waits ten seconds for its workers, whenever memory is swept."""
    yield
    kill_left_behind()


def training(world, vlm, out, *extra):
    return [*words(world, vlm, out, "--data.validation_share=0.2", "--trainer.limit_val_batches=0"), *extra]


@pytest.mark.parametrize("workers", [0, 1])
def test_failed_batch_names_the_batch_of_the_failure(
    workers, forty_eight, tiny_llava_folder, tmp_path, capsys, no_workers_left
):
    """Its own id, and those of the three others of its batch, which have not been trained on."""
    (forty_eight / "images").symlink_to(forty_eight)
    out = tmp_path / "out"
    arguments = training(forty_eight, tiny_llava_folder, out, f"--data.workers={workers}", "--trainer.max_steps=12")
    with pytest.raises(SystemExit):
        fit.main(arguments)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: p5.png: broken image of entry '5'") and "Traceback" not in message, message
    failed = json.loads((out / "training" / "failed_batch_0.json").read_text())
    assert "5/0" in failed["ids"] and len(failed["ids"]) == 4


def test_no_batch_is_blamed_for_what_is_none_of_it():
    data = SimpleNamespace(batch_ids=["a/0"])
    trainer = SimpleNamespace(datamodule=data, default_root_dir="/nowhere", global_step=3, global_rank=0)
    StopAtNaN().on_train_batch_end(trainer)
    StopAtNaN().on_exception(trainer, None, OSError("disk"))
    data.batch_ids = ["b/0"]
    StopAtNaN().on_validation_batch_end(trainer)
    assert data.batch_ids == []


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_loader_is_one_line_and_has_ids(workers, forty_eight, tiny_llava_folder, no_workers_left):
    for source, make_module in SOURCES.items():
        data = make_module(str(tiny_llava_folder), forty_eight, batch_size=4, workers=workers, validation_share=0.5)
        data.setup()
        caught = []
        for loader in (data.train_dataloader(), data.val_dataloader()):
            try:
                list(loader)
            except BrokenImage as error:
                caught.append(error)
        assert len(caught) == 1 and "\n" not in str(caught[0]) and len(caught[0].ids) == 4, source
        entry = str(caught[0]).partition("entry '")[2].partition("'")[0]
        assert f"{entry}/0" in caught[0].ids and not str(caught[0]).startswith("Caught")


# Answers in free text


def exporting(figures, module, monitor="auto", **options):
    """The numbers of the validations after which the folder was written."""
    callback, written = ExportPruner("/nowhere", monitor, **options), []
    callback.export = lambda *_: written.append(callback.best)
    for values in figures:
        state = SimpleNamespace(fn="fit")
        trainer = SimpleNamespace(sanity_checking=False, state=state, callback_metrics=values)
        callback.on_validation_end(trainer, module)
    return written


def test_the_best_state_is_chosen_by_kl_where_answers_are_free_text():
    figures = [{"val/kl": kl, "val/score": 0.0} for kl in (3.0, 1.0, float("nan"), float("inf"), 2.0)]
    assert exporting(figures, SimpleNamespace(best_by=("val/kl", "min"))) == [3.0, 1.0]
    assert exporting(figures, SimpleNamespace(), "val/kl", mode="min") == [3.0, 1.0]
    figures = [{"val/score": score} for score in (float("nan"), 0.5, 0.2, 0.5)]
    assert exporting(figures, SimpleNamespace()) == [0.5, 0.5]


def test_a_best_of_another_figure_is_none():
    first, second = ExportPruner("/nowhere"), ExportPruner("/nowhere")
    first.best, first.by = 0.0, "val/score"
    second.load_state_dict(first.state_dict())
    second.export = lambda *_: None
    trainer = SimpleNamespace(
        sanity_checking=False, state=SimpleNamespace(fn="fit"), callback_metrics={"val/kl": torch.tensor(2.0)}
    )
    second.on_validation_end(trainer, SimpleNamespace(best_by=("val/kl", "min")))
    assert (second.best, second.by) == (2.0, "val/kl")


def test_a_training_on_long_answers_prints_no_nan_and_keeps_the_nearest(tmp_path, tiny_llava_folder, caplog, capsys):
    """The random model has no answer right, so every share of its answers would be one of nothing."""
    answers = ["red blue left", "yes no 1 2", "the ball is red", "blue"]
    entries = [
        {"id": str(n), "image": f"{n}.png", "conversations": talk("<image> what ?", answers[n % 4])} for n in range(24)
    ]
    write_json(tmp_path, entries[:4])
    for number in range(24):
        (tmp_path / f"{number}.png").write_bytes(encoded(number))
    (tmp_path / "data.json").write_text(json.dumps(entries))
    (tmp_path / "images").symlink_to(tmp_path)
    out = tmp_path / "out"
    with caplog.at_level(logging.INFO):
        fit.main(words(tmp_path, tiny_llava_folder, out, "--trainer.val_check_interval=2", "--trainer.max_steps=4"))
    printed = caplog.text + "".join(capsys.readouterr())
    assert "full model 0.000 word for word" in printed and "nats at 0.333" in printed
    table = (out / "training" / "logs" / "version_0" / "metrics.csv").read_text()
    assert not {"nan", "inf"} & set(table.replace("\n", ",").split(","))
    assert "nan" not in printed and " inf " not in printed
    header, *lines = (line.split(",") for line in table.splitlines())
    kl = {int(row["step"]): float(row["val/kl"]) for row in (dict(zip(header, line, strict=True)) for line in lines)
          if row["val/kl"]}  # fmt: skip
    assert len(kl) == 2
    checkpoint = torch.load(out / "training" / "checkpoints" / "last.ckpt", weights_only=False)
    (chosen,) = [state for name, state in checkpoint["callbacks"].items() if name.startswith("ExportPruner")]
    assert chosen["by"] == "val/kl" and any(chosen["best"] == pytest.approx(value, rel=1e-4) for value in kl.values())
    last = checkpoint["state_dict"]
    written = load_file(out / "model.safetensors")
    is_last = all(torch.equal(last[f"pruner.{name}"], value) for name, value in written.items())
    assert is_last == (min(kl, key=kl.get) == max(kl))


class Choosy(Exception):
    """Of somebody's own."""


def choosy(processor, refuses):
    """A processor that raises an error of its own at some pictures, whatever their shape."""
    kind = type(processor)

    class Picky(kind):
        def __call__(self, text=None, images=None, **options):
            if any(refuses(image) for row in images for image in row):
                raise Choosy("not\nthis one")
            return super().__call__(text=text, images=images, **options)

    processor.__class__ = Picky
    return processor


def is_white(image):
    return image.getextrema()[0][0] > 250


@pytest.fixture
def some_white(tmp_path):
    entries = [{"id": str(n), "image": f"{n}.png", "conversations": TALK} for n in range(12)]
    (tmp_path / "data.json").write_text(json.dumps(entries))
    for number in range(12):
        Image.new("RGB", (48, 48), "white" if number in (3, 4, 8) else "grey").save(tmp_path / f"{number}.png")
    return tmp_path


def module_of(folder, vlm, refuses, share, workers=0):
    data = LlavaJsonDataModule(
        str(vlm), folder / "data.json", folder, batch_size=2, workers=workers, broken_share=share, validation_share=0.3
    )
    data.collate.processor = choosy(data.collate.processor, refuses)
    data.setup()
    return data


def read(data):
    return [*data.train_dataloader(), *data.val_dataloader()]


@pytest.mark.parametrize("workers", [0, 1])
def test_whatever_a_processor_raises_at_one_picture_counts_as_broken(workers, some_white, tiny_llava_folder):
    data = module_of(some_white, tiny_llava_folder, is_white, 0.25, workers)
    for _ in range(2):  # a second epoch counts none of them twice
        batches = read(data)
        ids = [name for batch in batches for name in batch["ids"]]
        assert len(ids) >= 10 and not {"3/0", "4/0", "8/0"} & set(ids)
        assert all(len(batch["input_ids"]) == len(batch["ids"]) for batch in batches)
    assert data.train_set.tally.broken == 3


def test_such_pictures_are_named_and_bounded(some_white, tiny_llava_folder):
    with pytest.raises(PruneZooError, match=r"3 of 12 items have broken images.*refuses its picture of 48 x 48 pixels"):
        read(module_of(some_white, tiny_llava_folder, is_white, 0.2))
    with pytest.raises(BrokenImage, match=r"^[348]/0: \w+ refuses its picture of 48 x 48 pixels \(not this one\)"):
        read(module_of(some_white, tiny_llava_folder, is_white, 0.0))


def test_an_error_that_is_not_of_one_picture_stays_what_it_is(some_white, tiny_llava_folder, monkeypatch):
    """The processor refuses every picture, or our own code fails: no picture is to blame."""
    data = module_of(some_white, tiny_llava_folder, lambda _: True, 0.9)
    with pytest.raises(Choosy):
        list(data.train_dataloader())
    assert data.train_set.tally.broken == 0

    def broken(*_):
        raise KeyError("a mistake of ours")

    data = module_of(some_white, tiny_llava_folder, lambda _: False, 0.9)
    monkeypatch.setattr(ConversationCollator, "_labels", broken)
    with pytest.raises(KeyError, match="a mistake of ours"):
        list(data.train_dataloader())
    assert data.train_set.tally.broken == 0
