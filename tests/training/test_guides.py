"""Guides against slow references written from their definitions, on every family, and against chance."""

import pytest
import torch
from families import FAMILIES, MAKES, Sample, tiny_family
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from prunezoo import PruneZooError, encode, full_forward
from prunezoo.host.signals.relevance import eager_attention
from trainers.caches.maps import RelevanceWorker, SuiteMaps
from trainers.cli.names import ROOT
from trainers.data.conversation import ConversationCollator
from trainers.data.suite import load_suite
from trainers.evaluation.loading import load_vlm
from trainers.evaluation.methods import build_method, view_of
from trainers.training.guide_lrp import entered, explained, lrp
from trainers.training.guide_names import GUIDES, find_guide, fixed
from trainers.training.guide_provenance import provenance
from trainers.training.losses import answer_slots

VLM = str(ROOT / "checkpoints" / "tiny-llava")
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 11}


@pytest.fixture(scope="module")
def tiny():
    return load_vlm(VLM, "cpu", "float32")


def small_llama(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(**SIZES, num_key_value_heads=2, initializer_range=0.3, attn_implementation="eager")
    return LlamaForCausalLM(config).double().eval()


def explained_llama(model, hidden):
    """Relevance (L, D) of what the first layer is given for the best logit of the last token, and that logit."""
    with explained(model.model, model.model.layers), entered(model.model.layers[0]) as entry:
        logit = model(inputs_embeds=hidden).logits[0, -1].max()
        (gradient,) = torch.autograd.grad(logit, entry[0])
    return (entry[0] * gradient)[0].detach(), logit.detach()


# LRP


def through(call, x, relevance):
    """Relevance of the input of a map that is linear in it: shares in proportion to products."""
    x = x.detach().requires_grad_()
    y = call(x)
    (back,) = torch.autograd.grad(y, x, relevance / y.detach())
    return x.detach() * back


def layer_by_rules(layer, hidden, rotary, relevance):
    """Relevance (L, D) behind a decoder layer handed through it by the rules of AttnLRP, one after the other."""
    attention, mlp, heads = layer.self_attn, layer.mlp, SIZES["num_attention_heads"]
    turn = lambda x: x * rotary[0][0] + torch.cat([-x[..., 4:], x[..., :4]], -1) * rotary[1][0]  # noqa: E731
    split = lambda x: x.view(-1, heads, 8).transpose(0, 1)  # noqa: E731
    normed = layer.input_layernorm(hidden)
    raw_q, raw_k, v = (split(getattr(attention, f"{name}_proj")(normed)) for name in "qkv")
    q, k = turn(raw_q), turn(raw_k)
    logits = q @ k.mT * attention.scaling
    seen = torch.ones_like(logits[0]).tril().bool()
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    context = weights @ v
    join = lambda x: x.transpose(0, 1).flatten(1)  # noqa: E731
    gave = attention.o_proj(join(context))
    half = hidden + gave
    taken = layer.post_attention_layernorm(half)
    gate, up = mlp.gate_proj(taken), mlp.up_proj(taken)
    inner = mlp.act_fn(gate) * up
    out = half + mlp.down_proj(inner)

    of_mlp = mlp.down_proj(inner) / out * relevance
    of_half = half / out * relevance
    of_inner = through(mlp.down_proj, inner, of_mlp)
    of_half = of_half + through(mlp.gate_proj, taken, of_inner / 2) + through(mlp.up_proj, taken, of_inner / 2)

    of_context = split(through(attention.o_proj, join(context), gave / half * of_half))
    products = weights[..., None] * v[:, None]  # (heads, L, L, d)
    shares = products * (of_context / context)[:, :, None]
    of_v, of_weights = shares.sum(1) / 2, shares.sum(-1) / 2
    of_logits = logits * (of_weights - weights * of_weights.sum(-1, keepdim=True))
    pairs = q[:, :, None] * k[:, None] * attention.scaling * (of_logits / logits)[..., None]
    of_q, of_k = through(turn, raw_q, pairs.sum(2) / 2), through(turn, raw_k, pairs.sum(1) / 2)
    of_hidden = hidden / half * of_half
    for name, of in zip("qkv", (of_q, of_k, of_v), strict=True):
        of_hidden = of_hidden + through(getattr(attention, f"{name}_proj"), normed, join(of))
    return of_hidden


def test_lrp_equals_the_rules_applied_one_by_one():
    model = small_llama()
    hidden = torch.randn(1, 5, 16, dtype=torch.float64)
    ours, _ = explained_llama(model, hidden)
    with torch.no_grad():
        states = model(inputs_embeds=hidden, output_hidden_states=True).hidden_states
    normed = states[-1][0]  # behind the last norm
    best = model.lm_head(normed[-1]).argmax()
    relevance = torch.zeros_like(normed)
    relevance[-1] = normed[-1] * model.lm_head.weight[best].detach()
    rotary = model.model.rotary_emb(hidden, torch.arange(5)[None])
    for number, layer in reversed(list(enumerate(model.model.layers))):
        relevance = layer_by_rules(layer, states[number][0].detach(), rotary, relevance).detach()
    assert relevance.abs().max() > 1e-2
    torch.testing.assert_close(ours, relevance, rtol=1e-4, atol=1e-7)  # norms compute in single precision


def test_lrp_is_conserved_where_no_softmax_is():
    """Without attention every rule hands on all that it is given: the logit is shared out to a part in 1e9."""
    model = small_llama(1)
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
    relevance, logit = explained_llama(model, torch.randn(1, 5, 16, dtype=torch.float64))
    assert logit.abs() > 0.1
    torch.testing.assert_close(relevance.sum(), logit, rtol=1e-9, atol=0)
    assert not relevance[:-1].any(), "nothing reaches the last token from the others"


def test_under_the_rules_the_model_computes_what_it_did():
    model, hidden = small_llama(), torch.randn(1, 5, 16, dtype=torch.float64)
    before = model(inputs_embeds=hidden).logits
    with explained(model.model, model.model.layers):
        assert torch.equal(model(inputs_embeds=hidden).logits, before)
    logits = model(inputs_embeds=hidden.requires_grad_()).logits
    assert torch.equal(logits, before)
    (gradient,) = torch.autograd.grad(logits.sum(), hidden)
    with explained(model.model, model.model.layers):
        (other,) = torch.autograd.grad(model(inputs_embeds=hidden).logits.sum(), hidden)
    assert (gradient - other).abs().max() > 1e-2


# Provenance


def provenance_by_hand(weights, mask, image, words):
    """One row, one image: loops over layers and words. weights (layers, L, L) of the head mean."""
    length, tokens = len(mask), len(image)
    start = torch.zeros(length, tokens)
    start[image, torch.arange(tokens)] = 1
    even = torch.zeros(length, length)
    for row in range(length):
        before = [column for column in range(row + 1) if mask[column]]
        for column in before:
            even[row, column] = 1 / len(before)
    own = place = start
    for attention in weights[:-1]:
        own = (0.5 * torch.eye(length) + 0.5 * attention) @ own
        place = (0.5 * torch.eye(length) + 0.5 * even) @ place
    rows = []
    for word in words:
        row = (weights[-1] @ own)[word] / (even @ place)[word].clamp_min(1e-4).sqrt()
        rows.append(row / row.sum())
    return torch.stack(rows).mean(0)


def test_provenance_equals_the_definition(tiny):
    vlm, processor = tiny
    encoded = encode(vlm, ConversationCollator(processor)(load_suite("scenes", "train", 3)[:3]))
    ours, logits = provenance(vlm, encoded)
    with eager_attention(vlm), torch.no_grad():
        out = full_forward(vlm, encoded, output_attentions=True)
    torch.testing.assert_close(logits, answer_slots(out.logits, out.labels)[0])
    for row in range(3):
        image = encoded.slots[row]
        behind = torch.arange(encoded.mask.shape[1]) > image.max()
        words = (encoded.mask[row] & (encoded.labels[row] == -100) & behind).nonzero()[:, 0]
        weights = torch.stack([layer[row].mean(0) for layer in out.attentions[: round(10 / 28 * 5) + 1]])
        expected = provenance_by_hand(weights, encoded.mask[row], image, words)
        torch.testing.assert_close(ours[row], expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(ours.sum(1), torch.ones(3))


# All of them


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_every_guide_and_padding_changes_nothing(name):
    family = tiny_family(name)
    samples = [Sample(((48, 40),), 7), Sample(((24, 48),), 5)]
    left, right = (encode(family.vlm, family.batch(samples, side, labels=True)) for side in ("left", "right"))
    valid = left.inputs.valid
    for guide in ("lrp", "provenance"):
        found = fixed(find_guide(guide), family.vlm, left)
        assert found.shape == valid.shape and found.isfinite().all() and (found >= 0).all(), guide
        assert not found[~valid].any() and (found > 0).any(1).all(), guide
        torch.testing.assert_close(found, fixed(find_guide(guide), family.vlm, right), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["lfm2_vl", "llama4"])
def test_a_decoder_of_another_make_is_refused_with_the_remedy(name):
    family = tiny_family(name) if name in MAKES else pytest.skip("not in this release")
    encoded = encode(family.vlm, family.batch([Sample(((48, 40),), 5)], labels=True))
    with pytest.raises(PruneZooError, match=r"guide lrp: no rules are known .* set guide=relevance"):
        lrp(family.vlm, encoded)


def test_layers_without_attention_are_refused_with_the_remedy():
    family = tiny_family("lfm2_vl")
    encoded = encode(family.vlm, family.batch([Sample(((48, 40),), 5)], labels=True))
    with pytest.raises(PruneZooError, match="guide provenance: decoder layer 0 gives no attention weights; set guide="):
        provenance(family.vlm, encoded)


@pytest.mark.parametrize("name", GUIDES)
def test_a_guide_finds_what_the_question_is_about(name, tiny):
    """A token of the asked object has more than one of the rest, in most pairs; chance is half of them."""
    vlm, processor = tiny
    items = [item for item in load_suite("scenes", "validation", 16) if item.relevant is not None]
    batch = ConversationCollator(processor)(items)
    encoded = encode(vlm, batch)
    methods = [build_method("oracle"), build_method(f"guide@{name}")]
    view = view_of(vlm, batch, encoded, items, methods)
    oracle, found = (method.rate(view) for method in methods)
    right = []
    for asked, own in zip(oracle > 0.5, found, strict=True):
        if asked.any() and not asked.all():
            right.append((own[asked][:, None] > own[~asked]).double().mean())
    assert len(right) > 8 and torch.stack(right).mean() > 0.65


def test_a_guide_that_is_none_is_refused():
    with pytest.raises(PruneZooError, match="guide=lpr: there are relevance, attention, grad_attention, lrp, proven"):
        build_method("guide@lpr")


# Maps on the disk


@pytest.mark.parametrize("name", ["relevance", "provenance"])
def test_maps_of_a_guide_are_the_same_whenever_they_are_made(name, tiny):
    items = load_suite("scenes", "train", 4)[:4]
    worker = RelevanceWorker(VLM, "float32", items, 2, None, None, "prompt_attention", name)
    shards = [worker.on(tiny[0])(range(4), lambda _: None) for _ in range(2)]
    assert torch.equal(shards[0]["relevance"], shards[1]["relevance"]) and shards[0]["relevance"].max() > 0
    batch = ConversationCollator(tiny[1])(items[:2])
    first = fixed(find_guide(name), tiny[0], encode(tiny[0], batch))
    assert shards[0]["item"].tolist()[:2] == [0, 1]
    torch.testing.assert_close(shards[0]["relevance"][: 2 * 144], first.flatten())


def test_maps_of_another_guide_are_another_cache(tmp_path):
    of = {"vlm": VLM, "maps": str(tmp_path), "suite": "scenes"}
    assert SuiteMaps(**of, max_tokens=1).facts(None) == {"max_tokens": 1, "signal": "prompt_attention"}
    assert SuiteMaps(**of, guide="lrp").facts(None)["guide"] == "lrp"
    with pytest.raises(PruneZooError, match="max_tokens=1 is of guide=grad_attention, not of lrp: leave it out"):
        SuiteMaps(**of, guide="lrp", max_tokens=1)
