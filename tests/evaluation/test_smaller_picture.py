"""Smaller pictures, the rival of the input stage, on the embedded model."""

from fractions import Fraction

import pytest
import torch
from families import FAMILIES

from prunezoo import PruneZooError
from trainers.data.suite import load_suite
from trainers.evaluation.budgets import parse_budget
from trainers.evaluation.loading import load_vlm
from trainers.upkeep.smaller_picture import BLURRED, SMALLER, Reader, measure_all, size_of


def test_a_smaller_picture_has_no_fewer_patches_than_its_share():
    sizes = {share: size_of(Fraction(share), 12) for share in ("1", "3/4", "1/2", "1/4", "1/9", "1/144")}
    assert sizes == {"1": (12, 12), "3/4": (10, 11), "1/2": (8, 9), "1/4": (6, 6), "1/9": (4, 4), "1/144": (1, 1)}


@pytest.fixture(scope="module")
def reader():
    return Reader(*load_vlm("checkpoints/tiny-llava", "cpu"))


@torch.no_grad()
def test_the_model_reads_a_really_smaller_picture(reader):
    """Fewer tokens, of a tower with its positions interpolated; whole pictures as ever, and the processor as it was."""
    suite = load_suite("scenes", "validation", 6)
    items = [suite[number] for number in range(6)]
    before = reader.processor.image_processor.size
    whole, counts = reader.read(items)
    small, fewer = reader.read(items, (6, 6))
    assert counts.tolist() == [144] * 6 and fewer.tolist() == [36] * 6
    assert reader.processor.image_processor.size == before
    assert torch.equal(whole.target, small.target) and not torch.equal(whole.log_probs, small.log_probs)
    scores = measure_all(reader, suite, [parse_budget("1/2")], 4)
    assert scores[SMALLER, "1/2"].tokens.tolist() == [72] * 6 and scores[BLURRED, "1/2"].tokens.tolist() == [144] * 6
    assert scores[SMALLER, "1/2"].kl.min() > 0 and set(scores[BLURRED, "1/2"].correct) <= {0.0, 1.0}
    blurred = reader.blurred(items[0], (6, 6))
    assert blurred.image.size == (48, 48) and blurred.answer == items[0].answer


def test_a_model_that_cannot_is_told(tiny_llava):
    assert Reader(tiny_llava.vlm, None).side == 6
    with pytest.raises(PruneZooError, match="LLaVA with a CLIP tower reads smaller pictures, not qwen2_vl"):
        Reader(FAMILIES["qwen2_vl"].vlm, None)
