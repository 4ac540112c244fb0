"""Scenes, the pictures: objects and plates of handwritten digits at any place over real photographic texture.

A scene is 96×96 pixels. Digits are the UCI handwritten ones and the texture comes from two photographs, both shipped
with scikit-learn; digits are split by writer, photographs by region, so that no split shares a pixel with another.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw
from sklearn.datasets import load_digits, load_sample_images
from sklearn.neighbors import KNeighborsClassifier
from sklearn.svm import SVC

SIDE = 96
COLORS = {
    "red": (215, 35, 40),
    "green": (40, 165, 60),
    "blue": (40, 75, 220),
    "yellow": (240, 215, 40),
    "purple": (150, 50, 185),
    "cyan": (60, 210, 225),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
SIZES = {"small": (10, 12), "large": (17, 20)}  # pixels across, both ends included
DIGIT = (12, 12)  # width and height of a digit on a plate, pixels
LENGTHS = (0.3, 0.3, 0.25, 0.15)  # how often a plate has one, two, three, four digits
CELLS = tuple(f"{row}{column}" for row in "abcd" for column in "1234")  # the 4×4 grid cells that questions name
_DIGIT_SPLITS = {"train": (0, 1200), "validation": (1200, 1450), "test": (1450, 1797)}  # the file is in writer order
_PHOTO_SPLITS = {"train": (0.0, 0.6), "validation": (0.6, 0.78), "test": (0.78, 1.0)}  # shares of a photograph's width


@dataclass(frozen=True)
class Thing:
    """An object of a scene: a shape, or a plate with a number on it. Lengths in pixels, (x, y) its centre."""

    color: str
    shape: str
    size: str
    x: float
    y: float
    width: int
    height: int
    number: str = ""
    digits: tuple[int, ...] = ()

    @property
    def cell(self) -> str:
        """The grid cell that holds the centre: row a to d from the top, column 1 to 4 from the left."""
        return CELLS[int(self.y * 4 // SIDE) * 4 + int(self.x * 4 // SIDE)]

    def digit_centers(self) -> list[tuple[float, float]]:
        """Centres (x, y) of a plate's digits, from left to right."""
        left = self.x - DIGIT[0] * len(self.number) / 2
        return [(left + DIGIT[0] * (i + 0.5), self.y) for i in range(len(self.number))]


@dataclass(frozen=True)
class Assets:
    """What the pictures of one split are made of."""

    digits: dict[str, np.ndarray]  # digit -> (n, 12, 10) float32 ink in [0, 1]
    photos: tuple[np.ndarray, ...]  # (h, w, 3) uint8


@cache
def load_assets(split: str) -> Assets:
    """Digits and photographs of a split.

    A digit is left out as illegible unless its ten nearest neighbours by the *other* splits' writers, and a support
    vector classifier fitted on those, all read it right.
    """
    data = load_digits()
    flat, target = data.images.reshape(-1, 64), data.target
    low, high = _DIGIT_SPLITS[split]
    order = np.arange(len(target))
    inside = (order >= low) & (order < high)
    neighbours = KNeighborsClassifier(10).fit(flat[~inside], target[~inside]).predict_proba(flat[inside])
    reader = SVC(gamma=0.001).fit(flat[~inside], target[~inside])
    legible = inside.copy()
    legible[inside] = neighbours[np.arange(inside.sum()), target[inside]] == 1
    legible[inside] &= reader.predict(flat[inside]) == target[inside]
    rng = np.random.default_rng(0)
    bends = 8 if split == "train" else 0  # slanted and turned copies: a thousand digits alone would be learnt by heart
    ink = {}
    for digit in range(10):
        images = data.images[legible & (target == digit)]
        copies = [_enlarge(image) for image in images]
        copies += [_enlarge(image, rng) for image in images for _ in range(bends)]
        ink[str(digit)] = np.stack(copies)
    photos = []
    for photo in load_sample_images().images:
        start, stop = (int(share * photo.shape[1]) for share in _PHOTO_SPLITS[split])
        photos.append(np.ascontiguousarray(photo[:, start:stop]))
    return Assets(ink, tuple(photos))


