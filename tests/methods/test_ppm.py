"""PPM beyond the shared contract: places, matching before training, the blind variant, its share of LLaVA-1.5-7B."""

from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlavaConfig, LlavaForConditionalGeneration

from prunezoo import PruneInputs, PruneZooError, build_pruner
from prunezoo.learned.ppm import PPM, distance_features, place_features

CONFIGS = Path(__file__).parent.parent.parent / "configs"


def grid(side: int, tile: int = 0) -> torch.Tensor:
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.stack([torch.full_like(row, tile), row, column], dim=-1).flatten(0, 1)


def make_inputs(batch: int = 2, side: int = 4, words: int = 5, width: int = 32, seed: int = 0) -> PruneInputs:
    generator = torch.Generator().manual_seed(seed)
    return PruneInputs(
        features=torch.randn(batch, side * side, width, generator=generator),
        valid=torch.ones(batch, side * side, dtype=torch.bool),
        cells=grid(side).expand(batch, -1, -1),
        text=torch.randn(batch, words, width, generator=generator),
        text_valid=torch.ones(batch, words, dtype=torch.bool),
    )


def make_ppm(width: int = 32, **config) -> PPM:
    torch.manual_seed(0)
    return PPM(width=width, hidden=32, heads=4, blocks=2, text_blocks=1, **config).eval()


def placed(cells):
    """Images ``(B, N, 3)`` of which only the places matter."""
    return PruneInputs(torch.zeros(*cells.shape[:2], 1), torch.ones(cells.shape[:2], dtype=torch.bool), cells)


def test_places_are_relative_to_each_tile():
    cells = torch.cat([grid(4), grid(8, tile=1), torch.tensor([[1, -1, -1]])])[None]
    features = place_features(placed(cells), octaves=3)[0]
    alone = place_features(placed(grid(8)[None]), octaves=3)[0]
    torch.testing.assert_close(features[16:80, :-1], alone[:, :-1])  # the neighbour tile changes nothing
    assert features[:16, -1].eq(0).all() and features[16:, -1].eq(0.5).all()
    assert features[80, :-1].eq(0).all(), "a newline has no place"
    torch.testing.assert_close(features[0, 0], torch.tensor(torch.pi * 0.5 / 4).sin())  # middle of the first of 4 rows


def test_words_count_from_the_end():
    left = distance_features(torch.tensor([[False, False, True, True]]), 8)
    alone = distance_features(torch.tensor([[True, True]]), 8)
    torch.testing.assert_close(left[:, 2:], alone)


def test_before_training_a_token_looks_at_the_word_that_it_resembles():
    ppm, inputs = make_ppm(), make_inputs(batch=1)
    attention = ppm.blocks[0].ask
    words = ppm._enter(inputs.text)
    key = attention.key(attention.norm_text(words))
    query = attention.query(attention.norm_x(ppm._enter(inputs.text + 0.3 * inputs.features[:, :5])))
    likeness = torch.einsum("bqe,bke->qk", query, key)
    assert likeness.argmax(-1).tolist() == [0, 1, 2, 3, 4]


def test_the_prompt_matters_unless_blind():
    inputs = make_inputs()
    other = PruneInputs(inputs.features, inputs.valid, inputs.cells, inputs.text.flip(1) + 1, inputs.text_valid)
    without = PruneInputs(inputs.features, inputs.valid, inputs.cells)
    aware, blind = make_ppm(), make_ppm(query_aware=False)
    assert (aware.score(inputs) - aware.score(other)).abs().max() > 1e-3
    assert torch.equal(blind.score(inputs), blind.score(without))
    assert not any("text" in name or "ask" in name for name, _ in blind.named_parameters())
    with pytest.raises(PruneZooError, match="query_aware=false"):
        aware.score(without)


def test_padded_words_change_nothing():
    ppm, inputs = make_ppm(), make_inputs()
    padding = torch.full((2, 3, 32), 7.0)
    for order in (1, -1):
        parts = [inputs.text, padding][::order]
        valid = [inputs.text_valid, torch.zeros(2, 3, dtype=torch.bool)][::order]
        padded = PruneInputs(inputs.features, inputs.valid, inputs.cells, torch.cat(parts, 1), torch.cat(valid, 1))
        torch.testing.assert_close(ppm.score(padded), ppm.score(inputs))


@pytest.mark.parametrize("wrong", [{"hidden": 30, "heads": 4}, {"blocks": -1}, {"width": -1}])
def test_a_wrong_size_is_refused(wrong):
    with pytest.raises(PruneZooError, match=next(iter(wrong))):
        build_pruner("ppm", **wrong)


def test_another_models_width_is_refused():
    with pytest.raises(PruneZooError, match="width=32"):
        make_ppm(width=64).score(make_inputs(width=32))


def test_llava_7b_fits_the_recipe_and_ppm_is_a_small_part_of_it():
    """The full model on the meta device: tokens as wide and as many as the recipe says, pruner under 2 %."""
    recipe = yaml.safe_load((CONFIGS / "ppm_llava.yaml").read_text())["model"]["init_args"]["pruner"]["init_args"]
    with torch.device("meta"):
        config = LlavaConfig()  # the defaults are LLaVA-1.5-7B: CLIP ViT-L/14 at 336 pixels, Vicuna 7B
        config.text_config.vocab_size = 32064
        vlm = LlavaForConditionalGeneration(config)
        ppm = PPM(**recipe["config"])
        tokens = vlm.model.get_image_features(torch.empty(2, 3, 336, 336)).pooler_output
        words = vlm.get_input_embeddings()(torch.zeros(2, 9, dtype=torch.long))
    size = sum(p.numel() for p in vlm.parameters())
    share = sum(p.numel() for p in ppm.parameters()) / size
    assert 7.0e9 < size < 7.1e9
    assert [t.shape for t in tokens] == [(576, ppm.config.width)] * 2 and words.shape == (2, 9, ppm.config.width)
    assert share < 0.02
    scores = PPM(**recipe["config"]).score(make_inputs(batch=1, side=24, width=4096))
    assert scores.shape == (1, 576) and scores.isfinite().all()
