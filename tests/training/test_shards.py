"""Caches of sharded tensors: the same bytes however they were made, and clear words about what is wrong with them."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from prunezoo import PruneZooError
from trainers.data.shards import MANIFEST, ShardedCache, fill

ITEMS, SHARD = 10, 3


@dataclass(frozen=True)
class Roots:
    """Computes roots of the even numbers, not faster than it is told, and notes which process did what.

    Processes wait for one another before the first item, so that each has something to do.
    """

    pace: float = 0.0
    diary: Path | None = None
    broken: int | None = None
    processes: int = 1

    def __call__(self, number):
        self.note(f"begin {number}")
        while self.diary and len(noted(self.diary, "begin")) < self.processes:
            time.sleep(0.01)

        def compute(numbers, advance):
            even = [n for n in numbers if n % 2 == 0]
            for n in numbers:
                if n == self.broken:
                    raise PruneZooError(f"item {n} is broken")
                self.note(f"item {n} {os.getpid()}")
                time.sleep(self.pace)
                advance(1)
            return {"item": torch.tensor(even), "root": torch.tensor(even).double().sqrt()}

        return compute

    def note(self, text):
        if self.diary:
            with self.diary.open("a") as file:
                file.write(f"{text}\n")


def noted(diary, kind):
    """The entries of one kind in a diary, as words."""
    lines = diary.read_text().splitlines() if diary.exists() else []
    return [line.split()[1:] for line in lines if line.startswith(kind)]


def make(folder, items=ITEMS, **facts):
    return ShardedCache(folder, {"what": "roots", **facts}, items, SHARD, "make it again")


def filled(folder, processes=1, worker=None):
    told = []
    fill(make(folder), worker or Roots(), processes, told.append)
    assert sum(told) == ITEMS
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_place_where_no_folder_can_be_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(PruneZooError, match=r"name a folder|is no folder"):
            make(place)


def test_what_was_written_is_read_and_counted(tmp_path):
    files = filled(tmp_path / "cache")
    assert sorted(files) == [*(f"0000{n}.safetensors" for n in range(4)), MANIFEST]
    shards = list(make(tmp_path / "cache").read())
    assert torch.cat([shard["item"] for shard in shards]).tolist() == [0, 2, 4, 6, 8]
    assert torch.equal(torch.cat([shard["root"] for shard in shards]), torch.arange(0, 10, 2).double().sqrt())
    manifest = json.loads(files[MANIFEST])
    assert manifest["skipped"] == 5 and manifest["facts"]["what"] == "roots"
    assert [shard["items"] for shard in manifest["shards"].values()] == [3, 3, 3, 1]
    assert [shard["rows"] for shard in manifest["shards"].values()] == [2, 1, 2, 0]


def test_two_killed_processes_and_one_that_goes_on_write_what_one_writes(tmp_path):
    """SIGKILL to the parent, with nothing to clean up by, once a shard is in the manifest and others are not."""
    folder, diary = tmp_path / "cache", tmp_path / "diary"
    code = (
        "from pathlib import Path; from test_shards import *; "
        f"fill(make(Path({str(folder)!r})), Roots(0.3, Path({str(diary)!r}), processes=2), 2, print)"
    )
    paths = os.pathsep.join(
        [str(Path(__file__).parent), str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (folder / MANIFEST).exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = make(folder).missing()
    assert 0 < len(left) < 4, "it was killed too late"
    workers = {pid for _, pid in noted(diary, "item")}
    assert len(workers) == 2
    for pid in workers:
        while alive(pid):  # no process outlives its parent
            time.sleep(0.05)
    seen = {name: (folder / name).stat().st_mtime_ns for name in set(make(folder).names) - set(left)}
    assert filled(folder) == filled(tmp_path / "unbroken")
    assert all((folder / name).stat().st_mtime_ns == then for name, then in seen.items()), "finished shards are kept"


def alive(pid: str) -> bool:
    """Whether a process still does something; one that is dead and not yet reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-5]), "bytes where"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x01"), "is damaged"),
    ],
    ids=["missing", "short", "changed"],
)
def test_a_harmed_shard_is_named_and_only_it_is_computed_again(harm, words, tmp_path):
    before = filled(tmp_path / "cache")
    path = tmp_path / "cache" / "00002.safetensors"
    harm(path)
    with pytest.raises(PruneZooError, match=f"00002.safetensors.*{words}.*; make it again"):
        list(make(tmp_path / "cache").read())
    diary = tmp_path / "diary"
    assert filled(tmp_path / "cache", worker=Roots(diary=diary)) == before
    assert [number for number, _ in noted(diary, "item")] == ["6", "7", "8"]


def test_another_content_is_refused_and_the_difference_named(tmp_path):
    filled(tmp_path)
    with pytest.raises(PruneZooError, match="made with split=None, wanted is 'test'"):
        make(tmp_path, split="test")
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(PruneZooError, match="not a manifest"):
        make(tmp_path)


def test_more_items_of_the_same_keep_what_lies_there(tmp_path):
    filled(tmp_path)
    assert make(tmp_path, items=12).missing() == ["00003.safetensors"], "it had one item of three"
    assert make(tmp_path, items=9).missing() == [] and make(tmp_path, items=9).rows == 5
    assert torch.cat([shard["item"] for shard in make(tmp_path, items=6).read()]).tolist() == [0, 2, 4]


@pytest.mark.parametrize("processes", [1, 2])
def test_what_goes_wrong_in_a_process_is_said_and_the_rest_is_kept(processes, tmp_path):
    with pytest.raises(PruneZooError, match="item 7 is broken"):
        fill(make(tmp_path), Roots(broken=7), processes, lambda items: None)
    assert "00002.safetensors" in make(tmp_path).missing()


def test_too_small_a_disk_is_told_before_and_a_full_one_leaves_no_debris(tmp_path):
    cache = make(tmp_path / "cache")
    assert cache.require_space(100) == 100 * ITEMS
    with pytest.raises(PruneZooError, match="GB will be needed"):
        cache.require_space(10**15)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    caught = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))
    try:
        with pytest.raises(OSError) as full:
            fill(cache, Roots(), 1, lambda items: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, caught)
    assert not list(cache.folder.iterdir()) and full.value.errno
    assert filled(tmp_path / "cache") == filled(tmp_path / "other")
