"""Pages, the pictures: forms and receipts, tables and bar charts of 128×128 pixels, set in matplotlib's DejaVu fonts.

What is printed: names out of a closed list, and numbers of one to three digits. Digits stand at least a patch, 8
pixels, apart, so that no patch shows two. Splits share no face, no number of two digits or more, no place of a block on
the page and no name on the same line.
"""

import zlib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE, PATCH = 128, 8
GRID = SIDE // PATCH
KINDS = ("form", "table", "chart")
NAMES = tuple(
    "tax tip sum net date time room seat tea milk rice soup cake beer wine fish salt eggs nuts rent gas fee cost paid "
    "due card cash age year code line unit size mass area rate east west top end".split()
)
CELLS = tuple(f"{row}{column}" for row in "abcd" for column in "1234")  # the 4×4 grid cells that questions name
FACES = {
    "train": (
        "Sans", "Sans-Bold", "Sans-Oblique", "Serif", "Serif-Bold", "Serif-Italic", "SansMono", "SansMono-Bold",
        "SansMono-BoldOblique",
    ),
    "validation": ("Serif-BoldItalic",),
    "test": ("SansMono-Oblique", "Sans-BoldOblique"),
}  # fmt: skip
LINES = {"form": (4, 5, 6, 7), "table": (2, 3, 4), "chart": (3, 4, 5)}  # how many labels, rows or bars a page has
_SIZES = (10, 11, 12, 13)  # of type, in pixels
_NAME_SHARES = {"train": (0, 1, 2), "validation": (3,), "test": (4,)}
_LEVELS = 12  # heights of bars, no two alike on a page

Color = tuple[int, int, int]