def _enlarge(image: np.ndarray, rng: np.random.Generator | None = None) -> np.ndarray:
    """(8, 8) in 0 to 16 -> (12, 10) in [0, 1]; with a generator turned, slanted and stretched a little."""
    picture = Image.fromarray((image * 255 / 16).astype(np.uint8))
    if rng is not None:
        picture = picture.resize((40, 40), Image.Resampling.BICUBIC)
        turn, slant = rng.uniform(-0.2, 0.2), rng.uniform(-0.2, 0.2)
        wide, high = rng.uniform(0.9, 1.15, 2)
        matrix = np.array([[np.cos(turn), -np.sin(turn) + slant], [np.sin(turn), np.cos(turn)]]) * [[wide], [high]]
        shift = 20 - matrix @ [20 + rng.uniform(-2, 2), 20 + rng.uniform(-2, 2)]
        affine = (*matrix[0], shift[0], *matrix[1], shift[1])
        picture = picture.transform((40, 40), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    picture = picture.resize(DIGIT, Image.Resampling.BICUBIC)
    return np.clip(np.asarray(picture, np.float32) / 255 * 1.25, 0, 1)


@cache
def shape_mask(shape: str, across: int, turn: int) -> np.ndarray:
    """(across, across) float32 coverage of a shape in [0, 1], turned by ``turn`` × 15 degrees."""
    scale = 8
    size = across * scale
    canvas = Image.new("L", (size, size))
    draw = ImageDraw.Draw(canvas)
    center, radius, angle = size / 2, size / 2 - scale / 2, np.pi / 12 * turn

    def polygon(radii: list[float], start: float) -> None:
        angles = start + angle + np.arange(len(radii)) * 2 * np.pi / len(radii)
        draw.polygon(
            [
                (center + radius * r * np.cos(a), center + radius * r * np.sin(a))
                for r, a in zip(radii, angles, strict=True)
            ],
            fill=255,
        )

    if shape in ("circle", "ring"):
        draw.ellipse((center - radius, center - radius, center + radius, center + radius), fill=255)
        if shape == "ring":
            hole = radius * 0.55
            draw.ellipse((center - hole, center - hole, center + hole, center + hole), fill=0)
    elif shape == "square":
        polygon([1.15] * 4, np.pi / 4)
    elif shape == "triangle":
        polygon([1.1] * 3, -np.pi / 2)
    elif shape == "star":
        polygon([1.1, 0.42] * 5, -np.pi / 2)
    else:  # a cross: two bars
        arm, bar = 1.05, 0.32
        corners = [(bar, arm), (bar, bar), (arm, bar), (arm, -bar), (bar, -bar), (bar, -arm)]
        corners += [(-x, -y) for x, y in corners]
        cos, sin = np.cos(angle), np.sin(angle)
        draw.polygon(
            [(center + radius * (x * cos - y * sin), center + radius * (x * sin + y * cos)) for x, y in corners],
            fill=255,
        )
    return np.asarray(canvas.resize((across, across), Image.Resampling.BOX), np.float32) / 255


def make_things(
    rng: np.random.Generator, split: str, plates: tuple[int, int] = (1, 2), others: tuple[int, int] = (6, 9)
) -> list[Thing]:
    """Place plates and shapes that do not touch; 4 colours and 4 shapes a scene, so that some repeat.

    Args:
        rng: where everything is drawn from.
        split: whose digits.
        plates: fewest and most plates, 4 at most: no two of one colour.
        others: fewest and most shapes; what finds no room is left out.
    """
    assets = load_assets(split)
    palette = rng.permutation(list(COLORS))[:4]
    shapes = rng.permutation(SHAPES)[:4]
    free = np.ones((SIDE, SIDE), bool)
    things: list[Thing] = []
    count = int(rng.integers(plates[0], plates[1] + 1))
    plate_colors = rng.permutation(palette)[:count]
    for index in range(count + int(rng.integers(others[0], others[1] + 1))):
        if index < count:
            length = int(rng.choice(4, p=LENGTHS)) + 1
            number = "".join(str(d) for d in rng.integers(0, 10, length))
            width, height = DIGIT[0] * length + 4, DIGIT[1] + 4
            color, shape, size = str(plate_colors[index]), "plate", "large" if length > 2 else "small"
            digits = tuple(int(rng.integers(len(assets.digits[d]))) for d in number)
        else:
            number, digits = "", ()
            color, shape = str(rng.choice(palette)), str(rng.choice(shapes))
            size = "small" if rng.random() < 0.5 else "large"
            width = height = int(rng.integers(SIZES[size][0], SIZES[size][1] + 1))
        for _ in range(12):
            if number:  # plates lie on a lattice of 4 pixels, so that a tower of 8-pixel patches learns to read in time
                left, top = (2 + 4 * int(rng.integers((SIDE - 2 - side) // 4)) for side in (width, height))
            else:
                left, top = int(rng.integers(1, SIDE - width)), int(rng.integers(1, SIDE - height))
            x, y = left + width / 2, top + height / 2
            clear_of_borders = min(x % 24, 24 - x % 24, y % 24, 24 - y % 24) >= 2  # no doubt about the grid cell
            if clear_of_borders and free[top : top + height, left : left + width].all():
                free[max(top - 1, 0) : top + height + 1, max(left - 1, 0) : left + width + 1] = False
                things.append(Thing(color, shape, size, x, y, width, height, number, digits))
                break
    return things


def render(things: list[Thing], rng: np.random.Generator, split: str) -> np.ndarray:
    """Draw a scene: (96, 96, 3) uint8."""
    assets = load_assets(split)
    canvas = texture(assets, rng)
    for thing in things:
        left, top = int(thing.x - thing.width / 2), int(thing.y - thing.height / 2)
        patch = canvas[top : top + thing.height, left : left + thing.width]
        base = np.asarray(COLORS[thing.color], np.float32) + rng.normal(0, 9, 3).astype(np.float32)
        paint = base * (1 + rng.normal(0, 0.05, (thing.height, thing.width, 1)).astype(np.float32))
        if thing.shape == "plate":
            patch[:] = paint
            dark = thing.color in ("yellow", "cyan", "white", "green")
            ink_color = np.full(3, 15.0 if dark else 245.0, np.float32)
            for (x, y), digit, which in zip(thing.digit_centers(), thing.number, thing.digits, strict=True):
                ink = assets.digits[digit][which][..., None]
                column, row = int(x - DIGIT[0] / 2), int(y - DIGIT[1] / 2)
                area = canvas[row : row + DIGIT[1], column : column + DIGIT[0]]
                area += ink * (ink_color - area)
        else:
            mask = shape_mask(thing.shape, thing.width, int(rng.integers(-1, 2)))[..., None]
            patch += mask * (paint - patch)
    return np.clip(canvas, 0, 255).astype(np.uint8)


def texture(assets: Assets, rng: np.random.Generator) -> np.ndarray:
    """A random crop of a photograph, (96, 96, 3) float32: scale, mirror, contrast and brightness vary."""
    photo = assets.photos[int(rng.integers(len(assets.photos)))]
    side = int(rng.integers(48, min(min(photo.shape[:2]), 192) + 1))
    top, left = int(rng.integers(photo.shape[0] - side + 1)), int(rng.integers(photo.shape[1] - side + 1))
    crop = Image.fromarray(photo[top : top + side, left : left + side])
    canvas = np.asarray(crop.resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float32)
    if rng.random() < 0.5:
        canvas = canvas[:, ::-1]
    return (canvas - 128) * rng.uniform(0.5, 0.9) + 128 + rng.uniform(-30, 30)


def relevance(wanted: list[Thing]) -> np.ndarray:
    """How much a question about the ``wanted`` things is about each pixel: (96, 96) float32, 0 off them.

    On a shape it falls from 2 at the centre to 1 at the rim; on a plate the digits count so and the plate itself 0.5.
    """
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    value = np.zeros((SIDE, SIDE), np.float32)

    def mark(x: float, y: float, width: float, height: float, low: float, peak: float) -> None:
        inside = (abs(columns - x) <= width / 2) & (abs(rows - y) <= height / 2)
        near = np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / 32)
        value[inside] = np.maximum(value, low + peak * near)[inside]

    for thing in wanted:
        mark(thing.x, thing.y, thing.width, thing.height, 0.5 if thing.number else 1.0, 0.0 if thing.number else 1.0)
        for x, y in thing.digit_centers():
            mark(x, y, *DIGIT, 1.0, 1.0)
    return value
