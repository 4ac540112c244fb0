"""Conversations from other places than one JSON file, broken pictures among them; batches of items of like length."""

import io
import json
import logging
import shutil
import subprocess
import sys
import tarfile
from itertools import islice
from pathlib import Path

import datasets
import fsspec
import pytest
import torch
from tiny_llava import make_image
from torch.utils.data import DataLoader

from prunezoo import PruneZooError
from trainers.data.broken import SkipBroken, Tally
from trainers.data.hub_dataset import HubDataset
from trainers.data.llava_json import LlavaJson
from trainers.data.loading import ResumableLoader, begin_worker
from trainers.data.modules import HubDataModule, LlavaJsonDataModule, WebShardsDataModule
from trainers.data.web_shards import WebShards, braces

ROOT = Path(__file__).parent.parent.parent

TALK = [
    {"from": "human", "value": "<image>\nwhat color is the ball ?"},
    {"from": "gpt", "value": "red"},
    {"from": "human", "value": "is the ball right ?"},
    {"from": "gpt", "value": "1 2"},
]
NUMBER = 12


def encoded(number):
    file = io.BytesIO()
    make_image(number).save(file, "png")
    return file.getvalue()


def same(items, number=NUMBER):
    """Two answers of each of the pictures, in order, and the pictures are theirs."""
    assert len(items) == 2 * number
    for place in (0, 1, 2 * number - 1):
        item = items[place]
        assert item.image.tobytes() == make_image(place // 2).tobytes()
        assert len(item.turns) == 1 + place % 2 and item.turns[0] == ("what color is the ball ?", "red")
    return True


def add(shard, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    shard.addfile(member, io.BytesIO(data))


def write_shard(file, numbers, talk=None):
    with tarfile.open(fileobj=file, mode="w") as shard:
        for number in numbers:
            add(shard, f"{number:04d}.png", encoded(number))
            add(shard, f"{number:04d}.json", json.dumps(talk or {"conversations": TALK}).encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    entries = [{"id": str(n), "image": f"{n}.png", "conversations": TALK} for n in range(NUMBER)]
    for number in range(NUMBER):
        (folder / f"{number}.png").write_bytes(encoded(number))
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, entries)) + "\n\n")
    (folder / "data.json").write_text(json.dumps(entries))
    for shard in range(3):
        with (folder / f"train-{shard:02d}.tar").open("wb") as file:
            write_shard(file, range(4 * shard, 4 * shard + 4))
    return folder


def test_json_lines_are_read_as_json_is(folder):
    assert same(LlavaJson(folder / "data.json", folder)) and same(LlavaJson(folder / "data.jsonl", folder))
    (folder / "broken.jsonl").write_text('{"id": 1}\n{')
    with pytest.raises(PruneZooError, match=r"broken\.jsonl: not readable"):
        LlavaJson(folder / "broken.jsonl", folder)


def table(**columns):
    images = {"image": [{"bytes": encoded(n), "path": None} for n in range(NUMBER)]}
    return datasets.Dataset.from_dict(images | columns).cast_column("image", datasets.Image())


def test_hugging_face_data_sets_are_read_from_folders_and_files(tmp_path):
    talks = table(conversations=[TALK] * NUMBER)
    talks.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": talks}).save_to_disk(tmp_path / "splits")
    talks.to_parquet(tmp_path / "data.parquet")
    for name in ("one", "splits", "data.parquet"):
        assert same(HubDataset(str(tmp_path / name))), name
    table(ask=["what ?"] * NUMBER, answer=["red"] * NUMBER).save_to_disk(tmp_path / "pairs")
    pairs = HubDataset(str(tmp_path / "pairs"), columns={"question": "ask"})
    assert len(pairs) == NUMBER and pairs[3].turns == (("what ?", "red"),)
    with pytest.raises(PruneZooError, match="column question is missing, there are: answer, ask, image"):
        HubDataset(str(tmp_path / "pairs"))
    with pytest.raises(PruneZooError, match="cannot be opened as a data set, split 'test'"):
        HubDataset(str(tmp_path / "splits"), "test")


@pytest.mark.parametrize("name", ["train-{00..02}.tar", "train-*.tar"])
def test_web_dataset_shards_are_read_in_place(name, folder, tmp_path):
    assert same(WebShards(str(folder / name)))
    assert same(WebShards(str(folder / name), tmp_path))
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 3
    index = json.loads(kept[0].read_text())
    kept[0].write_text(json.dumps({**index, "samples": index["samples"][:1]}))
    assert len(WebShards(str(folder / name), tmp_path)) == 2 * (NUMBER - 3), "what is kept is not looked up again"


def test_shards_in_object_storage_are_read_by_their_url():
    for shard in range(2):
        with fsspec.open(f"memory://bucket/train-{shard}.tar", "wb") as file:
            write_shard(file, range(2 * shard, 2 * shard + 2))
    assert same(WebShards("memory://bucket/train-{0..1}.tar"), 4) and same(WebShards("memory://bucket/*.tar"), 4)


def test_what_is_wrong_with_a_shard_is_named(tmp_path):
    with pytest.raises(PruneZooError, match=r"none-\*\.tar: no such shard"):
        WebShards(str(tmp_path / "none-*.tar"))
    (tmp_path / "a.tar").write_text("no tar")
    with pytest.raises(PruneZooError, match=r"a\.tar: not a readable tar file"):
        WebShards(str(tmp_path / "a.tar"))
    with (tmp_path / "b.tar").open("wb") as file:
        write_shard(file, [0], {"text": "a caption"})
    with pytest.raises(PruneZooError, match=r"b\.tar: sample '0000': key 'conversations'"):
        WebShards(str(tmp_path / "b.tar"))
    with tarfile.open(tmp_path / "c.tar", "w") as shard:
        add(shard, "x.json", b"{}")
    with pytest.raises(PruneZooError, match=r"c\.tar: sample 'x': its picture is missing"):
        WebShards(str(tmp_path / "c.tar"))
    assert braces("a{08..10}b{0..1}") == [f"a{n}b{m}" for n in ("08", "09", "10") for m in (0, 1)]


