"""One picture for a card: a few questions down, budgets across, with what is kept and the answer that follows."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from .examples import Example
from .pictures import SIDE, draw_kept, enlarge

GAP, LINE = 14, 24
INK, GOOD, BAD = (34, 34, 34), (0, 115, 79), (179, 54, 27)


def draw_sheet(examples: Sequence[Example], pruner: str) -> Image.Image:
    """Draw it.

    Args:
        examples: the items, at least one.
        pruner: whose choices to show, at all budgets that the examples have.
    """
    columns = 1 + sum(shown.pruner == pruner for shown in examples[0].shown)
    height = LINE + SIDE + LINE + GAP
    sheet = Image.new("RGB", (columns * (SIDE + GAP) + GAP, len(examples) * height + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for number, example in enumerate(examples):
        top = GAP + number * height
        question = "  ".join(f"{asked} {answer}" for asked, answer in example.item.turns[:-1])
        draw.text((GAP, top), f"{question}  {example.item.turns[-1][0]}".strip(), INK, font)
        tokens = example.grid[0] * example.grid[1]
        tiles = [(enlarge(example.item.image), f"all {tokens}", example.answer, example.right)]
        for shown in example.shown:
            if shown.pruner == pruner:
                picture = draw_kept(example.item.image, example.grid, shown.kept, shown.anchors)
                tiles.append((picture, f"{len(shown.kept)} of {tokens}", shown.answer, shown.right))
        for column, (picture, label, answer, right) in enumerate(tiles):
            left = GAP + column * (SIDE + GAP)
            sheet.paste(picture, (left, top + LINE))
            draw.text((left, top + LINE + SIDE + 3), f"{label}: {answer or '(nothing)'}", GOOD if right else BAD, font)
    return sheet
