"""What the tests of the host have in common."""

import pytest
from tiny_llava import LONG, NONE, TWO, make_image

TURNS = "<s> USER: <image> what color ? ASSISTANT: red </s> USER: is the box left ? ASSISTANT:"


@pytest.fixture
def tiny(tiny_llava):
    return tiny_llava


@pytest.fixture
def layouts(tiny):
    """Four layouts in one batch: no image, one, two, several turns; padded on the left."""
    images = [[make_image(i)] for i in range(2)]
    return tiny.batch([LONG, NONE, TWO, TURNS], [images[0], [], [make_image(5), make_image(6)], images[1]])