@dataclass(frozen=True)
class Text:
    """A name or a number; ``x`` is its left edge and ``y`` its middle, in pixels."""

    text: str
    x: int
    y: int
    face: str
    size: int

    @property
    def is_number(self) -> bool:
        """Whether it is set digit by digit."""
        return self.text.isdigit()

    @property
    def width(self) -> float:
        """Pixels across."""
        return width_of(self.text, self.face, self.size)

    def spots(self) -> list[tuple[float, float]]:
        """Centres (x, y): of each digit of a number, or of the name."""
        if not self.is_number:
            return [(self.x + self.width / 2, self.y)]
        pitch = _pitch(self.face, self.size)
        return [(self.x + pitch * (i + 0.5), self.y) for i in range(len(self.text))]

    @property
    def cell(self) -> str:
        """The grid cell that holds the centre: row a to d from the top, column 1 to 4 from the left."""
        return CELLS[int(self.y * 4 // SIDE) * 4 + int((self.x + self.width / 2) * 4 // SIDE)]


@dataclass(frozen=True)
class Bar:
    """A bar of a chart, in pixels; ``level`` orders the bars of a page."""

    name: str
    left: int
    top: int
    right: int
    bottom: int
    color: Color
    level: int

    def spots(self) -> list[tuple[float, float]]:
        """The middle of its upper edge."""
        return [((self.left + self.right) / 2, self.top + 1)]


@dataclass
class Page:
    """One block of text or bars on a page.

    Attributes:
        lines: names of the lines, rows or bars, in reading order.
        names: every name that is printed, with its text.
        values: the number at a name, or at names of row and column.
        bars: of a chart, in the order of ``lines``.
        rules: (left, y, right) of horizontal lines.
        strip: left and right edge of a receipt's paper; None where paper fills the picture.
    """

    kind: str
    paper: Color
    ink: Color
    desk: Color
    lines: list[str] = field(default_factory=list)
    names: dict[str, Text] = field(default_factory=dict)
    values: dict[tuple[str, ...], Text] = field(default_factory=dict)
    bars: list[Bar] = field(default_factory=list)
    rules: list[tuple[int, int, int]] = field(default_factory=list)
    strip: tuple[int, int] | None = None

    @property
    def texts(self) -> list[Text]:
        """All that is printed."""
        return [*self.names.values(), *self.values.values()]


def split_of(what: str) -> str:
    """The split that a number or a place on the page belongs to: eight in ten train, one each validation and test."""
    share = zlib.crc32(what.encode()) % 10
    return "train" if share < 8 else ("validation" if share == 8 else "test")


@cache
def names_at(place: int, split: str) -> tuple[str, ...]:
    """The names that a split prints at the line, row or column of that number."""
    return tuple(name for rank, name in enumerate(NAMES) if (rank + 3 * place) % 5 in _NAME_SHARES[split])


def make_page(rng: np.random.Generator, split: str, kind: str) -> Page:
    """Lay out a page of a kind; what does not fit is drawn anew."""
    layout = {"form": _form, "table": _table, "chart": _chart}[kind]
    while True:
        dark, light = _color(rng, 0, 90), _color(rng, 215, 256)
        if rng.random() < 0.15:
            dark, light = _color(rng, 200, 256), _color(rng, 0, 70)
        page = Page(kind, paper=light, ink=dark, desk=_color(rng, 90, 190))
        if layout(page, rng, split):
            return page


def _color(rng: np.random.Generator, low: int, high: int) -> Color:
    red, green, blue = rng.integers(low, high, 3).tolist()
    return red, green, blue


def _pick_names(
    rng: np.random.Generator, split: str, places: list[int], most: float, face: str, size: int
) -> list[str]:
    """A name for each place, no wider than ``most`` pixels; empty where there is none."""
    picked: list[str] = []
    for place in places:
        choice = [n for n in names_at(place, split) if n not in picked and width_of(n, face, size) <= most]
        if not choice:
            return []
        picked.append(choice[int(rng.integers(len(choice)))])
    return picked


def _number(rng: np.random.Generator, split: str, most: int) -> str:
    """A number of 1 to ``most`` digits, all lengths alike."""
    length = int(rng.integers(1, most + 1))
    while True:
        number = str(int(rng.integers(10 ** (length - 1), 10**length)))
        if length == 1 or split_of(number) == split:
            return number


def _face_and_size(rng: np.random.Generator, split: str, sizes: tuple[int, ...]) -> tuple[str, int]:
    """A face, in training also an upright one that is slanted: ``Sans@2`` by 2 pixels in 10."""
    face = FACES[split][int(rng.integers(len(FACES[split])))]
    if split == "train" and not face.endswith(("Oblique", "Italic")) and rng.random() < 0.4:
        face += str(rng.choice(["@1", "@2", "@2"]))
    return face, int(rng.choice(sizes))


def _form(page: Page, rng: np.random.Generator, split: str) -> bool:
    face, size = _face_and_size(rng, split, _SIZES)
    other = face if rng.random() < 0.5 else _face_and_size(rng, split, _SIZES)[0]
    count = int(rng.choice(LINES["form"]))
    pitch = int(size * rng.uniform(1.2, 1.6))
    room = SIDE - size - 2 - (count - 1) * pitch
    if room < 1:
        return False
    left, top = int(rng.integers(2, 14)), size // 2 + 2 + int(rng.integers(room))
    names = _pick_names(rng, split, list(range(count)), SIDE, face, size)
    first = left + max(width_of(name, face, size) for name in names) + 5
    last = SIDE - 3 - 3 * _pitch(other, size)
    if split_of(f"form {left} {top}") != split or first > last:
        return False
    right_aligned, start = rng.random() < 0.5, int(rng.integers(int(first), int(last) + 1))
    for place, name in enumerate(names):
        y, number = top + place * pitch, _number(rng, split, 3)
        page.names[name] = Text(name, left, y, face, size)
        x = start + (3 - len(number)) * _pitch(other, size) if right_aligned else start
        page.values[name,] = Text(number, x, y, other, size)
        if rng.random() < 0.2:
            page.rules.append((left, y + pitch // 2, start + 3 * _pitch(other, size)))
    page.lines = names
    if rng.random() < 0.3:
        page.strip = (left - 2, start + 3 * _pitch(other, size) + 2)
    return True


def _table(page: Page, rng: np.random.Generator, split: str) -> bool:
    face, size = _face_and_size(rng, split, _SIZES[:2])
    rows, columns = int(rng.choice(LINES["table"])), int(rng.integers(2, 4))
    pitch = int(size * rng.uniform(1.25, 1.9))
    room = SIDE - size - 2 - rows * pitch
    if room < 1:
        return False
    left, top = int(rng.integers(1, 6)), size // 2 + 2 + int(rng.integers(room))
    names = _pick_names(rng, split, list(range(rows)), SIDE, face, size)
    first = left + int(max(width_of(name, face, size) for name in names)) + 4
    across = (SIDE - 1 - first) // columns
    heads = _pick_names(rng, split, [4 + i for i in range(columns)], across - 2, face, size)
    if split_of(f"table {left} {top}") != split or not heads or set(heads) & set(names):
        return False
    for place, head in enumerate(heads):
        x = first + place * across + int(across - width_of(head, face, size)) // 2
        page.names[head] = Text(head, x, top, face, size)
    if rng.random() < 0.6:
        page.rules.append((left, top + pitch // 2, SIDE - 2))
    for line, name in enumerate(names):
        y = top + (line + 1) * pitch
        page.names[name] = Text(name, left, y, face, size)
        for place, head in enumerate(heads):
            number = _number(rng, split, 2)
            x = first + place * across + (across - len(number) * _pitch(face, size)) // 2
            page.values[name, head] = Text(number, x, y, face, size)
    page.lines = names
    return True


def _chart(page: Page, rng: np.random.Generator, split: str) -> bool:
    face, size = _face_and_size(rng, split, _SIZES[:1])
    count = int(rng.choice(LINES["chart"]))
    left, base, top = int(rng.integers(1, 5)), SIDE - 16 - int(rng.integers(12)), int(rng.integers(4, 24))
    across = (SIDE - 1 - left) // count
    names = _pick_names(rng, split, list(range(count)), across - 2, face, size)
    if split_of(f"chart {left} {base}") != split or not names:
        return False
    levels = rng.permutation(_LEVELS)[:count].tolist()
    step = (base - top - 6) / (_LEVELS - 1)
    shade, varied, thick = _color(rng, 40, 210), rng.random() < 0.5, rng.uniform(0.4, 0.7)
    for place, (name, level) in enumerate(zip(names, levels, strict=True)):
        middle = left + int(across * (place + 0.5))
        half = int(across * thick / 2)
        color = _color(rng, 40, 210) if varied else shade
        page.bars.append(Bar(name, middle - half, int(base - 6 - level * step), middle + half, base, color, level))
        page.names[name] = Text(name, middle - int(width_of(name, face, size) / 2), base + 9, face, size)
    page.rules.append((left, base, SIDE - 2))
    page.lines = names
    return True


def render(page: Page, rng: np.random.Generator) -> np.ndarray:
    """Draw a page: (128, 128, 3) uint8."""
    canvas = np.empty((SIDE, SIDE, 3), np.float32)
    canvas[:] = page.paper
    if page.strip:
        canvas[:, : page.strip[0]], canvas[:, page.strip[1] :] = page.desk, page.desk
    for bar in page.bars:
        canvas[bar.top : bar.bottom, bar.left : bar.right] = bar.color
    for left, y, right in page.rules:
        canvas[y : y + 1, left:right] = page.ink
    ink = np.asarray(page.ink, np.float32)
    for text in page.texts:
        if text.is_number:
            for digit, (x, _) in zip(text.text, text.spots(), strict=True):
                _stamp(canvas, digit, x - width_of(digit, text.face, text.size) / 2, text, ink)
        else:
            _stamp(canvas, text.text, text.x, text, ink)
    canvas += rng.normal(0, rng.uniform(0, 6), (SIDE, SIDE, 1))
    return canvas.clip(0, 255).astype(np.uint8)


def _stamp(canvas: np.ndarray, letters: str, x: float, text: Text, ink: np.ndarray) -> None:
    glyph = _glyph(letters, text.face, text.size)
    left, top = round(x) - 1, text.y - glyph.shape[0] // 2
    rows, columns = slice(max(top, 0), top + glyph.shape[0]), slice(max(left, 0), left + glyph.shape[1])
    area = canvas[rows, columns]
    part = glyph[rows.start - top :, columns.start - left :][: area.shape[0], : area.shape[1], None]
    area += part * (ink - area)


@cache
def _font(face: str, size: int) -> ImageFont.FreeTypeFont:
    file = f"DejaVu{face.partition('@')[0]}.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / file, size)


@cache
def width_of(text: str, face: str, size: int) -> float:
    """Pixels from the left edge of a text to its right one."""
    if text.isdigit() and len(text) > 1:
        return len(text) * _pitch(face, size)
    return float(_font(face, size).getlength(text))


@cache
def _pitch(face: str, size: int) -> int:
    """Pixels from one digit to the next."""
    return max(PATCH, round(_font(face, size).getlength("0")))


@cache
def _glyph(letters: str, face: str, size: int) -> np.ndarray:
    """Coverage in [0, 1], (h, w) float32; the text's left edge is at column 1 and its middle at row h // 2."""
    width, height = int(width_of(letters, face, size)) + 4, int(size * 1.4) + 2
    upright, _, slant = face.partition("@")
    scale = 4 if slant else 1  # a slanted one is drawn large
    image = Image.new("L", (width * scale, height * scale))
    middle = height // 2 * scale
    ImageDraw.Draw(image).text((scale, middle), letters, font=_font(upright, size * scale), fill=255, anchor="lm")
    if slant:
        lean = int(slant) / 10
        image = image.transform(image.size, Image.Transform.AFFINE, (1, lean, -lean * middle, 0, 1, 0))
        image = image.resize((width, height), Image.Resampling.BOX)
    return np.asarray(image, np.float32) / 255


def relevance(wanted: list[Text | Bar]) -> np.ndarray:
    """How much a question about the ``wanted`` things is about each pixel: (128, 128) float32, 0 off them.

    It is 2 at the centre of a name or digit, or at the middle of a bar's upper edge, and falls off from there.

    Args:
        wanted: names, numbers and bars of a page.
    """
    rows, columns = np.mgrid[:SIDE, :SIDE]
    value = np.zeros((SIDE, SIDE), np.float32)
    for thing in wanted:
        for x, y in thing.spots():  # from the pixel that holds it: its patch is first, also on the border of two
            square = (columns - int(x)) ** 2 + (rows - int(y)) ** 2
            value = np.maximum(value, np.where(square < PATCH**2, 2 * np.exp(-square / 32), 0))
    return value.astype(np.float32)
