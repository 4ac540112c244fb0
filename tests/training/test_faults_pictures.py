"""Pictures of other people, through every place that opens some: upright, RGB, bounded, and one kind of error."""

import ast
import io
import json
import os
import struct
import tarfile
import zlib
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin
from tiny_tokenizer import tiny

from prunezoo import PruneZooError
from trainers import codec
from trainers.compression import rivals
from trainers.data import pictures
from trainers.data.hub_dataset import HubDataset
from trainers.data.llava_json import LlavaJson
from trainers.data.photo_grid import _load
from trainers.data.photographs import Photographs, photographs
from trainers.data.pictures import BrokenImage, decode_picture, open_picture
from trainers.data.web_shards import WebShards
from trainers.show import read_item

ROOT = Path(__file__).parent.parent.parent
TALK = [{"from": "human", "value": "<image>\nwhat ?"}, {"from": "gpt", "value": "red"}]


def corners(width=60, height=40):
    """Red, green, blue and white, from the upper left clockwise to the lower left."""
    image = Image.new("RGB", (width, height))
    right, low = width // 2, height // 2
    image.paste("red", (0, 0, right, low))
    image.paste("lime", (right, 0, width, low))
    image.paste("blue", (right, low, width, height))
    image.paste("white", (0, low, right, height))
    return image


def seen(image):
    """The colours in the corners, from the upper left clockwise."""
    names = {(1, 0, 0): "red", (0, 1, 0): "lime", (0, 0, 1): "blue", (1, 1, 1): "white"}
    right, low = image.width - 3, image.height - 3
    pixels = (image.getpixel(place) for place in ((2, 2), (right, 2), (right, low), (2, low)))
    return [names[tuple(int(value > 127) for value in pixel)] for pixel in pixels]


