"""What a cache must never do: hand out what was said of other data, or of another model; and what it says instead."""

import json
import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from launch import Holder
from safetensors import safe_open
from tiny_llava import make_image
from torch.utils.data import Subset

from prunezoo import PruneZooError, build_pruner, load_pruner
from trainers.caches.arms import LlavaJsonArms
from trainers.caches.cached import TaughtLlavaJson, TaughtSuite
from trainers.caches.maps import LlavaJsonMaps
from trainers.caches.vlm_cache import fingerprint
from trainers.data.llava_json import LlavaJson
from trainers.data.shards import MANIFEST, ShardedCache, fill
from trainers.data.suite import load_suite
from trainers.stop_rule import LossWorker, losses_of, with_stops
from trainers.training.budget_policy import BudgetModule
from trainers.training.distill import DistillModule
from trainers.training.explain import ExplainModule

VLM = str(Path(__file__).parent.parent.parent / "checkpoints" / "tiny-llava")
LATENTS = str(Path(VLM).parent / "tail-drop-tiny")
ITEMS = 14


@pytest.fixture
def data(tmp_path):
    """A LLaVA-format file and its pictures; a picture each entry."""
    entries = []
    for number, item in enumerate(load_suite("scenes", "train", ITEMS)):
        item.image.save(tmp_path / f"{number}.png")
        turns = [{"from": w, "value": t} for pair in item.turns for w, t in zip(("human", "gpt"), pair, strict=True)]
        entries.append({"id": item.id, "image": f"{number}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(entries))
    return tmp_path


@dataclass
class Kind:
    """A kind of cache, and how it is made of the data in a folder."""

    trained: object
    source: object
    option: str

    def make(self, data, **extra):
        module = self.source(
            VLM,
            **{self.option: str(data / "cache")},
            **{"json": data / "data.json", "images": data, "batch_size": 4, "validation_share": 0.01, **extra},
            shard_items=4,
        )
        module.make_cache(self.trained)
        return module.cache(self.trained)


class Losses:
    """Of `trainers.stop_rule`, which reads its cache by itself."""

    def make(self, data):
        latents = with_stops(load_pruner(LATENTS), (1, 2, 4))
        items = LlavaJson(data / "data.json", data).part("train", 0.01)
        worker = LossWorker(VLM, "float32", Subset(items, range(len(items))), 4, None, latents)
        losses_of(worker, data / "cache", shard_items=4)


def answers():
    pruner = build_pruner("ppm", width=128, hidden=16, heads=2, blocks=1, text_blocks=1)
    return Kind(DistillModule(VLM, pruner, guide_weight=0.0), TaughtLlavaJson, "teacher_cache")


def maps():
    return Kind(ExplainModule(VLM, build_pruner("explain_cnn", widths=(8,), heads=0)), LlavaJsonMaps, "maps")


def arms():
    reader = {"width": 128, "hidden": 16, "heads": 2, "blocks": 1, "text_blocks": 1}
    policy = build_pruner("budget", inner="uniform", inner_config={}, reader_config=reader, arms=(0.1, 0.5))
    return Kind(BudgetModule(VLM, policy, "uniform", mean=0.2), LlavaJsonArms, "arms")


@pytest.fixture(scope="module", params=[answers, maps, arms, Losses], ids=["answers", "maps", "arms", "losses"])
def kind(request):
    return request.param()


def change(data, edit):
    path = data / "data.json"
    entries = json.loads(path.read_text())
    edit(entries)
    path.write_text(json.dumps(entries))


def removed(data):
    change(data, lambda entries: entries.pop(10))


def reworded(data):
    change(data, lambda entries: entries[10]["conversations"][0].update(value="what is there ?"))


def repainted(data):
    make_image(3).resize((96, 96)).save(data / "10.png")


def written(data):
    return {path.name: path.read_bytes() for path in (data / "cache").iterdir()}


@pytest.mark.parametrize("other", [removed, reworded, repainted])
def test_a_cache_of_other_data_is_refused_whichever_item_differs(other, kind, data):
    """The eleventh of fourteen; what lies there stays."""
    kind.make(data)
    before = written(data)
    other(data)
    with pytest.raises(PruneZooError, match=r"0000\d.safetensors was made of other data: its item \d+, 'train-\d+/\d'"):
        kind.make(data)
    assert written(data) == before
    (lost,) = data.glob("cache/00001.safetensors")
    lost.unlink()  # computing what is missing is no way around it
    with pytest.raises(PruneZooError, match="made of other data"):
        kind.make(data)


def test_the_same_data_is_taken_wherever_it_lies_and_whenever_it_was_written(kind, data):
    kind.make(data)
    shards = {path.name: path.read_bytes() for path in data.glob("cache/*.safetensors")}
    for path in data.glob("*.png"):
        path.write_bytes(path.read_bytes())
        os.utime(path, (0, 0))
    kind.make(data)
    assert {path.name: path.read_bytes() for path in data.glob("cache/*.safetensors")} == shards


def test_pictures_are_opened_again_only_where_their_files_have_changed(data, monkeypatch):
    kind, opened = answers(), []
    plain = LlavaJson.open
    kind.make(data)
    monkeypatch.setattr(LlavaJson, "open", lambda self, picture: opened.append(picture) or plain(self, picture))
    monkeypatch.setattr("trainers.caches.cached.LogitsWorker.bytes_per_item", lambda self, vlm: 1)
    kind.make(data)
    assert opened == []
    os.utime(data / "9.png", (0, 0))
    kind.make(data)
    assert opened and "9.png" in opened and len(set(opened)) == 4, "its shard"
    opened.clear()
    kind.make(data)
    assert opened == []
    whole = (data / "9.png").read_bytes()  # as large, and as old, as it was
    (data / "9.png").write_bytes((data / "8.png").read_bytes().ljust(len(whole), b"\0")[: len(whole)])
    make_image(1).resize((96, 96)).save(data / "9.png")
    os.utime(data / "9.png", (0, 0))
    with pytest.raises(PruneZooError, match="made of other data"):
        kind.make(data)


def test_a_broken_picture_hides_no_change_of_the_one_in_its_place(data):
    kind = answers()
    (data / "10.png").write_bytes(b"no picture")
    kind.make(data, broken_share=0.5)
    kind.make(data, broken_share=0.5)
    make_image(3).resize((96, 96)).save(data / "10.png")
    with pytest.raises(PruneZooError, match="made of other data"):
        kind.make(data, broken_share=0.5)


def test_a_drawn_suite_is_known_by_the_code_that_draws_it(tmp_path, monkeypatch):
    source = TaughtSuite(VLM, str(tmp_path / "cache"), shard_items=4, train_items=6)
    trained = answers().trained
    source.make_cache(trained)
    source.make_cache(trained)
    monkeypatch.setattr("trainers.data.scenes.drawn_by", lambda: "another code")
    source.make_cache(trained)  # compared anew, and the same
    monkeypatch.setattr("trainers.data.scenes.drawn_by", lambda: "a third one")
    monkeypatch.setattr("trainers.data.scenes._SEEDS", {"train": 77})
    with pytest.raises(PruneZooError, match="made of other data"):
        source.make_cache(trained)


def test_a_cache_of_before_says_in_one_line_what_to_do(kind, data):
    kind.make(data)
    path = data / "cache" / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["facts"]["content"] = manifest["facts"]["content"].replace("2", "1")
    manifest["facts"]["sample"] = "0" * 64
    for shard in manifest["shards"].values():
        del shard["stamp"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(PruneZooError) as refused:
        kind.make(data)
    said = str(refused.value)
    assert "was made with content=" in said and "name another folder, or delete this one" in said and "\n" not in said


ENTRY = {"items": 4, "rows": 4, "bytes": 1, "sha256": "", "stamp": None}


def of_shards(shards):
    return json.dumps({"facts": {"what": "answers", "shard_items": 4}, "shards": shards})


@pytest.mark.parametrize(
    ("text", "fine"),
    [
        ("", False),
        ("{", False),
        ("[]", False),
        ("null", False),
        ('{"facts": []}', False),
        ('{"facts": {}, "shards": []}', False),
        ("[" * 100_000, False),
        (b"\xff\xfe", False),
        (of_shards([]), False),
        (of_shards({"00000.safetensors": []}), False),
        (of_shards({"00000.safetensors": {**ENTRY, "items": "4"}}), False),
        (of_shards({"00000.safetensors": {**ENTRY, "rows": None}}), False),
        (of_shards({"00000.safetensors": {**ENTRY, "more": 1}}), False),
        (of_shards({"00000.safetensors": ENTRY}), True),
        (of_shards({"zero.safetensors": ENTRY}), True),
        (of_shards({"../x": ENTRY}), True),
        (of_shards({}), True),
    ],
)
def test_a_damaged_manifest_is_one_line_or_what_it_lacks_is_computed(text, fine, tmp_path):
    items, facts = load_suite("scenes", "train", 4), {"what": "answers"}
    (tmp_path / MANIFEST).write_bytes(text if isinstance(text, bytes) else text.encode())
    said = None
    try:
        assert ShardedCache(tmp_path, facts, len(items), 4, "make it again").missing() == ["00000.safetensors"]
    except PruneZooError as refused:
        said = str(refused)
    assert (said is None) == fine
    if said is not None:
        assert said.startswith(str(tmp_path / MANIFEST)) and "\n" not in said and len(said) < 600


@dataclass(frozen=True)
class Dies:
    """Computes nothing of use, and is killed at the last item, as the system does where memory ends."""

    def __call__(self, number):
        def compute(numbers, advance):
            if 8 in numbers:
                os.kill(os.getpid(), signal.SIGKILL)
            return {"item": torch.tensor(list(numbers))}

        return compute


def test_a_process_that_is_killed_while_it_computes_is_one_line_and_what_is_done_stays(tmp_path):
    cache = ShardedCache(tmp_path, {}, 9, 2, "make it again")
    with pytest.raises(PruneZooError, match=r"a process that computes was killed.*with fewer processes"):
        fill(cache, Dies(), 2, lambda items: None)
    assert "00004.safetensors" in ShardedCache(tmp_path, {}, 9, 2, "make it again").missing()


def test_every_weight_of_a_model_counts():
    model = torch.nn.Linear(300, 300)
    before = fingerprint(model)
    with torch.no_grad():
        model.weight[7, 11] += 1e-3
    assert fingerprint(model) != before
    assert fingerprint(model.bfloat16()) != before


def test_a_cache_that_another_run_fills_is_refused_or_awaited(data):
    """In two processes: one fills, slowly; the other is refused, or waits and finds all done."""
    kind = answers()
    cache = data / "cache"
    with Holder(cache) as holder:
        with pytest.raises(PruneZooError, match=f"cache {cache}: a run is writing there, process {holder.pid} on"):
            kind.make(data)
        threading.Timer(0.5, holder.release).start()
        source = TaughtLlavaJson(VLM, str(cache), json=data / "data.json", images=data, batch_size=4, shard_items=4)
        source.make_cache(kind.trained, wait=True)
    assert (cache / MANIFEST).exists() and not (cache / ".lock").exists()


def test_digests_are_of_all_items_also_of_those_of_which_nothing_is_kept(data):
    cache = maps().make(data)
    shards = [safe_open(cache.folder / name, "pt") for name in cache.names]
    assert sum(len(shard.get_tensor("digests")) for shard in shards) == cache.items
