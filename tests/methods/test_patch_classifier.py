"""The patch classifier: which cells stay, and on sheets that it is trained on for a moment."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from trainings import one_line_error
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from prunezoo import PruneZooError, build_pruner, load_pruner
from prunezoo.core.contract import PruneInputs
from prunezoo.learned.patch_classifier import PatchClassifier, facts_of, scaled
from trainers import fit
from trainers.cards.cells import render_card
from trainers.cards.parts import weights_digest
from trainers.data.sheets import Sheets, cells_of, draw_sheet
from trainers.training.cells import judge
from trainers.upkeep import cells as command

SIDE, GRID = 8, 6


def inputs_of(pixels, side=SIDE):
    """One sheet ``(rows, columns, pixels)`` as the input stage gives it."""
    rows, columns, _ = pixels.shape
    cells = torch.tensor([[0, row, column] for row in range(rows) for column in range(columns)])[None]
    features = pixels.flatten(0, 1)[None]
    return PruneInputs(features, torch.ones(features.shape[:2], dtype=torch.bool), cells, pixels=(1, 3, side, side))


@pytest.fixture
def by_first_pixel():
    """A classifier that says yes where the first pixel is above the mean of its cell."""
    pruner = PatchClassifier(side=SIDE, hidden=1).eval()
    with torch.no_grad():
        for parameter in pruner.parameters():
            parameter.zero_()
        pruner.norm.weight.fill_(1)
        pruner.look.weight[0, 0] = 1
        pruner.head.weight.fill_(1)
        pruner.head.bias.fill_(-0.1)
    return pruner


@pytest.mark.parametrize("grow", [True, False])
def test_auto_keeps_what_is_chosen_and_its_neighbours(grow, by_first_pixel):
    pixels = torch.zeros(GRID, GRID, 3 * SIDE * SIDE)
    chosen = {(0, 0), (3, 4)}
    for row, column in chosen:
        pixels[row, column, 0] = 1
    pruner = PatchClassifier(side=SIDE, hidden=1, grow=grow).eval()
    pruner.load_state_dict(by_first_pixel.state_dict())
    output = pruner(inputs_of(pixels), "auto")
    kept = {divmod(slot, GRID) for slot in output.index[0][output.valid[0]].tolist()}
    around = {
        (row + down, column + right)
        for row, column in chosen
        for down in (-1, 0, 1)
        for right in (-1, 0, 1)
        if 0 <= row + down < GRID and 0 <= column + right < GRID
    }
    assert kept == (around if grow else chosen)
    first = pruner(inputs_of(pixels), 2)
    assert {divmod(slot, GRID) for slot in first.index[0].tolist()} == chosen


def test_crops_do_not_grow_into_one_another(by_first_pixel):
    pixels = torch.zeros(2, 2, 3 * SIDE * SIDE)
    pixels[0, 0, 0] = 1
    inputs = inputs_of(pixels)
    inputs.cells[0] = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 0, 1], [1, 0, 1]])
    output = by_first_pixel(inputs, "auto")
    assert output.index[0].tolist() == [0, 2]


def test_cells_of_other_sizes_are_scaled():
    cells = torch.randn(2, 5, 3, 4, 4)
    same = scaled(cells.flatten(2), (1, 3, 4, 4), 4)
    assert torch.equal(same, cells.flatten(2))
    # antialiasing also reads across the edges of the larger pixels, so a mean moves a little
    large = cells.repeat_interleave(2, 3).repeat_interleave(2, 4)
    torch.testing.assert_close(
        scaled(large.flatten(2), (1, 3, 8, 8), 4).unflatten(2, (3, 4, 4)).mean((3, 4)), cells.mean((3, 4)),
        rtol=0, atol=0.2,
    )  # fmt: skip
    clips = torch.stack([cells, cells + 2], 2)  # two frames
    torch.testing.assert_close(scaled(clips.flatten(2), (2, 3, 4, 4), 4), cells.flatten(2) + 1)
    grey = scaled(torch.randn(2, 5, 7), None, 4)
    assert grey.shape == (2, 5, 48) and torch.equal(grey[..., :16], grey[..., 32:])


def test_facts_are_those_of_a_loop_over_cells():
    """Two tiles of a picture, and one cell that is not there."""
    where = [(tile, row, column) for tile in range(2) for row in range(2) for column in range(3)][:-1]
    pixels = torch.randn(1, 12, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    valid = torch.arange(12)[None] < 11
    inputs = PruneInputs(pixels.flatten(2), valid, torch.tensor([[*where, (-1, -1, -1)]]), pixels=(1, 3, 4, 4))
    found = facts_of(pixels.flatten(2), inputs)
    for slot, (tile, row, column) in enumerate(where):
        cell, facts = pixels[0, slot], []
        facts += [cell[channel].mean() for channel in range(3)]
        facts += [(cell[channel].square().mean() - cell[channel].mean() ** 2 + 1e-4).log() for channel in range(3)]
        for down, right in ((0, -1), (0, 1), (-1, 0), (1, 0)):
            beside = (tile, row + down, column + right)
            other = pixels[0, where.index(beside)] if beside in where else torch.zeros(3, 4, 4)
            facts.append(((cell - other).abs().mean() + 1e-2).log())
        torch.testing.assert_close(found[0, slot], torch.stack(facts))


def test_facts_are_asked_for_and_change_what_is_kept():
    torch.manual_seed(0)
    pruner = PatchClassifier(side=SIDE, hidden=8, grow=False, facts=True).eval()
    inputs = inputs_of(torch.randn(GRID, GRID, 3 * SIDE * SIDE))
    with pytest.raises(PruneZooError, match="facts=true it needs to know the cells around"):
        pruner.logits(inputs.features)
    loud = inputs_of(inputs.features.view(GRID, GRID, -1) * torch.linspace(0.1, 3, GRID)[:, None, None])
    assert not torch.equal(pruner(inputs, 9).index, pruner(loud, 9).index)  # layer norm alone takes contrast away
    plain = PatchClassifier(side=SIDE, hidden=8, grow=False).eval()
    torch.testing.assert_close(plain.score(inputs), plain.score(loud), rtol=0, atol=0.02)


def test_a_sheet_is_a_matter_of_its_number():
    one, again, other = (Sheets(split, 5, SIDE, GRID)[1] for split in ("train", "train", "test"))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0], other[0])


def test_cells_are_what_an_image_processor_cuts():
    """By the formula of Qwen-VL's, with Pillow; and a cell with ink is one whose picture differs from bare paper."""
    sheet = draw_sheet(np.random.default_rng(3), "train", SIDE * GRID)
    pixels, printed = cells_of(sheet, SIDE)
    cell = Image.fromarray(sheet.picture).crop((SIDE, 2 * SIDE, 2 * SIDE, 3 * SIDE))
    expected = (np.asarray(cell, np.float32) / 255 - np.float32(OPENAI_CLIP_MEAN)) / np.float32(OPENAI_CLIP_STD)
    np.testing.assert_allclose(pixels[2, 1].view(3, SIDE, SIDE).permute(1, 2, 0).numpy(), expected, atol=1e-5)
    ink = sheet.ink[2 * SIDE : 3 * SIDE, SIDE : 2 * SIDE].sum()
    assert printed[2, 1] == (ink >= 2) and 0 < printed.float().mean() < 1


