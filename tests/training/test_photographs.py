"""Folders of photographs: splits that go by content, what is taken, what cannot be read."""

from pathlib import Path

import pytest
from tiny_tokenizer import picture, save_photographs

from prunezoo import PruneZooError
from trainers.data.photographs import PhotographDataModule, photographs, spread


def test_the_splits_are_disjoint_and_go_by_content(tmp_path):
    folder = save_photographs(tmp_path / "photographs")
    parts = [photographs(folder, split) for split in ("train", "validation", "test")]
    assert sum(map(len, parts)) == 60 == len({path for part in parts for path in part})
    assert len(parts[0]) > len(parts[1]) > 0 < len(parts[2])
    held_out = parts[2][0]
    other = tmp_path / "other"
    other.mkdir()
    (other / "renamed.png").write_bytes(held_out.read_bytes())
    assert [path.name for path in photographs(other, "test")] == ["renamed.png"]
    with pytest.raises(PruneZooError, match="no readable picture of the train split"):
        photographs(other, "train")


def test_a_limit_takes_photographs_evenly():
    paths = [Path(str(number)) for number in range(10)]
    assert [path.name for path in spread(paths, 4)] == ["0", "2", "5", "7"]
    assert spread(paths, 99) == paths


def test_broken_pictures_are_counted_and_left_out(tmp_path, caplog):
    for number in range(30):
        picture(number).save(tmp_path / f"{number}.png")
    (tmp_path / "words.jpg").write_text("no picture")
    whole = (tmp_path / "7.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with caplog.at_level("INFO"):
        found = photographs(tmp_path, "train")
    assert {"words.jpg", "cut.png"}.isdisjoint(path.name for path in found)
    assert "2 of 32 pictures cannot be read and are left out: cut.png, words.jpg" in caplog.text


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    with pytest.raises(PruneZooError, match="not a folder"):
        photographs(tmp_path / "nowhere", "train")
    with pytest.raises(PruneZooError, match="split 'tset'"):
        photographs(tmp_path, "tset")
    with pytest.raises(PruneZooError, match="batch_size"):
        PhotographDataModule(str(tmp_path), 32, batch_size=0)
