"""`trainers.codec` with tokenizers of every kind: texts and captions, equal bytes, and what is refused."""

import json

import numpy as np
import pytest
from codec_errors import fails
from PIL import Image
from tiny_tokenizer import FAMILY, member, picture, save_photographs

from trainers import codec
from trainers.cli.names import CHECKPOINTS

WORDS = ["--vlm", str(CHECKPOINTS / "tiny-llava")]
SIZES: dict[str, dict] = {
    "one_d_piece": {"image_size": 48, "patch": 8},
    "instella": {"image_size": 48, "patch": 8, "token_bits": 16},
    "textok": {"image_size": 48, "patch": 8, "text_width": 128},
    "tokenflow": {"image_size": 48, "patch": 4, "scales": (1, 3, 12)},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small tokenizer of every kind, for pictures of 48 pixels and the words of the embedded model."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: str(member(name, **SIZES[name]).save_pretrained(root / name)) for name in FAMILY}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Photographs with a caption each."""
    folder = save_photographs(tmp_path_factory.mktemp("pictures") / "photographs")
    for path in folder.rglob("*.png"):
        path.with_suffix(".txt").write_text("a red circle")
    return folder


def test_a_text_goes_into_the_file_and_must_come_out_of_it(folders, tmp_path, capsys):
    picture(4, 60, 50).save(tmp_path / "in.png")
    own = ["--tokenizer", folders["textok"], *WORDS]
    painted = {}
    for said in ("a red circle", "two blue squares", ""):
        small, again = str(tmp_path / "small.1p"), str(tmp_path / "again.png")
        codec.main(["compress", str(tmp_path / "in.png"), small, "--bytes", "21", "--text", said, *own])
        for read in (said, "nothing of the kind"):
            codec.main(["decompress", small, again, "--text", read, *own])
            with Image.open(again) as file:
                assert file.size == (60, 50)
                painted[said, read] = file.tobytes()
        assert painted[said, said] != painted[said, "nothing of the kind"], "another text paints another picture"
    assert "reads a text beside each picture: say what is on it, --text" in fails(
        ["compress", str(tmp_path / "in.png"), small, "--bytes", "21", *own], capsys
    )
    assert "reads a text" in fails(["decompress", small, again, *own], capsys)
    other = ["--tokenizer", folders["instella"], "--text", "a red circle"]
    assert "--text: tokenizer 'instella' reads no text: leave it out" in fails(
        ["compress", str(tmp_path / "in.png"), small, "--bytes", "21", *other], capsys
    )
    assert "reads no text: leave it out" in fails(["decompress", small, again, *other], capsys)


def test_all_kinds_are_measured_at_equal_bytes(folders, images, tmp_path):
    sizes = (13, 30, 17, 400)
    words = ["measure", "--tokenizer", *folders.values(), "--images", str(images), "--limit", "2", *WORDS]
    report = ["--json", str(tmp_path / "m.json"), "--report", str(tmp_path / "report")]
    codec.main([*words, "--bytes", *map(str, sizes), *report])
    record = json.loads((tmp_path / "m.json").read_text())
    assert {row["codec"] for row in record["rows"]} == {*folders.values(), "jpeg", "webp"}
    assert record["kinds"] == {folder: name for name, folder in folders.items()}
    for name, folder in folders.items():
        tokenizer = member(name, **SIZES[name])
        rows = [row for row in record["rows"] if row["codec"] == folder]
        assert [row["bytes"] for row in rows] == sorted(sizes)
        for row in rows:
            fitting = [k for k in range(1, tokenizer.config.tokens + 1) if tokenizer.file_size(k) <= row["bytes"]]
            assert row["tokens"] == (max(fitting) if fitting else None)
            assert (row["fits"], row["psnr"] is None) == ((1, False) if fitting else (0, True))
    instella = [row for row in record["rows"] if row["codec"] == folders["instella"]]
    assert [row["tokens"] for row in instella] == [None, 2, 6, 6]
    assert instella[2]["psnr"] == instella[3]["psnr"], "bytes beyond the whole row change nothing"
    at = {pair["bytes"] for pair in record["paired"] if pair["rival"] == folders["instella"]}
    assert at == {17, 30, 400}, "nothing is compared where one has no file"
    with Image.open(tmp_path / "report" / "curves.png") as curves:
        assert curves.width > 1000


def test_captions_are_read_beside_the_pictures_or_from_another_folder(folders, images, tmp_path, capsys):
    words = ["measure", "--tokenizer", folders["textok"], "--images", str(images), "--limit", "2", "--bytes", "30"]
    words += WORDS
    others = tmp_path / "captions"
    figures = []
    for said in (None, "a red circle", "five green triangles"):
        for path in images.rglob("*.png"):
            file = (others / path.relative_to(images)).with_suffix(".txt")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(said or "")
        more = ["--captions", str(others)] if said else []
        codec.main([*words, *more, "--json", str(tmp_path / "m.json")])
        figures.append(json.loads((tmp_path / "m.json").read_text())["rows"][0]["psnr"])
    assert figures[0] == figures[1] != figures[2]
    for path in others.rglob("*.txt"):
        path.unlink()
    assert f"2 of 2 pictures have no caption in {others}" in fails([*words, "--captions", str(others)], capsys)
    assert "nowhere is not a folder of captions" in fails([*words, "--captions", "nowhere"], capsys)
    plain = [folders["instella"] if word == folders["textok"] else word for word in words]
    assert f"--captions {others}: none of the tokenizers reads a text" in fails(
        [*plain, "--captions", str(others)], capsys
    )


def test_what_cannot_be_measured_together_is_refused(folders, images, tmp_path, capsys):
    measure = ["measure", "--images", str(images), "--tokenizer", folders["one_d_piece"]]
    other = str(member("instella").save_pretrained(tmp_path / "other"))
    assert f"different image_size cannot be measured together ({folders['one_d_piece']}: 48, {other}: 32)" in fails(
        [*measure, other], capsys
    )
    said = fails([*measure, folders["instella"], "--bytes", "13", "5"], capsys)
    assert "its smallest file has 14 bytes, and the most to be measured are 13: give more --bytes" in said
    assert "--bytes 0: at least 1" in fails([*measure, "--bytes", "0"], capsys)
    assert "length=25 is out of range" in fails([*measure, "--length", "25"], capsys)


def test_speed_of_a_tokenizer_that_reads_a_text(folders, tmp_path, capsys):
    words = ["speed", "--tokenizer", folders["textok"], "--batch", "1", "--repeats", "1", "--device", "cpu", *WORDS]
    codec.main([*words, "--text", "a red circle", "--json", str(tmp_path / "s.json")])
    rows = json.loads((tmp_path / "s.json").read_text())["rows"]
    lengths = {row["tokens"] for row in rows if row["part"] == "decode"}
    assert lengths == {1, 4, 6} and np.all([row["per_second"] > 0 for row in rows])
    assert "reads a text" in fails(words, capsys)
