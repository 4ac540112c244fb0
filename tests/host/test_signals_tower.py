"""Signals of the vision tower equal what its own eager attention gives."""

from fractions import Fraction

import pytest
import torch
from towers import small_tower

from prunezoo import PruneZooError
from prunezoo.core.signals import VISION_KINDS, parse_signal
from prunezoo.host.parts.tower import Tower
from prunezoo.host.signals.vision import attention_map, mean_attention, watch_tower


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("feature_layer", [-2, -1, 2])
def test_vision_signals_of_any_block_equal_eager_maps(kind, feature_layer):
    model, pixels = small_tower(kind), torch.randn(3, 3, 20, 20)
    tower = Tower(model, feature_layer, has_cls=kind == "clip")
    last = {-2: 2, -1: 3, 2: 1}[feature_layer]
    kinds = [name for name in VISION_KINDS if kind == "clip" or not name.startswith("cls")]
    places = {"": last, "@0": 0, "@1": 1, "@-1": last, "@-2": last - 1, "@9/24": 1, "@1/24": 0}
    if last < 3:
        places["@next"] = last + 1
    needs = tuple(name + place for name in kinds for place in places)
    with watch_tower(lambda: tower, needs) as signals:
        out = model(pixels)
    model.set_attn_implementation("eager")
    expected = model(pixels, output_attentions=True, output_hidden_states=True)
    assert torch.allclose(out.last_hidden_state, expected.last_hidden_state, atol=1e-5)
    for place, block in places.items():
        heads = expected.attentions[block].movedim(1, -1)  # (R, S, S, H)
        first = heads.shape[1] - 25
        normed = model.encoder.layers[block].layer_norm1(expected.hidden_states[block])
        queries = model.encoder.layers[block].self_attn.q_proj(normed).unflatten(-1, (3, 8))
        values = model.encoder.layers[block].self_attn.v_proj(normed).unflatten(-1, (3, 8))
        keys = model.encoder.layers[block].self_attn.k_proj(normed).unflatten(-1, (3, 8))
        logits = queries[:, :1].flatten(2) @ keys.flatten(2).mT / 24**0.5
        wanted = {
            "cls_joint_attention": logits.softmax(-1)[:, 0, first:],
            "cls_attention": heads.mean(3)[:, 0, first:],
            "cls_head_attention": heads[:, 0, first:],
            "cls_query": queries[:, :1].expand(-1, 25, -1, -1),
            "cls_value": values[:, :1].expand(-1, 25, -1, -1),
            "received_attention": heads.mean((1, 3))[:, first:],
            "vision_attention": heads.mean(3)[:, first:, first:],
            "vision_head_attention": heads[:, first:, first:],
            "vision_keys": keys[:, first:],
            "vision_values": values[:, first:],
            "vision_outputs": torch.einsum("rqkh,rkhd->rqhd", heads, values)[:, first:],
            "vision_inputs": expected.hidden_states[block][:, first:],
            "vision_states": expected.hidden_states[block + 1][:, first:],
        }
        for name in kinds:
            got = signals[name + place]
            (got,) = got if isinstance(got, list) else [got]
            torch.testing.assert_close(got, wanted[name], rtol=1e-4, atol=1e-5)
    assert (signals["received_attention"] - signals["received_attention@0"]).abs().max() > 1e-3


def test_attention_is_made_in_pieces_and_minds_the_mask():
    torch.manual_seed(0)
    query, key = torch.randn(2, 1500, 2, 4), torch.randn(2, 1500, 2, 4)
    whole = (torch.einsum("bqhd,bkhd->bhqk", query, key) * 0.5).softmax(-1).mean((1, 2))
    torch.testing.assert_close(mean_attention(query, key, 0.5, None), whole, rtol=1e-4, atol=1e-7)
    seen = torch.arange(1500) < torch.tensor([[1500], [700]])
    short = mean_attention(query[1:, :700], key[1:, :700], 0.5, None)
    number = torch.zeros(2, 1, 1, 1500).masked_fill(~seen[:, None, None], torch.finfo(torch.float32).min)
    for mask in (seen[:, None, None].expand(-1, 1, 1500, -1), number):
        masked = mean_attention(query, key, 0.5, mask)
        torch.testing.assert_close(masked[1, :700], short[0], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(masked[0], whole[0], rtol=1e-4, atol=1e-7)
        assert not masked[1, 700:].any()


def test_maps_are_made_in_pieces_and_mind_the_mask():
    torch.manual_seed(0)
    query, key = torch.randn(2, 1100, 2, 4), torch.randn(2, 1100, 2, 4)
    seen = (torch.arange(1100) < torch.tensor([[1100], [700]]))[:, None, None]
    logits = (torch.einsum("bqhd,bkhd->bqkh", query, key) * 0.5).masked_fill(~seen.movedim(-1, 2), -torch.inf)
    whole = attention_map(query, key, 0.5, seen, by_head=True)
    torch.testing.assert_close(whole, logits.softmax(2), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(attention_map(query, key, 0.5, seen, by_head=False), whole.mean(3))


def test_pixels_are_the_squares_that_enter_the_tower():
    model, pictures = small_tower("siglip"), torch.randn(3, 3, 22, 22)  # a rest of two, which the tower leaves out
    tower = Tower(model, -2, has_cls=False)
    with watch_tower(lambda: tower, ("pixels",)) as signals:
        model(pictures[..., :20, :20])
    assert signals["pixels"].shape == (3, 25, 3, 4, 4)
    for patch in range(25):
        row, column = 4 * (patch // 5), 4 * (patch % 5)
        assert torch.equal(signals["pixels"][:, patch], pictures[:, :, row : row + 4, column : column + 4])


def test_a_tower_says_what_it_has_not():
    tower = Tower(small_tower("siglip"), -2, has_cls=False)
    for kind in ("cls_attention", "cls_head_attention", "cls_joint_attention", "cls_value"):
        with (
            pytest.raises(PruneZooError, match=f"received_attention', not '{kind}'"),
            watch_tower(lambda: tower, (kind,)),
        ):
            pass
    whole = Tower(small_tower("siglip"), -1, has_cls=False)
    with (
        pytest.raises(
            PruneZooError, match=r"no block behind the projected one.*block='projected'.*attention='received'"
        ),
        watch_tower(lambda: whole, ("vision_keys@next",)),
    ):
        pass
    for block in (3, -4):  # the fourth block runs, but behind the projected one
        with (
            pytest.raises(PruneZooError, match="blocks are 0 to 2"),
            watch_tower(lambda: tower, (f"vision_keys@{block}",)),
        ):
            pass
    with pytest.raises(PruneZooError, match="patch embedding"):
        Tower(small_tower("clip"), 0).block_index()


@pytest.mark.parametrize("share", ["23/24", "25/24"])
def test_a_share_of_the_tower_that_does_not_run_is_refused(share):
    with pytest.raises(PruneZooError, match=rf"vision block {share} does not run: this tower's blocks are 0 to 2"):
        Tower(small_tower("clip"), -2).block_index(Fraction(share))


@pytest.mark.parametrize("name", ["prompt_attention@9/24", "pixels@1/2", "received_attention@previous"])
def test_a_place_that_a_kind_has_not_is_refused(name):
    with pytest.raises(PruneZooError, match="means nothing for"):
        parse_signal(name)
