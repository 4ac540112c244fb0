"""Training of One-D-Piece: its two stages, the lengths drawn, the loss over edges of every size."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_tokenizer import TINY, pictures, save_photographs, tiny

from prunezoo import OneDPiece, PruneZooError
from prunezoo.tokenizers.maskgit_vqgan import PixelTokenizer
from trainers.fit import main as fit
from trainers.training.losses import laplacian_l1
from trainers.training.tokenizer import TokenizerModule, draw_length

ROOT = Path(__file__).parent.parent.parent


def words(folder: Path, out: Path) -> list[str]:
    return [
        f"--config={ROOT / 'configs' / 'one_d_piece_tiny.yaml'}",
        *(f"--model.tokenizer.config.{key}={value}" for key, value in TINY.items()),
        "--model.measure=[1,6,24]",
        f"--data.images={folder}",
        "--data.size=32",
        "--data.batch_size=8",
        "--data.workers=0",
        "--trainer.precision=32",
        "--trainer.accelerator=cpu",
        "--trainer.val_check_interval=null",
        "--trainer.check_val_every_n_epoch=40",
        "--trainer.max_steps=400",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--model.lr=0.004",
        f"--out={out}",
    ]


def mean_error(tokenizer: OneDPiece, images: torch.Tensor, length: int) -> float:
    return float((tokenizer.decode(tokenizer.encode(images)[:, :length]) - images).square().mean())


def test_training_learns_more_than_the_colour_of_each_picture(tmp_path, monkeypatch):
    folder, images = save_photographs(tmp_path / "photographs"), pictures()
    monkeypatch.setattr(sys, "argv", ["fit"])
    fit(words(folder, tmp_path))
    trained = OneDPiece.from_pretrained(tmp_path)
    plain = float((images - images.mean((2, 3), keepdim=True)).square().mean())
    assert mean_error(trained, images, 24) < 0.9 * plain
    assert mean_error(trained, images, 24) < mean_error(trained, images, 6) < mean_error(trained, images, 1)
    moved = torch.load(tmp_path / "training/checkpoints/last.ckpt", weights_only=False)
    assert {name.split(".")[0] for name in moved["state_dict"]} == {"tokenizer"}
    assert "val/psnr_6" in (tmp_path / "training/logs/version_0/metrics.csv").read_text()
    assert (tmp_path / "run.json").is_file()


def test_in_the_second_stage_only_the_decoder_gets_a_gradient(monkeypatch):
    images = pictures()
    for step, learning in ((0, {"encoder", "latent_tokens", "decoder"}), (8, {"decoder"})):
        module = TokenizerModule(tiny().train(), first_share=0.8, measure=(1,))
        module.total_steps = 10
        monkeypatch.setattr(TokenizerModule, "global_step", step)
        monkeypatch.setattr(module, "log", lambda *a, **k: None)
        monkeypatch.setattr(module, "log_dict", lambda *a, **k: None)
        before = module.tokenizer.quantize.codebook.clone()
        module.training_step(images, 0).backward()
        moved = {name.split(".")[0] for name, p in module.tokenizer.named_parameters() if p.grad is not None}
        assert moved == learning
        assert torch.equal(module.tokenizer.quantize.codebook, before) == (step == 8)


def test_the_first_stage_learns_the_codes_of_a_pixel_tokenizer(tmp_path, monkeypatch):
    torch.manual_seed(0)
    teacher = PixelTokenizer()
    save_file(teacher.state_dict(), tmp_path / "pixels.safetensors")
    sizes = {**TINY, "patch": 16, "head": "codes"}
    module = TokenizerModule(OneDPiece(**sizes), "codes", str(tmp_path / "pixels.safetensors"), measure=(1, 24))
    assert torch.equal(module.tokenizer.pixel_codes, teacher.quantize.embedding.weight)
    images = torch.rand(2, 3, 32, 32)
    codes = teacher.encode(images)
    assert codes.shape == (2, 2, 2) and teacher.decode(codes).shape == images.shape
    monkeypatch.setattr(TokenizerModule, "global_step", 0)
    logged: dict = {}
    monkeypatch.setattr(module, "log", lambda *a, **k: None)
    monkeypatch.setattr(module, "log_dict", lambda values, **k: logged.update(values))
    module.total_steps = 10
    module.training_step(images, 0).backward()
    assert logged["train/codes"] > 1 and all(p.grad is None for p in module.tokenizer.pixel_decoder.parameters())
    monkeypatch.setattr(TokenizerModule, "global_step", 9)
    module.training_step(images, 0).backward()
    assert all(p.grad is not None for p in module.tokenizer.pixel_decoder.parameters())
    assert "teacher" not in {name.split(".")[0] for name in module.state_dict()}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"first": "codes"}, "first='codes'"),
        ({"first_share": 1.5}, "first_share=1.5"),
        ({"measure": (1, 99)}, "length=99"),
    ],
)
def test_a_mistake_in_the_recipe_is_named(wrong, named):
    with pytest.raises(PruneZooError, match=named):
        TokenizerModule(tiny(), **wrong)


def test_learning_codes_needs_a_pixel_tokenizer(tmp_path):
    for given, named in ((None, "needs pixel_tokenizer"), (str(tmp_path / "no.safetensors"), "is not a file")):
        with pytest.raises(PruneZooError, match=named):
            TokenizerModule(OneDPiece(**{**TINY, "patch": 16, "head": "codes"}), "codes", given, measure=(1,))


def test_lengths_are_drawn_alike():
    torch.manual_seed(0)
    drawn = torch.tensor([draw_length(8) for _ in range(4000)])
    assert torch.bincount(drawn, minlength=9)[1:].min() > 400 and drawn.min() == 1 and drawn.max() == 8


def test_the_pyramid_weighs_edges_of_every_size():
    flat = torch.zeros(1, 3, 32, 32)
    assert laplacian_l1(flat, flat) == 0
    torch.testing.assert_close(laplacian_l1(flat, flat + 0.5), torch.tensor(0.5))  # only the small picture differs
    stripes = flat.clone()
    stripes[..., ::2] = 1.0
    torch.testing.assert_close(
        laplacian_l1(flat, stripes), torch.tensor(1.0)
    )  # half at the finest level, half its mean
    wide = flat.clone()
    wide[..., :16] = 1.0
    assert 0 < laplacian_l1(flat, wide) < laplacian_l1(flat, stripes)
