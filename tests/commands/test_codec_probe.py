"""`trainers.codec probe`: classes told from codes, the tower above and pixels below, and what is refused."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from codec_errors import fails
from PIL import Image
from tiny_tokenizer import FAMILY, member, pictures, save_photographs, text_for

from prunezoo import PruneZooError
from trainers import codec
from trainers.cli.names import CHECKPOINTS
from trainers.compression.probe import Side, code_features, fit_probe, label, pixel_features
from trainers.data.photographs import Photographs
from trainers.evaluation.loading import load_vlm
from trainers.training.sight import Sight

VLM = str(CHECKPOINTS / "tiny-llava")
COLOURS = {"red": (200, 60, 50), "green": (60, 190, 70), "blue": (50, 70, 210)}
EACH = 40


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Noise of three colours, a folder for each."""
    root = tmp_path_factory.mktemp("classes")
    noise = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / name).mkdir()
        for number in range(EACH):
            pixels = np.clip(np.array(colour) + noise.normal(0, 40, (8, 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).resize((40, 32), Image.Resampling.NEAREST).save(root / name / f"{number}.png")
            (root / name / f"{number}.txt").write_text("squares")
    return root


def test_codes_tell_the_class_between_the_tower_and_pixels(images, tmp_path, capsys):
    sizes = {"textok": {"text_width": 128}}
    folders = [str(member(name, **sizes.get(name, {})).save_pretrained(tmp_path / name)) for name in FAMILY]
    words = ["probe", "--tokenizer", *folders, "--images", str(images), "--vlm", VLM]
    codec.main([*words, "--bytes", "20", "--json", str(tmp_path / "p.json")])
    record = json.loads((tmp_path / "p.json").read_text())
    assert record["classes"] == 3 and sum(record["n"].values()) < 3 * EACH
    rows = record["rows"]
    assert {row["probe"] for row in rows if "pixels" not in row["probe"]} == {*folders, "tower"}
    coded = [row for row in rows if row["probe"] in folders]
    assert {row["reads"] for row in coded} == {"mean", "all"} and {row["bytes"] for row in coded} == {20}
    shrunk = {row["numbers"] for row in rows if "pixels" in row["probe"]}
    assert shrunk == {3 * max(math.isqrt(row["numbers"] // 3), 1) ** 2 for row in coded}, "as many numbers, no more"
    for row in rows:
        assert 0 <= row["ci"][0] <= row["accuracy"] <= row["ci"][1] <= 1
        assert row["c"] in (0.001, 0.01, 0.1, 1.0, 10.0)
    best = {name: max(row["accuracy"] for row in rows if row["probe"] == name) for name in (*folders, "pixels 1x1")}
    assert record["chance"] < 0.7 < best["pixels 1x1"], "the colour tells them apart"
    assert best[folders[-1]] > record["chance"]
    own = next(row for row in coded if row["probe"] == folders[0] and row["reads"] == "mean")
    pairs = [pair for pair in record["paired"] if pair["reads"] == "mean"]
    assert {pair["probe"] for pair in pairs} == {folders[0]}
    assert {pair["rival"] for pair in pairs} == {*folders[1:], "tower", "pixels 1x1"}
    tower = next(row for row in rows if row["probe"] == "tower")
    above = next(pair for pair in pairs if pair["rival"] == "tower")
    assert above["difference"] == pytest.approx(own["accuracy"] - tower["accuracy"], abs=2e-5)
    assert above["ci"][0] <= above["difference"] <= above["ci"][1]
    said = capsys.readouterr().out
    assert "chance, always naming the commonest of 3 classes: " in said
    assert f"--bytes 13: {folders[2]}: its smallest file has 14 bytes" in fails([*words, "--bytes", "13"], capsys)


@pytest.mark.parametrize("name", FAMILY)
def test_features_are_the_vectors_of_the_prefix(name, tmp_path):
    tokenizer = member(name)
    paths = sorted(save_photographs(tmp_path).rglob("*.png"))[:3]
    photographs = Photographs(paths, 32)
    text = text_for(tokenizer, 3)
    side = Side(photographs, np.zeros(3, dtype=np.int64), lambda *_: text)
    seen: list[int] = []
    found = code_features("it", tokenizer, side, [None, tokenizer.file_size(1)], lambda: seen.append(1))
    codes = tokenizer.encode(torch.stack([photographs[i] for i in range(3)]), text)
    whole = tokenizer.vectors(codes)
    by = {(reading.reads, reading.budget): (reading, rows) for reading, rows in found.items()}
    reading, rows = by["mean", None]
    assert reading.tokens == tokenizer.config.tokens and reading.bytes == tokenizer.file_size(reading.tokens)
    np.testing.assert_allclose(rows, whole.mean(1).detach(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(by["all", None][1], whole.flatten(1).detach(), rtol=1e-5, atol=1e-6)
    assert ("mean", tokenizer.file_size(1)) in by and len(seen) == 3


def test_a_line_is_found_and_c_is_chosen_for_it():
    noise = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 30)
    centres = noise.normal(0, 1, (3, 6))
    rows = (centres[labels] + noise.normal(0, 0.3, (90, 6))).astype(np.float32)
    said, c = fit_probe(rows[::2], labels[::2], rows[1::2])
    assert (said == labels[1::2]).mean() > 0.9 and c in (0.001, 0.01, 0.1, 1.0, 10.0)
    blind, _ = fit_probe(noise.normal(0, 1, (45, 6)).astype(np.float32), labels[::2], rows[1::2])
    assert (blind == labels[1::2]).mean() < 0.7


def test_pixels_are_shrunk():
    images = pictures()
    side = Side(images, np.zeros(3, dtype=np.int64), lambda *_: None)
    rows = pixel_features(side, 1)
    assert rows.shape == (3, 3)
    np.testing.assert_allclose(rows, images.mean((2, 3)), atol=0.03)


def test_the_tower_sees_at_its_own_cells_and_at_others():
    model, processor = load_vlm(VLM, "cpu", "float32")
    sight = Sight(model, processor, VLM)
    patches = sight.patches(pictures())
    assert patches.shape[:2] == (3, sight.width) and patches.shape[2] == patches.shape[3] > 1
    cells = patches.shape[2]
    torch.testing.assert_close(sight.at(pictures(), cells), patches.flatten(2).mT)
    assert sight.at(pictures(), 2).shape == (3, 4, sight.width)
    model.model = torch.nn.Identity()
    with pytest.raises(PruneZooError, match=r"mine: a 'llava' has no vision_tower"):
        Sight(model, processor, "mine")


def test_folders_that_are_no_classes_are_refused(images, tmp_path, capsys):
    tokenizer = str(member("instella").save_pretrained(tmp_path / "tokenizer"))
    words = ["probe", "--tokenizer", tokenizer, "--vlm", VLM, "--images"]
    assert "red: pictures lie in no folder of a class" in fails([*words, str(images / "red")], capsys)
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "red").symlink_to(images / "red")
    for number, path in enumerate(sorted(images.glob("*/*.png"))):
        place = tmp_path / "few" / ("rare" if number == 0 else "all") / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.with_stem(str(number)).write_bytes(path.read_bytes())
    assert "few/rare: " in (said := fails([*words, str(tmp_path / "few")], capsys))
    assert "training pictures, and a probe needs at least 3 of each class" in said
    (tmp_path / "few" / "rare" / "0.png").unlink()
    (tmp_path / "few" / "rare").rmdir()
    fresh = tmp_path / "alone"
    (tmp_path / "few").rename(fresh)
    assert "alone: all pictures are of one class, all: a probe needs two" in fails([*words, str(fresh)], capsys)
    assert "raise --limit" in fails([*words, str(images), "--limit", "2"], capsys)
    with pytest.raises(SystemExit):
        codec.main([*words, str(images), "--split", "train"])
    assert "invalid choice: 'train'" in capsys.readouterr().err


def test_classes_are_the_folders_at_any_depth(tmp_path):
    paths = [tmp_path.resolve() / place for place in ("a/x/1.png", "b/x/2.png", "a/x/3.png", "b/x/4.png")]
    classes, labels = label(tmp_path, [paths * 3, [Path(paths[1])]])
    assert classes == ["a/x", "b/x"] and labels[0][:4].tolist() == [0, 1, 0, 1] and labels[1].tolist() == [1]
