"""`trainers.codec`: files on the command line, rivals, the measures of quality, what is measured and how fast."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_tokenizer import picture, pictures, save_photographs, tiny

from trainers import codec
from trainers.compression.quality import quality
from trainers.compression.rivals import attempts, best_within


def test_the_codec_command_writes_files_of_the_size_asked_for(tmp_path, capsys):
    folder = str(tiny().save_pretrained(tmp_path / "tokenizer"))
    picture(4, 60, 50).save(tmp_path / "in.png")
    names = [str(tmp_path / name) for name in ("in.png", "small.1p", "out.png")]
    assert codec.main(["compress", *names[:2], "--bytes", "21", "--tokenizer", folder]) == 0
    assert Path(names[1]).stat().st_size == 21
    assert codec.main(["decompress", *names[1:], "--tokenizer", folder]) == 0
    with Image.open(names[2]) as painted:
        assert painted.size == (60, 50)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        codec.main(["decompress", names[0], names[2], "--tokenizer", folder])
    assert "in.png: not a tokenizer's file" in capsys.readouterr().err


def test_rivals_keep_to_their_bytes_and_get_better_with_them():
    found = {name: attempts(name, picture(5, 128, 128)) for name in ("jpeg", "webp")}
    for name, tried in found.items():
        sizes = (500, 1000, 4000)
        best = [best_within(tried, size) for size in sizes]
        assert all(one.size <= size for one, size in zip(best, sizes, strict=True))
        assert best[0].psnr < best[1].psnr < best[2].psnr
        assert best_within(tried, 20) is None and best[0].picture.size == (128, 128), name


def test_quality_is_one_for_the_picture_itself_and_falls():
    torch.manual_seed(0)
    large = F.interpolate(pictures(), size=(48, 48), mode="bilinear")
    noisy = [(large + spread * torch.randn_like(large)).clamp(0, 1) for spread in (0.0, 0.05, 0.2)]
    same, little, much = (quality(painted, large) for painted in noisy)
    for name in ("ssim", "ms_ssim", "vif"):
        assert same[name] == pytest.approx(1.0, abs=1e-4)
        assert (little[name] > much[name]).all() and (little[name] < 1).all()
    assert little["psnr"][0] == pytest.approx(-10 * float((noisy[1][0] - large[0]).square().mean().log10()), abs=1e-3)


def test_measuring_writes_rows_pairs_and_figures(tmp_path):
    folder = save_photographs(tmp_path / "photographs")
    sizes = {"image_size": 48, "patch": 8}
    names = [str(tiny(seed, **sizes).save_pretrained(tmp_path / f"t{seed}")) for seed in range(2)]
    command = ["measure", "--tokenizer", *names, "--images", str(folder), "--limit", "3", "--length", "1", "24"]
    codec.main([*command, "--json", str(tmp_path / "m.json"), "--report", str(tmp_path / "report")])
    record = json.loads((tmp_path / "m.json").read_text())
    assert record["n"] == 3 and record["split"] == "test"
    rows = {(row["codec"], row["bytes"]): row for row in record["rows"]}
    assert set(rows) == {(codec, size) for codec in (*names, "jpeg", "webp") for size in (13, 30)}
    assert rows[names[0], 30]["tokens"] == 24 and rows[names[0], 30]["psnr"] > 0
    assert rows["jpeg", 30]["fits"] == 0 and rows["jpeg", 30]["psnr"] is None
    pairs = [pair for pair in record["paired"] if pair["rival"] == names[1] and pair["metric"] == "psnr"]
    assert [pair["bytes"] for pair in pairs] == [13, 30]
    wanted = rows[names[0], 30]["psnr"] - rows[names[1], 30]["psnr"]
    assert pairs[1]["difference"] == pytest.approx(wanted, abs=1e-4)
    assert pairs[1]["ci"][0] <= pairs[1]["difference"] <= pairs[1]["ci"][1]
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"curves.png", "pictures.png"}


def test_speed_is_measured_beside_the_bare_vit(tmp_path, capsys):
    folder = str(tiny().save_pretrained(tmp_path / "tokenizer"))
    command = ["speed", "--tokenizer", folder, "--batch", "2", "--repeats", "1", "--device", "cpu"]
    codec.main([*command, "--json", str(tmp_path / "s.json")])
    rows = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert {(row["dtype"], row["part"]) for row in rows} == {
        (dtype, part) for dtype in ("float32", "bfloat16") for part in ("bare ViT", "encode", "decode")
    }
    assert all(row["per_second"] > 0 and row["ratio"] > 0 for row in rows)