def recipe(out, *more):
    return [
        "--config=configs/patch_classifier.yaml", f"--out={out}", f"--data.cell={SIDE}", "--data.workers=0",
        f"--data.grid={GRID}", "--data.validation_items=4", "--trainer.accelerator=cpu", "--trainer.max_steps=60",
        "--trainer.val_check_interval=30", "--checkpoint.every_n_train_steps=30", "--trainer.enable_progress_bar=false",
        "--model.pruner.init_args.config.hidden=32", *more,
    ]  # fmt: skip


def test_training_measuring_and_the_card(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fit"])
    out = tmp_path / "classifier"
    fit.main(recipe(out, f"--model.pruner.init_args.config.side={SIDE}"))
    data = Sheets("test", 8, SIDE, GRID)
    pixels, printed = (torch.stack(parts) for parts in zip(*(data[i] for i in range(8)), strict=True))
    trained, fresh = load_pruner(str(out)).eval(), build_pruner("patch_classifier", side=SIDE, hidden=32).eval()

    def right(pruner):
        return ((pruner.logits(pixels) > 0) == printed).float().mean()

    assert right(trained) > max(right(fresh), printed.float().mean(), 1 - printed.float().mean()) + 0.05
    labels, kept = judge(trained, pixels, printed)
    assert (labels & kept).sum() > 0.8 * labels.sum()
    monkeypatch.setattr(command, "GRID", GRID)
    assert command.main([str(out), "--sheets", "6"]) == 0
    card = (out / "README.md").read_text()
    assert "`energy`, as many cells as that" in card and "2509.06415" in card
    assert command.main([str(out), "--card-only"]) == 0
    assert (out / "README.md").read_text() == card
    record = (out / "metrics.json").read_text()
    (out / "metrics.json").write_text(record.replace('"weights": "', '"weights": "0'))
    with pytest.raises(SystemExit):
        command.main([str(out), "--card-only"])
    assert "other weights were measured" in capsys.readouterr().err


def test_another_size_of_cell_is_told(tmp_path, monkeypatch, capsys):
    assert "must be the pruner's side=28" in one_line_error(capsys, monkeypatch, recipe(tmp_path / "out"))


def test_a_lower_bar_chooses_more(by_first_pixel):
    pixels = torch.zeros(GRID, GRID, 3 * SIDE * SIDE)
    pixels[0, 0, 0] = 1
    low = PatchClassifier(side=SIDE, hidden=1, least=0.4).eval()
    low.load_state_dict(by_first_pixel.state_dict())
    assert low(inputs_of(pixels), "auto").counts == (GRID * GRID,)  # bare paper has 0.475


@pytest.mark.parametrize(
    ("field", "why"), [("side", "at least 1"), ("hidden", "at least 1"), ("least", "between 0 and 1")]
)
def test_settings_are_checked(field, why):
    with pytest.raises(PruneZooError, match=f"{field} must .*{why}"):
        PatchClassifier(**{field: 0})


def test_the_shipped_card_is_what_was_measured():
    folder = Path("checkpoints/patch-classifier")
    record = json.loads((folder / "metrics.json").read_text())
    assert record["weights"] == weights_digest(folder)
    card = str(render_card(folder, record))
    written = (folder / "README.md").read_text()
    assert card == written, "run `python -m trainers.upkeep.cells checkpoints/patch-classifier --card-only`"
    kept = record["rows"]["sure"]
    assert kept["printed_kept"][0] >= 99 and kept["kept"][0] <= 45
