"""`trainers.codec pictures`: a suite's pictures as photographs with captions."""

import numpy as np
import pytest
from PIL import Image

from prunezoo.host.parts.loading import load_processor
from trainers import codec
from trainers.data.captioned import CaptionedPhotographs
from trainers.data.photographs import Photographs, photographs
from trainers.data.scenes import WORDS, describe
from trainers.data.scenes_render import make_things
from trainers.data.suite import load_suite


def test_pictures_and_captions_are_those_of_the_suite(tmp_path, capsys):
    assert (
        codec.main(["pictures", str(tmp_path / "made"), "--suite", "scenes", "--split", "train", "--limit", "12"]) == 0
    )
    assert "12 pictures, 12 with a caption" in capsys.readouterr().out
    suite = load_suite("scenes", "train", 12)
    for index, item in enumerate(suite[:]):
        path = tmp_path / "made" / f"train-{index:06d}.png"
        assert np.array_equal(np.array(Image.open(path)), np.array(item.image))
        assert path.with_suffix(".txt").read_text() == item.caption + "\n"
    paths = photographs(tmp_path / "made", "train")
    captioned = CaptionedPhotographs(Photographs(paths, 96))
    assert captioned[0][0].shape == (3, 96, 96) and captioned[0][1] in {item.caption for item in suite[:]}


def test_what_is_there_is_not_made_again(tmp_path, monkeypatch):
    words = ["pictures", str(tmp_path), "--suite", "scenes", "--split", "train", "--limit", "3"]
    codec.main(words)
    second = tmp_path / "train-000001.png"
    second.unlink()
    made = []
    own = type(load_suite("scenes", "train")).item
    monkeypatch.setattr("trainers.data.scenes.Scenes.item", lambda self, i: made.append(i) or own(self, i))
    codec.main(words)
    assert made == [1] and second.is_file() and not list(tmp_path.glob("*.part"))


def test_a_suite_that_has_no_captions_writes_none(tmp_path, capsys):
    codec.main(["pictures", str(tmp_path), "--suite", "pages", "--split", "validation", "--limit", "2"])
    assert "2 pictures, 0 with a caption" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["validation-000000.png", "validation-000001.png"]


def test_a_folder_that_is_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        codec.main(["pictures", str(tmp_path / "file"), "--suite", "scenes", "--limit", "1"])
    assert "pictures cannot be written there" in capsys.readouterr().err


def test_a_caption_names_every_thing_in_words_that_the_model_knows():
    tokenizer = load_processor("checkpoints/tiny-llava").tokenizer
    for seed in range(20):
        things = make_things(np.random.default_rng(seed), "train")
        said = describe(things)
        assert set(said.split()) <= set(WORDS) and tokenizer.unk_token_id not in tokenizer(said).input_ids
        named = sorted(part.split()[-1] for part in said.split(" and "))
        assert named == sorted(thing.cell for thing in things)
        for thing in things:
            assert f"{thing.color} {thing.shape}" in said and " ".join(thing.number) in said