def written(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def lying(orientation=6):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return written(corners(), quality=95, subsampling=0, exif=exif)


# Nothing else opens pictures


def opens_pictures(path):
    """Lines that call `Image.open`, or what opens pictures behind our back."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "open":
            owner = node.func.value
            if (owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")) in ("Image", "PIL"):
                found.append(node.lineno)
        if isinstance(node, ast.ImportFrom) and node.module == "PIL.Image":
            found.append(node.lineno)
        name = getattr(node, "id", getattr(node, "attr", None))
        if name in ("load_image", "load_images", "imread", "read_image"):
            found.append(node.lineno)
    return found


def test_pictures_are_opened_in_one_place():
    sources = [path for folder in ("modules", "trainers") for path in (ROOT / folder).rglob("*.py")]
    opening = {str(path.relative_to(ROOT)): lines for path in sources if (lines := opens_pictures(path))}
    assert list(opening) == ["trainers/data/pictures.py"] and len(opening["trainers/data/pictures.py"]) == 1
    assert len(sources) > 150, "the tree has been walked"


# Upright


def through_json(folder):
    entry = {"id": "a", "image": "a.jpg", "conversations": TALK}
    (folder / "d.json").write_text(json.dumps([entry]))
    return LlavaJson(folder / "d.json", folder)[0].image


def through_shards(folder):
    with tarfile.open(folder / "s.tar", "w") as shard:
        shard.add(folder / "a.jpg", "a.jpg")
        text = json.dumps({"conversations": TALK}).encode()
        member = tarfile.TarInfo("a.json")
        member.size = len(text)
        shard.addfile(member, io.BytesIO(text))
    return WebShards(str(folder / "s.tar"))[0].image


def through_hub(folder, **kept):
    kept = kept or {"bytes": (folder / "a.jpg").read_bytes(), "path": None}
    table = datasets.Dataset.from_dict({"image": [kept], "conversations": [TALK]})
    table.cast_column("image", datasets.Image()).save_to_disk(folder / "hub")
    return HubDataset(str(folder / "hub"))[0].image


def through_hub_by_path(folder):
    return through_hub(folder, bytes=None, path=str(folder / "a.jpg"))


def through_show(folder):
    return read_item(str(folder / "a.jpg"), "what ?").image


WHOLE = {
    "json": through_json,
    "shards": through_shards,
    "hub": through_hub,
    "hub, by path": through_hub_by_path,
    "show": through_show,
    "file": lambda folder: open_picture(folder / "a.jpg"),
}
SQUARE = {
    "photographs": lambda folder: Photographs([folder / "a.jpg"], 40).picture(0),
    "photo-grid": lambda folder: Image.fromarray(_load(folder / "a.jpg", 40)),
}


@pytest.mark.parametrize("place", [*WHOLE, *SQUARE])
def test_every_place_turns_a_picture_upright(place, tmp_path):
    (tmp_path / "a.jpg").write_bytes(lying())
    image = {**WHOLE, **SQUARE}[place](tmp_path)
    assert image.size == ((40, 60) if place in WHOLE else (40, 40))
    assert seen(image) == ["white", "red", "lime", "blue"]
    assert ImageOps.exif_transpose(image).tobytes() == image.tobytes(), "nobody turns it again"


def test_the_codec_gives_a_lying_picture_back_upright(tmp_path):
    folder = str(tiny().save_pretrained(tmp_path / "tokenizer"))
    (tmp_path / "a.jpg").write_bytes(lying())
    names = [str(tmp_path / name) for name in ("a.jpg", "small.1p", "out.png")]
    assert codec.main(["compress", *names[:2], "--bytes", "21", "--tokenizer", folder]) == 0
    assert codec.main(["decompress", *names[1:], "--tokenizer", folder]) == 0
    assert open_picture(names[2]).size == (40, 60)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_that_of_pillow(orientation):
    with Image.open(io.BytesIO(lying(orientation))) as file:
        expected = ImageOps.exif_transpose(file)
    assert decode_picture(lying(orientation)).tobytes() == expected.tobytes()


def test_exif_that_is_none_harms_nobody():
    for garbage in (b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0" + b"MM\0*\0\0\0\x08\xff\xff" * 9):
        assert seen(decode_picture(written(corners(), exif=garbage, quality=95))) == ["red", "lime", "blue", "white"]


# RGB


def clear_on_black():
    """Black writing on nothing: what is transparent is black as well."""
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 4, 8))
    return image


def test_what_is_transparent_is_laid_on_white():
    grey = clear_on_black().convert("LA")
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 0, 0, 0])
    palette.paste(0, (0, 0, 4, 8))
    for image, options in ((clear_on_black(), {}), (grey, {}), (palette, {"transparency": 1})):
        found = decode_picture(written(image, "PNG", **options))
        assert (found.getpixel((1, 1)), found.getpixel((6, 6))) == ((0, 0, 0), (255, 255, 255)), image.mode


def test_other_modes_become_rgb():
    for mode, kind in (("1", "PNG"), ("L", "JPEG"), ("P", "GIF"), ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("LAB", "TIFF")):
        found = decode_picture(written(Image.new(mode, (8, 8)), kind))
        assert found.mode == "RGB" and found.size == (8, 8), mode
    reds = decode_picture(written(Image.new("RGB", (8, 8), "red").convert("CMYK"), "JPEG", quality=95))
    assert np.abs(np.asarray(reds, int) - (255, 0, 0)).max() < 8


def ramp(dtype="<u2"):
    return np.linspace(0, 65535, 256).astype(dtype).reshape(1, 256).repeat(4, axis=0)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "big-endian TIFF", "PGM"])
def test_grey_of_16_bits_is_scaled(kind):
    if kind == "PGM":
        data = b"P5 256 4 65535\n" + ramp(">u2").tobytes()
    elif kind == "big-endian TIFF":
        data = written(Image.frombytes("I;16B", (256, 4), ramp(">u2").tobytes()), "TIFF")
    else:
        data = written(Image.fromarray(ramp()), kind)
    grey = np.asarray(decode_picture(data))[0]
    assert (grey[:, 0] == np.arange(256)).all() and (grey == grey[:, :1]).all()


def test_numbers_without_a_white_are_refused():
    for values in (np.full((4, 4), 0.5, np.float32), np.full((4, 4), 1 << 20, np.int32)):
        with pytest.raises(BrokenImage, match="says nothing of white"):
            decode_picture(written(Image.fromarray(values), "TIFF"))


def test_of_several_frames_the_first_is_taken():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = written(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert decode_picture(data).getpixel((4, 4)) == (255, 0, 0), kind


# One kind of error, whatever Pillow raises


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, *chunks):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def tiff(*entries):
    """One directory of these (tag, type, count, value)."""
    fields = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + fields + struct.pack("<I", 0)


def long_text():
    text = PngImagePlugin.PngInfo()
    text.add_text("k", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    return written(Image.new("RGB", (4, 4)), "PNG", pnginfo=text)


def cut_avif():
    data = written(corners(), "AVIF")
    return data[: len(data) // 2]


def eps():
    return b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


BROKEN = {
    "nothing": lambda: b"\0",
    "words": lambda: b"no picture at all",
    "a page of the web": lambda: b"<!DOCTYPE html><html>404</html>",
    "cut JPEG": lambda: written(corners())[:400],
    "cut AVIF": cut_avif,
    "bomb": lambda: png(65535, 65535),
    "a little too large": lambda: png(16_000, 8_001),
    "no pixels": lambda: png(8, 8),
    "long text": long_text,
    "odd TIFF": lambda: tiff((256, 2, 4, 8), (257, 4, 1, 8), (258, 3, 1, 8), (273, 4, 1, 8)),
    "endless TIFF": lambda: tiff((256, 4, 1, 1 << 30), (257, 4, 1, 1 << 30), (273, 4, 1 << 30, 8)),
    "postscript": eps,
    "wide nothing": lambda: b"P5 999999999 1 255\n",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_picture_is_named_in_every_place(name, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/was_run\nexit 1\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "a.jpg").write_bytes(BROKEN[name]())
    for place, through in {**WHOLE, **SQUARE}.items():
        with pytest.raises(PruneZooError) as caught:
            through(tmp_path)
        message = str(caught.value)
        assert "\n" not in message and len(message) < 700, place
        if place in ("json", "show", "photographs", "photo-grid"):
            assert "a.jpg" in message
        if place in ("json", "shards", "hub", "hub, by path"):
            assert isinstance(caught.value, BrokenImage) and "broken image of entry" in message
        hub = tmp_path / "hub"
        if hub.exists():
            hub.rename(tmp_path / place.replace(" ", "_"))
    assert not (tmp_path / "was_run").exists()


def test_whatever_a_reader_raises_is_the_same_error(monkeypatch):
    for error in (RuntimeError("avif"), TypeError("tiff"), struct.error("short"), MemoryError(), KeyError(3)):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(pictures.Image, "open", fail)
        with pytest.raises(BrokenImage):
            decode_picture(b"x")


def odd_files(folder):
    os.mkfifo(folder / "pipe.jpg")
    (folder / "folder.jpg").mkdir()
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    with (folder / "holes.jpg").open("wb") as file:
        file.truncate(6 << 30)
    return ["pipe.jpg", "folder.jpg", "gone.jpg", "holes.jpg", "none.jpg", "a" * 300 + ".jpg", "nul\0.jpg"]


def test_what_is_no_file_is_not_opened(tmp_path):
    for name in odd_files(tmp_path):
        with pytest.raises(BrokenImage):
            open_picture(tmp_path / name)
        with pytest.raises((PruneZooError, OSError), match=r"jpg|too long"):
            read_item(str(tmp_path / name).replace("\0", ""), "what ?")


def test_a_folder_of_photographs_may_hold_anything(tmp_path, caplog):
    odd_files(tmp_path)
    for number in range(30):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.png")).write_bytes(written(corners(), "PNG"))
    (tmp_path / "postscript.jpg").write_bytes(eps())
    with caplog.at_level("INFO"):
        found = [path for split in ("train", "validation", "test") for path in photographs(tmp_path, split)]
    assert len(found) == 31 and "5 of 36 pictures cannot be read and are left out" in caplog.text


def test_rivals_are_read_back_as_they_were_written():
    assert rivals.attempts("jpeg", corners(64, 64))[-1].picture.size == (64, 64)
