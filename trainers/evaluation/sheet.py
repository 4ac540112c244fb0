"""One picture for a card: a few questions down, budgets across, with what is kept and the answer that follows."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from trainers.cli.text import visible

from .examples import Example
from .pictures import SIDE, draw_kept, enlarge
from .tables import display_name

GAP, LINE = 14, 24
INK, GOOD, BAD = (34, 34, 34), (0, 115, 79), (179, 54, 27)


def draw_sheet(examples: Sequence[Example], *pruners: str) -> Image.Image:
    """Draw it.

    Args:
        examples: the items, at least one.
        pruners: whose choices to show, at all budgets that the examples have; of several, one below the other.
    """
    font = ImageFont.load_default(15)
    rows = [_row(example, pruner, len(pruners) > 1) for example in examples for pruner in pruners]
    columns = max(len(tiles) for _, tiles in rows)
    height = LINE + max(tile[0].height for _, tiles in rows for tile in tiles) + LINE + GAP
    sheet = Image.new("RGB", (columns * (SIDE + GAP) + GAP, len(rows) * height + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (title, tiles) in enumerate(rows):
        top = GAP + number * height
        draw.text((GAP, top), visible(title), INK, font)
        for column, (picture, label, is_right) in enumerate(tiles):
            left = GAP + column * (SIDE + GAP)
            sheet.paste(picture, (left, top + LINE))
            draw.text((left, top + LINE + picture.height + 3), visible(label), GOOD if is_right else BAD, font)
    return sheet


def _row(example: Example, pruner: str, named: bool) -> tuple[str, list[tuple[Image.Image, str, bool]]]:
    """Its title and tiles: the picture with all tokens first; each with a label and whether the answer is right."""
    *before, (question, _) = example.item.turns
    title = " ".join([*(f"{asked} {answer}" for asked, answer in before), question])
    tokens = example.grid[0] * example.grid[1]
    tiles = [(enlarge(example.picture), f"all {tokens}: {example.answer}", example.right)]
    for shown in example.shown:
        if shown.pruner == pruner:
            picture = draw_kept(example.picture, example.grid, shown.kept, shown.anchors)
            tiles.append((picture, f"{len(shown.kept)} of {tokens}: {shown.answer or '(nothing)'}", shown.right))
    return (f"{display_name(pruner)}: {title}" if named else title), tiles
