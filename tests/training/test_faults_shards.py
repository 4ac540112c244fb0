"""WebDataset shards that lie."""

import json
import os
import tarfile
from pathlib import Path

import pytest
from talking import TALK, add, encoded, write_shard
from tiny_llava import make_image
from torch.utils.data import DataLoader

from prunezoo import PruneZooError
from trainers.data.pictures import BrokenImage
from trainers.data.web_shards import WebShards, braces


def test_folders_links_and_pipes_in_a_shard_are_no_samples(tmp_path):
    kinds = {"dir": tarfile.DIRTYPE, "pipe": tarfile.FIFOTYPE, "link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE,
             "device": tarfile.CHRTYPE}  # fmt: skip
    said = json.dumps({"conversations": TALK}).encode()
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        add(shard, "0.png", encoded(0))
        add(shard, "0.json", said)
        for name, kind in kinds.items():
            add(shard, f"{name}.json", b"", type=kind, linkname="/etc/passwd" if name == "link" else "0.json")
    assert [item.id for item in WebShards(str(tmp_path / "a.tar"))] == ["a/0/0"]
    for kind in kinds.values():
        with tarfile.open(tmp_path / "b.tar", "w") as shard:
            add(shard, "0.png", b"", type=kind, linkname="/etc/passwd")
            add(shard, "0.json", said)
        with pytest.raises(PruneZooError, match=r"b\.tar: sample '0': its picture is missing"):
            WebShards(str(tmp_path / "b.tar"))


def sparse(path, name):
    """A member of 6 GB that takes 1.5 KB: an old GNU header with one piece of data."""
    member = tarfile.TarInfo(name)
    member.size, member.type = 512, tarfile.GNUTYPE_SPARSE
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    size = 6 * 10**9
    header[386:398], header[398:410] = b"00000000000\0", b"00000001000\0"
    header[483:495] = b"%011o\0" % size
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    path.write_bytes(bytes(header) + bytes(512) + bytes(512))
    with tarfile.open(path) as shard:
        (found,) = shard.getmembers()
        assert found.issparse() and found.size == size


def test_a_shard_with_holes_is_refused(tmp_path):
    for name in ("0.json", "0.png"):
        sparse(tmp_path / "a.tar", name)
        assert (tmp_path / "a.tar").stat().st_size == 1536
        with pytest.raises(PruneZooError, match=r"a\.tar: sample '0': it is stored with holes"):
            WebShards(str(tmp_path / "a.tar"))


def test_a_shard_that_claims_more_than_it_holds_is_refused(tmp_path):
    for size, words_ in ((6 * 10**9, r"sample '0': its \.json has 6,000,000,000 bytes"), (10**6, "not a readable tar")):
        member = tarfile.TarInfo("0.json")
        member.size = size
        (tmp_path / "a.tar").write_bytes(member.tobuf() + bytes(1024))
        with pytest.raises(PruneZooError, match=words_):
            WebShards(str(tmp_path / "a.tar"))
    said = json.dumps({"conversations": TALK}).encode()
    member = tarfile.TarInfo("0.png")
    member.size = 6 * 10**9
    with tarfile.open(tmp_path / "b.tar", "w") as shard:
        add(shard, "0.json", said)
    (tmp_path / "b.tar").write_bytes((tmp_path / "b.tar").read_bytes()[:1024] + member.tobuf())
    with pytest.raises(PruneZooError, match="not a readable tar"):
        WebShards(str(tmp_path / "b.tar"))


def test_ranges_of_shards_are_bounded():
    for text in ("a-{0..99999999999}.tar", "{0..9999}{0..9999}.tar", "{0..1}" * 2000):
        with pytest.raises(PruneZooError, match="more than 1,000,000 shards"):
            braces(text)
    assert braces("a{08..10}b{0..1}c") == [f"a{n}b{m}c" for n in ("08", "09", "10") for m in (0, 1)]
    assert braces("{5..0}") == [] and braces("{a..b}") == ["{a..b}"] and braces("plain") == ["plain"]
    with pytest.raises(PruneZooError, match="no such shard"):
        WebShards("{5..0}.tar")


def test_what_is_no_shard_is_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "folder.tar").mkdir()
    for name in ("pipe.tar", "folder.tar", "*.tar"):
        with pytest.raises(PruneZooError, match="not a file"):
            WebShards(str(tmp_path / name))
    for url in ("nope://bucket/a.tar", "nope://bucket/*.tar", str(tmp_path / "none.tar")):
        with pytest.raises(PruneZooError) as caught:
            WebShards(url)
        assert "\n" not in str(caught.value) and url in str(caught.value)


def test_an_index_of_another_shard_or_a_damaged_one_is_made_anew(tmp_path):
    index = tmp_path / "index"
    write_shard(tmp_path / "a.tar", [TALK])
    assert len(WebShards(str(tmp_path / "a.tar"), index)) == 1
    write_shard(tmp_path / "a.tar", [TALK] * 60, encoded(1))
    again = WebShards(str(tmp_path / "a.tar"), index)
    assert len(again) == 60 and again[59].image.tobytes() == make_image(1).tobytes()
    (kept,) = index.iterdir()
    for damage in ("", "{", "[]", "null", '{"bytes": 1}', kept.read_text()[:-9], kept.read_text().replace("[", "7")):
        kept.write_text(damage)
        assert len(WebShards(str(tmp_path / "a.tar"), index)) == 60
        assert json.loads(kept.read_text())["bytes"] == Path(tmp_path / "a.tar").stat().st_size


def test_a_shard_that_is_gone_later_is_a_broken_picture(tmp_path):
    data = write_shard(tmp_path / "a.tar", [TALK] * 2)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(BrokenImage, match="broken image of entry 'a/1'"):
        data[1]
    assert len(DataLoader(data, 1, collate_fn=list)) == 2
