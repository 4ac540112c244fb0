"""The suites photo-grid and easy-vqa: deterministic, split by picture, and right about what they show."""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prunezoo.core.errors import PruneZooError
from trainers.data.photo_grid import ENVIRONMENT, PhotoGrid
from trainers.data.suite import SPLITS, Item, load_suite

CLASSES = ("Ant", "big_cat", "cup", "dog")
STEPS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Class folders of one-colour photographs that tell what they are: red = class, green = number."""
    root = tmp_path_factory.mktemp("photos")
    for c, name in enumerate((*CLASSES, "BACKGROUND_noise")):
        (root / name).mkdir()
        for i in range(20):
            Image.new("RGB", (12, 10), (c * 40, i * 10, 7)).save(root / name / f"photo_{i:04}.png")
    return root


def build(photos: Path, split: str = "test", **options) -> PhotoGrid:
    suite = load_suite("photo-grid", split, root=photos, classes=4, cell=8, **options)
    assert isinstance(suite, PhotoGrid)
    return suite


def seen(item: Item, grid: int = 3) -> list[str | None]:
    """The class in each cell, read off the pixels; None is clutter."""
    centres = np.asarray(item.image)[4::8, 4::8].reshape(grid * grid, 3)
    names = [name.lower().replace("_", " ") for name in CLASSES]
    return [names[red // 40] if red < 160 else None for red in centres[:, 0]]


def recomputed(item: Item, cells: tuple[str, ...], grid: int = 3) -> tuple[str, set[int]]:
    """Answer to the last question and the cells that it is about, from the picture alone."""
    held, question = seen(item, grid), item.question.removesuffix("?")

    def at(name: str) -> set[int]:
        return {i for i, other in enumerate(held) if other == name}

    if question.startswith("what is in cell "):
        cell = cells.index(question.split()[-1])
        return str(held[cell]), {cell}
    if question.startswith("is there"):
        there = at(question.removeprefix("is there a photo of "))
        return "yes" if there else "no", there
    if question.startswith("how many"):
        there = at(question.removeprefix("how many photos of ").removesuffix(" are there"))
        return str(len(there)), there
    if question.startswith("which cell"):
        (cell,) = at(question.removeprefix("which cell is ").removesuffix(" in"))
        return cells[cell], {cell}
    relation = next(r for r in STEPS if question.startswith(f"what is {r} "))
    name = question.removeprefix(f"what is {relation} ")
    if name == "it":
        name = item.turns[0][0].removeprefix("which cell is ").removesuffix(" in?")
    (anchor,) = at(name)
    if len(item.turns) == 2:
        assert item.turns[0][1] == cells[anchor]
    row, column = anchor // grid + STEPS[relation][0], anchor % grid + STEPS[relation][1]
    return str(held[row * grid + column]), {anchor, row * grid + column}


@pytest.mark.parametrize("grid", [2, 3])
def test_photo_grid_answers_and_maps_follow_from_the_picture(photos, grid):
    suite = build(photos, grid=grid, limit=240)
    assert Counter(item.group for item in suite) == dict.fromkeys(suite.groups, 40)
    for i, item in enumerate(suite):
        assert item.relevant is not None
        assert item.relevant.shape == item.image.size[::-1]
        answer, about = recomputed(item, suite.cells, grid)
        assert item.answer == answer, item.turns
        held = seen(item, grid)
        assert held == suite.layout(i)
        shown = np.asarray(item.image)[4::8, 4::8].reshape(-1, 3)
        if max(Counter(held).values()) <= 4:  # each folder has four photographs in the test split
            assert len(np.unique(shown, axis=0)) == len(held)
        assert set(np.flatnonzero(item.relevant[4::8, 4::8])) == about, item.turns


def test_photo_grid_is_deterministic(photos):
    first, again = build(photos), build(photos)
    for i in (0, 7, len(first) - 1):
        assert first[i].turns == again[i].turns
        assert first[i].image.tobytes() == again[i].image.tobytes()
    assert first[1].image.tobytes() != build(photos, "train")[1].image.tobytes()


def test_photo_grid_shares_no_photograph_between_splits(photos):
    shown = {}
    for split in SPLITS:
        pixels = np.concatenate(
            [np.asarray(item.image)[4::8, 4::8].reshape(-1, 3) for item in build(photos, split)[:200]]
        )
        shown[split] = {tuple(pixel) for pixel in pixels}
    assert [len(shown[split]) for split in SPLITS] == [5 * 14, 5 * 2, 5 * 4]  # 70, 10 and 20 % of 20, in five folders
    assert not shown["train"] & shown["test"]
    assert not shown["train"] & shown["validation"]
    assert not shown["validation"] & shown["test"]


def test_photo_grid_answers_are_balanced(photos):
    answers = defaultdict(Counter)
    for item in build(photos, limit=1800):
        answers[item.group][item.answer] += 1
    suite = build(photos)
    for group, count in answers.items():
        expected = suite.chance[group]
        assert len(count) == round(1 / expected), group
        # 300 draws: 4.5 standard errors either side
        margin = 4.5 * (expected * (1 - expected) / 300) ** 0.5
        assert all(abs(n / 300 - expected) < margin for n in count.values()), (group, count)


def test_photo_grid_takes_the_leftover_classes_as_clutter(photos, tmp_path):
    for name in CLASSES:
        (tmp_path / name).symlink_to(photos / name)
    suite = load_suite("photo-grid", root=tmp_path, classes=3, cell=8)
    assert isinstance(suite, PhotoGrid)
    assert suite.classes == ("ant", "big cat", "cup")
    assert any(None in suite.layout(i) for i in range(6))


def test_photo_grid_finds_its_folder_in_the_environment(photos, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, str(photos))
    assert len(load_suite("photo-grid", "validation", classes="4")) == 1200


def test_photo_grid_says_what_is_wrong(photos, tmp_path, monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    with pytest.raises(PruneZooError, match=ENVIRONMENT):
        load_suite("photo-grid")
    with pytest.raises(PruneZooError, match="not a folder"):
        load_suite("photo-grid", root=tmp_path / "nowhere")
    with pytest.raises(PruneZooError, match="needs 16 class folders"):
        load_suite("photo-grid", root=photos)
    with pytest.raises(PruneZooError, match="whole numbers"):
        load_suite("photo-grid", root=photos, grid="two")
    with pytest.raises(PruneZooError, match="grid 2 to 9"):
        load_suite("photo-grid", root=photos, grid=1)
    for name in ("a", "b", "c", "clutter"):
        (tmp_path / name).mkdir()
        for i in range(10):
            (tmp_path / name / f"{i}.jpg").write_bytes(b"no picture")
    with pytest.raises(PruneZooError, match=r"\.jpg is not a readable picture"):
        load_suite("photo-grid", root=tmp_path, classes=3)[0]


@pytest.fixture(scope="module")
def easy() -> dict:
    pytest.importorskip("easy_vqa", reason="easy-vqa is not installed")
    return {split: load_suite("easy-vqa", split) for split in SPLITS}


def test_easy_vqa_splits_by_picture_and_is_deterministic(easy):
    assert sum(len(suite) for suite in easy.values()) == 48_248
    pictures = {split: {row[2] for row in suite._rows} for split, suite in easy.items()}
    assert not pictures["train"] & pictures["validation"]
    assert len(pictures["train"] | pictures["validation"]) == 4000
    ends = {split: {suite[i].image.tobytes() for i in range(0, len(suite), 97)} for split, suite in easy.items()}
    assert not ends["test"] & (ends["train"] | ends["validation"])
    again = load_suite("easy-vqa", "test")
    assert again[5].turns == easy["test"][5].turns
    assert again[5].image.tobytes() == easy["test"][5].image.tobytes()


def test_easy_vqa_groups_and_chance(easy):
    suite = easy["test"]
    assert set(suite.chance) == set(suite.groups) == {item.group for item in suite[:200]}
    assert suite.chance["existence"] == pytest.approx(0.5, abs=0.02)
    assert suite.chance["shape"] == pytest.approx(1 / 3, abs=0.03)
    assert suite.chance["color"] == pytest.approx(1 / 8, abs=0.03)


def test_easy_vqa_answers_and_maps_fit_the_picture(easy):
    inks = {
        "red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0),
        "gray": (128, 128, 128), "teal": (0, 128, 128), "black": (0, 0, 0), "brown": (165, 42, 42),
    }  # fmt: skip
    colored = [item for item in easy["test"][:600] if item.group == "color"]
    assert len(colored) > 30
    for item in colored:
        assert item.relevant is not None
        assert item.relevant.shape == (64, 64)
        drawn = np.median(np.asarray(item.image)[item.relevant > 0], axis=0)
        assert min(inks, key=lambda name: float(np.abs(drawn - inks[name]).sum())) == item.answer
        assert 0 < item.relevant.mean() < 0.6
