"""Training of the tokenizers beside One-D-Piece: killed runs go on alike, and what guides them is learned from."""

import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_tokenizer import FAMILY, member, pictures, save_photographs

from prunezoo import PruneZooError
from prunezoo.tokenizers.base import Text, load_tokenizer
from trainers.cli import recipes
from trainers.fit import main as fit
from trainers.training.tokenizer import TokenizerModule
from trainers.training.tokenizer_guided import GuidedTokenizerModule

CONFIGS = Path(__file__).parent.parent.parent / "configs"
GUIDE = str(CONFIGS.parent / "checkpoints" / "tiny-llava")
WIDTHS: dict[str, dict] = {"instella": {}, "textok": {"text_width": 128}, "tokenflow": {"tower_width": 128}}


def guided(name: str, **options) -> GuidedTokenizerModule:
    torch.manual_seed(0)
    return GuidedTokenizerModule(member(name, **WIDTHS[name]).train(), GUIDE, "float32", measure=(1,), **options)


RECIPES = {"instella": "instella_tiny.yaml", "textok": "textok_scenes.yaml", "tokenflow": "tokenflow_tiny.yaml"}


@pytest.mark.parametrize("name", WIDTHS)
def test_a_killed_run_goes_on_as_if_it_had_not_been(name, tmp_path, monkeypatch):
    """Stopped behind step 4, where the last checkpoint is of step 3."""
    folder = save_photographs(tmp_path / "photographs")
    for number, path in enumerate(sorted(folder.rglob("*.png"))):
        path.with_suffix(".txt").write_text(f"a red circle {number}")
    sizes = {**FAMILY[name], **WIDTHS[name]}
    words = [
        f"--config={CONFIGS / RECIPES[name]}",
        *(f"--model.tokenizer.config.{key}={list(v) if isinstance(v, tuple) else v}" for key, v in sizes.items()),
        *(["--model.guide", GUIDE] if name != "instella" else []),
        f"--data.images={folder}",
        *("--data.size=32", "--data.workers=0", "--model.measure=[1,3]", "--trainer.max_steps=6"),
        *("--trainer.precision=32", "--trainer.accelerator=cpu", "--trainer.val_check_interval=3"),
        *("--checkpoint.every_n_train_steps=3", "--trainer.enable_progress_bar=false"),
        "--trainer.enable_model_summary=false",
    ]
    monkeypatch.setattr(sys, "argv", ["fit"])
    fit([*words, f"--out={tmp_path / 'unbroken'}"])
    monkeypatch.setattr(recipes, "PACKAGES", [*recipes.PACKAGES, "spies"])
    stop = ("--trainer.callbacks+=spies.StopAt", "--trainer.callbacks.step=4")
    with pytest.raises(SystemExit) as stopped:
        fit([*words, f"--out={tmp_path / 'resumed'}", *stop])
    assert stopped.value.code == 128 + signal.SIGTERM
    fit([*words, f"--out={tmp_path / 'resumed'}", "--ckpt_path=last"])
    unbroken, resumed = (load_file(tmp_path / one / "model.safetensors") for one in ("unbroken", "resumed"))
    assert unbroken.keys() == resumed.keys() and all(torch.equal(v, resumed[k]) for k, v in unbroken.items())
    assert load_tokenizer(tmp_path / "resumed").name == name


def test_a_frozen_model_guides_and_is_not_trained():
    module = guided("textok")
    images = pictures()
    pair, text = module.read((images, ["red circle", "", "a blue square left of a red circle"]))
    assert pair is images and text is not None and text.embeddings.shape[::2] == (3, 128)
    assert text.valid.sum(1).tolist()[1] == 0 < text.valid.sum(1)[0] < text.valid.sum(1)[2]
    made = module.tokenizer(images, 6, text)
    other = module.tokenizer(images, 6, Text(text.embeddings.flip(0), text.valid.flip(0)))
    assert not torch.equal(made.output, other.output), "what is said changes what is painted"
    assert not {name.split(".")[0] for name in module.state_dict()} - {"tokenizer"}
    with pytest.raises(PruneZooError, match="CaptionedDataModule"):
        module.read(images)


def test_tokenflow_learns_what_the_tower_sees():
    module = guided("tokenflow")
    images = pictures()
    wanted = module.seen(images)
    assert wanted.shape == (3, 64, 128) and not wanted.requires_grad and wanted.std() > 0
    optimizer = torch.optim.AdamW(module.tokenizer.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        made = module.tokenizer(images, 3)
        loss = module.other_terms(made, images)["meaning"]
        optimizer.zero_grad()
        (loss + made.loss).backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]
    codes = module.tokenizer.eval().encode(images)
    assert module.tokenizer.understand(codes).shape == wanted.shape


def test_lengths_are_drawn_in_a_share_of_the_steps():
    module = TokenizerModule(member("tokenflow"), measure=(1,), drop_rate=0.25)
    torch.manual_seed(0)
    whole = sum(module.draw() == 3 for _ in range(2000)) / 2000
    assert abs(whole - (0.75 + 0.25 / 3)) < 0.04


def test_mistakes_are_named():
    with pytest.raises(PruneZooError, match=r"tokenizer.config.text_width=12, and the guide has 128"):
        GuidedTokenizerModule(member("textok"), GUIDE, measure=(1,))
    with pytest.raises(PruneZooError, match=r"'instella' needs no guide"):
        GuidedTokenizerModule(member("instella"), GUIDE, measure=(1,))
    with pytest.raises(PruneZooError, match=r"drop_rate=2.0"):
        TokenizerModule(member("instella"), measure=(1,), drop_rate=2.0)
