"""What vLLM answers under a pruner is, token for token, what the model answers inside of `attach`.

In an environment of its own: `make test-serve`.
"""

import pytest
from serving import VLM, expect, requests, said, served

pytest.importorskip("vllm", reason="`make test-serve` installs vLLM in an environment of its own")

COUNT, KEEP = 64, 16
PRUNERS = {
    "uniform": ("original", "compact"),
    "divprune": ("original", "compact"),
    "fastervlm": ("original", "compact"),
    "visionzip": ("original",),
    "checkpoints/m3-tiny": ("original", "compact"),
    "checkpoints/ppm-tiny": ("original", "compact"),
    "random": ("original",),
}
CASES = [(pruner, positions) for pruner, several in PRUNERS.items() for positions in several]


def job(pruner, positions, count=COUNT, images=1, keep=KEEP):
    return {
        "vlm": VLM,
        "pruner": pruner,
        "keep": keep,
        "positions": positions,
        "count": count,
        "images": images,
    }


@pytest.fixture(scope="module")
def expected(answers_folder):
    """By pruner and positions."""
    return dict(zip(CASES, expect(answers_folder, [job(*case) for case in CASES]), strict=True))


@pytest.mark.parametrize(("pruner", "positions"), CASES)
def test_served_answers_are_those_of_attach(pruner, positions, expected):
    with served(VLM, pruner, KEEP, positions) as llm:
        answers, lengths = said(llm, requests(VLM, COUNT))
    assert answers == expected[pruner, positions]
    assert max(lengths) < KEEP + 20  # it was shorter


def test_the_comparison_can_fail(expected):
    """Pruners and positions differ on some of the questions."""
    assert expected["divprune", "original"] != expected["divprune", "compact"]
    assert expected["divprune", "original"] != expected["checkpoints/ppm-tiny", "original"]
    assert expected["uniform", "original"] != expected["fastervlm", "original"]
