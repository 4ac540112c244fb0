"""The card of a tokenizer: rendered from records, and the shipped one as its records have it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image

from prunezoo import OneDPiece
from trainers import codec
from trainers.cards.parts import weights_digest
from trainers.compression.card import falls, render_card, sample_squares, tally, verdicts
from trainers.compression.measure import shown_lengths
from trainers.data.photographs import to_tensor

SHIPPED = Path(__file__).parent.parent.parent / "checkpoints" / "one-d-piece-tiny"
SIZES: dict = {"image_size": 48, "patch": 16, "tokens": 24, "width": 32, "heads": 2, "head": "pixels"}
SIZES |= {"encoder_layers": 1, "decoder_layers": 1, "codes": 64, "code_width": 4}


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """Two tokenizers, one as if trained, and what was measured of them."""
    root = tmp_path_factory.mktemp("card")
    for seed, name in enumerate(("mine", "other")):
        torch.manual_seed(seed)
        OneDPiece(**SIZES).save_pretrained(root / name)
    run = {"command": "python -m trainers.fit --config c.yaml", "steps": 30, "seconds": 90.0, "device": "CPU"}
    run |= {"processes": 1, "data": "Photographs(here)", "seed": 1, "recipe": "seed_everything: 1\n"}
    (root / "other" / "run.json").write_text(json.dumps(run))
    (root / "photographs").mkdir()
    noise = np.random.default_rng(0)
    for number in range(30):
        grid = noise.integers(0, 255, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(grid).resize((48, 48), Image.Resampling.BICUBIC).save(root / "photographs" / f"{number}.png")
    mine = str(root / "mine")
    both = ["measure", "--tokenizer", mine, str(root / "other"), "--images", str(root / "photographs"), "--limit", "3"]
    codec.main([*both, "--length", "1", "24", "--json", str(root / "quality.json")])
    timed = ["speed", "--tokenizer", mine, "--batch", "1", "--repeats", "1", "--device", "cpu"]
    codec.main([*timed, "--json", str(root / "speed.json")])
    return root


def card_words(root: Path, folder: str) -> list[str]:
    records = ["--quality", str(root / "quality.json"), "--speed", str(root / "speed.json")]
    return ["card", str(root / folder), *records, "--photographs", "squares of noise"]


def test_the_card_says_what_was_measured(measured):
    codec.main(card_words(measured, "mine"))
    folder = measured / "mine"
    card = ModelCard.load(folder / "README.md")
    assert {"image-tokenizer", "one_d_piece", "arxiv:2501.10064"} <= set(card.data.tags)
    metrics = json.loads((folder / "metrics.json").read_text())
    row = next(r for r in metrics["quality"]["rows"] if r["codec"] == str(folder) and r["tokens"] == 24)
    assert f"| 24 | {row['bytes']} | {row['psnr']:.2f} | {row['ssim']:.3f} |" in card.text
    assert "Trained and measured on squares of noise." in card.text
    assert "### Beside `other`" in card.text and "30 steps of" in card.text
    assert "By PSNR the difference is between " in card.text
    assert "How it was trained was not recorded." in card.text
    assert "| jpeg | 30 | 0 % | – | – | – | – |" in card.text
    assert str(render_card(folder, metrics)) == (folder / "README.md").read_text()
    with Image.open(folder / "pictures.webp") as sheet, Image.open(folder / "curves.png") as curves:
        assert sheet.width == 5 * 52 - 4 and curves.width > 1000


def test_a_card_is_rendered_anew_from_its_own_metrics(measured, capsys):
    folder = measured / "mine"
    codec.main(card_words(measured, "mine"))
    written = (folder / "README.md").read_text()
    (folder / "README.md").write_text("lost")
    codec.main(["card", str(folder)])
    assert (folder / "README.md").read_text() == written
    codec.main(["card", str(folder), "--photographs", "other squares"])
    assert (folder / "README.md").read_text() == written.replace("squares of noise", "other squares")
    (folder / "metrics.json").unlink()
    with pytest.raises(SystemExit):
        codec.main(["card", str(folder), "--quality", str(measured / "quality.json")])
    assert "there is no 'speed' in it: give --speed" in capsys.readouterr().err


def test_a_card_of_other_weights_is_refused(measured, capsys):
    with pytest.raises(SystemExit):
        codec.main(card_words(measured, "other"))
    assert "other weights were measured" in capsys.readouterr().err


def test_records_that_cannot_be_read_are_named(measured, tmp_path, capsys):
    words = card_words(measured, "mine")
    words[words.index("--speed") + 1] = str(tmp_path / "nowhere.json")
    with pytest.raises(SystemExit):
        codec.main(words)
    assert "nowhere.json: No such file or directory; measure again" in capsys.readouterr().err


def test_verdicts_and_falls_are_read_off_the_figures():
    rows = [
        {"codec": "a", "tokens": k, "psnr": p, "ssim": 0.5, "ms_ssim": None, "vif": 0.1} for k, p in ((1, 9), (2, 8))
    ]
    assert falls({"rows": rows}, "a") == ["PSNR from 1 to 2 tokens"]
    pairs = [
        {"rival": "webp", "metric": "psnr", "bytes": size, "ci": ci}
        for size, ci in ((10, [0.1, 0.2]), (20, [-0.1, 0.1]), (30, [-0.3, -0.1]), (40, [-0.4, -0.1]))
    ]
    record = {"paired": pairs}
    first = verdicts(record, "webp")[0]
    assert first == {"title": "PSNR", "tokenizer": "10", "neither": "20", "rival": "30, 40"}
    assert tally(record, "webp").endswith("from 10 bytes on; of the 4 comparisons there it wins 2, this tokenizer 1.")
    assert "at none of these sizes" in tally(record, "jpeg")


def test_the_squares_that_a_card_shows_are_four_different_ones():
    squares = sample_squares(32)
    assert len(squares) == 4 == len({square.tobytes() for square in squares})
    assert {square.size for square in squares} == {(32, 32)}


def test_the_shipped_card_says_what_its_records_say():
    metrics = json.loads((SHIPPED / "metrics.json").read_text(encoding="utf-8"))
    assert weights_digest(SHIPPED) == metrics["speed"]["weights"] == next(iter(metrics["quality"]["weights"].values()))
    assert str(render_card(SHIPPED, metrics)) == (SHIPPED / "README.md").read_text(encoding="utf-8")


def test_the_shipped_tokenizer_paints_better_from_more_tokens():
    tokenizer = OneDPiece.from_pretrained(SHIPPED).float()
    images = torch.stack([to_tensor(square) for square in sample_squares(tokenizer.config.image_size)])
    codes = tokenizer.encode(images)
    errors = [float((tokenizer.decode(codes[:, :k]) - images).square().mean()) for k in shown_lengths(tokenizer)]
    plain = float((images - images.mean((2, 3), keepdim=True)).square().mean())
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * plain