def test_all_sources_train_with_the_same_data_module(folder, tmp_path, tiny_llava_folder):
    table(conversations=[TALK] * NUMBER).save_to_disk(tmp_path / "set")
    common = {"batch_size": 2, "workers": 0, "validation_share": 0.3}
    for data in (
        LlavaJsonDataModule(str(tiny_llava_folder), folder / "data.jsonl", folder, **common),
        HubDataModule(str(tiny_llava_folder), str(tmp_path / "set"), **common),
        WebShardsDataModule(str(tiny_llava_folder), str(folder / "train-*.tar"), **common),
    ):
        data.setup()
        train = [name for batch in data.train_dataloader() for name in batch["ids"]]
        held = [name for batch in data.val_dataloader() for name in batch["ids"]]
        assert len(train) == len(set(train)) and not set(train) & set(held)
        assert len(train) + len(held) == 2 * NUMBER and len(held) < len(train)


def test_shards_that_are_moved_keep_their_split(folder, tmp_path):
    def held_out(place):
        return [item.id for item in WebShards(str(place / "train-*.tar")).part("validation", 0.5)]

    copies = [shutil.copytree(folder, tmp_path / str(number)) for number in range(4)]
    assert all(held_out(copy) == held_out(folder) for copy in copies)


# Broken pictures


@pytest.fixture
def some_broken(folder, tmp_path):
    for number in range(NUMBER):
        whole = (folder / f"{number}.png").read_bytes()
        (tmp_path / f"{number}.png").write_bytes(whole[:60] if number in (3, 4) else whole)
    return LlavaJson(folder / "data.json", tmp_path)


def skipping(items, share):
    return SkipBroken(items, Tally(len(items), share))


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_pictures_are_counted_once_and_left_out(workers, some_broken, caplog):
    items = skipping(some_broken, 0.2)  # 4 of 24 items
    loader = DataLoader(
        items, 2, collate_fn=list, num_workers=workers, worker_init_fn=begin_worker if workers else None
    )
    with caplog.at_level(logging.WARNING):
        seen = [[item.id for batch in loader for item in batch] for _ in range(2)]
    assert seen[0] == seen[1] and len(seen[0]) == 24, "batches stay whole"
    assert {name.split("/")[0] for name in seen[0]} == {str(n) for n in range(NUMBER)} - {"3", "4"}
    assert items.tally.broken == 4
    if not workers:
        assert len([r for r in caplog.records if "broken image of entry" in r.message]) == 4


def test_going_through_the_items_comes_to_an_end(some_broken):
    items = skipping(some_broken, 0.2)
    seen = [item.id for item in islice(items, 2 * len(items))]
    assert len(seen) == len(items) == 24 and items[-1].id == seen[-1]
    with pytest.raises(IndexError):
        items[24]


def test_too_many_broken_pictures_are_an_error(some_broken):
    with pytest.raises(PruneZooError, match=r"3 of 24 items have broken images, more than broken_share=0\.1"):
        [skipping(some_broken, 0.1)[i] for i in range(24)]
    with pytest.raises(PruneZooError, match="broken image of entry '3'"):
        skipping(some_broken, 0.0)[6]
    with pytest.raises(PruneZooError, match="broken_share"):
        skipping(some_broken, 1.0)


# Batches of items of like length


def test_batches_of_like_length_repeat_nothing_and_go_on_in_mid_epoch():
    lengths = torch.randint(1, 1000, (1003,), generator=torch.Generator().manual_seed(0)).tolist()

    def loader(rank, grouped=True):
        return ResumableLoader(range(1003), 4, list, 0, 2, rank, seed=5, lengths=lengths if grouped else None)

    def spread(batches):
        return sum(max(lengths[i] for i in batch) - min(lengths[i] for i in batch) for batch in batches) / len(batches)

    both, plain = [list(loader(rank)) for rank in range(2)], list(loader(0, grouped=False))
    dealt = [i for batches in both for batch in batches for i in batch]
    assert len(dealt) == len(set(dealt)) == 1000, "no item twice, and none left out but less than a batch"
    assert spread(both[0]) < 0.2 * spread(plain)
    together = [a + b for a, b in zip(*both, strict=True)]
    assert spread(together) < 0.2 * spread(plain), "of all processes alike: none waits for another"
    first = [max(lengths[i] for i in batch) for batch in both[0]]
    assert first != sorted(first), "batches come in a random order"
    again, other = loader(1), loader(1)
    straight = [batch for _ in range(2) for batch in again]
    stream = iter(other)
    done = [next(stream) for _ in range(7)]
    resumed = loader(1)
    resumed.load_state_dict(other.state_dict())
    assert done + [batch for _ in range(2) for batch in resumed] == straight
    assert straight[:125] != straight[125:], "each epoch has its own order"


ABANDONED = """
import sys
from trainers.data.loading import ResumableLoader

loader = ResumableLoader(list(range(100)), 2, list, num_workers=1)
batches = iter(loader)
print(len(next(batches)), flush=True)
sys.modules["kept"] = batches  # so that nothing shuts the worker down before the process ends
raise SystemExit(3)
"""


def test_a_process_ends_though_its_workers_heed_no_signal():
    done = subprocess.run(
        [sys.executable, "-c", ABANDONED], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 3 and done.stdout == "2\n", done.stderr
