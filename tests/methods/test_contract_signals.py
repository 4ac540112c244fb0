"""What every kind of signal promises, in every family: the axes that its table says, or a refusal of one line."""

from functools import partial

import pytest
import torch
from families import CLIPS, FAMILIES, LARGE, SMALL, TALL, VIDEO_FAMILIES, WIDE, Sample, tiny_family
from layer_oracle import Watch
from tiny_llava import LONG, NONE, TWO, make_image

from prunezoo import PruneZooError, attach
from prunezoo import encode as encode_plain
from prunezoo.core.contract import Pruner
from prunezoo.core.signals import (
    DECODER_SIGNALS,
    INSIDE_SIGNALS,
    KINDS,
    PREVIOUS,
    STATE_KINDS,
    WORD_KINDS,
    parse_signal,
)
from prunezoo.host import encode_needs, run_pruned
from prunezoo.host.group import group_forward, repeat_samples


def mean_of_waves(ids, asked):
    """A text encoder: the mean over the words of the question, of waves of their ids."""
    waves = torch.sin(ids[..., None] * torch.tensor([0.3, 0.7, 1.1, 1.9]))
    return (waves * asked[..., None]).sum(1) / asked.sum(1, keepdim=True).clamp_min(1)


class Waves:
    """The same, with a place for pictures."""

    def __call__(self, ids, asked):
        return mean_of_waves(ids, asked)

    def image_features(self, states):
        return states[..., :4].float().sin()


encode = partial(encode_plain, text_encoder=Waves())
WITH_CLS = ("llava", "llava_next", "internvl")
CLS = ("cls_attention", "cls_head_attention", "cls_joint_attention", "cls_query", "cls_value")
MAPS = ("vision_attention", "vision_head_attention")


def check_axes(inputs, width=None):
    """All signals have the axes that their table says, and are finite, on padding too."""
    for name, values in inputs.signals.items():
        axes = parse_signal(name).axes
        lengths = {"R": len(inputs.valid), "N": inputs.valid.shape[1], "T": inputs.text.shape[1], "2": 2}
        lengths["D"] = width or inputs.features.shape[2]
        assert values.dim() == len(axes), name
        for axis, length in zip(axes, values.shape, strict=True):
            assert length == lengths.setdefault(axis, length) > 0, f"{name}: {axis}"
        assert values.isfinite().all() and values.is_floating_point() == (name != "frame"), name


def joined(batches):
    """Batches of one sample each as one: prompts filled on the left, all else at the end."""
    length = max(batch["input_ids"].shape[1] for batch in batches)

    def fill(values, shape):
        prompt = values.dim() == 2 and values.shape[1] in {batch["input_ids"].shape[1] for batch in batches}
        pads = [
            (wanted - had, 0) if prompt else (0, wanted - had) for had, wanted in zip(values.shape, shape, strict=True)
        ]
        return torch.nn.functional.pad(values, [side for pair in reversed(pads[1:]) for side in pair])

    whole = {}
    for key in batches[0]:
        parts = [batch[key] for batch in batches]
        longest = [0, *(max(own) for own in zip(*(part.shape[1:] for part in parts), strict=True))]
        if key in ("input_ids", "attention_mask"):
            longest = [0, length]
        whole[key] = torch.cat([fill(part, [len(part), *longest[1:]]) for part in parts])
    return whole


def real_part(name, values, inputs, row):
    """What an image's signal is without padding."""
    count = {"N": int(inputs.valid[row].sum()), "T": int(inputs.text_valid[row].sum())}
    axes = parse_signal(name).axes[1:]
    return values[row][tuple(slice(count.get(axis)) for axis in axes)]


def kinds_of(name):
    """Those that a family has, for pictures that it does not interpolate."""
    return tuple(kind for kind in KINDS if name in WITH_CLS or kind not in CLS)


def still(kind):
    """A name that knows nothing of the column where a token stands."""
    return f"{kind}+norope" if kind.endswith("layer_keys") else kind


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_every_kind_has_its_axes_and_knows_of_its_image_only(name):
    """Axes; padding finite; a permuted batch is permuted; images of a ragged batch are as alone."""
    tiny, kinds = tiny_family(name), tuple(map(still, kinds_of(name)))
    sizes = (SMALL, SMALL, SMALL) if name == "llava_onevision" else (LARGE, WIDE, TALL)
    samples = [Sample((size,), words) for size, words in zip(sizes, (4, 7, 5), strict=True)]
    alone = [tiny.batch([sample], seed=seed) for seed, sample in enumerate(samples)]
    singles = [encode(tiny.vlm, batch, kinds).inputs for batch in alone]
    both = encode(tiny.vlm, joined(alone), kinds).inputs
    order = [2, 0, 1]
    moved = encode(tiny.vlm, joined([alone[i] for i in order]), kinds).inputs
    assert list(both.signals) and set(both.signals) == set(kinds)
    for inputs in (both, moved, *singles):
        check_axes(inputs)
    for kind in kinds:
        for row, single in enumerate(singles):
            expected = real_part(kind, single.signal(kind), single, 0)
            for inputs, place in ((both, row), (moved, order.index(row))):
                got = real_part(kind, inputs.signal(kind), inputs, place)
                torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5, msg=lambda m, kind=kind: f"{kind}: {m}")
            assert kind == "frame" or expected.abs().max() > 0, kind


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_what_a_family_has_not_is_refused_in_one_line(name):
    tiny = tiny_family(name)
    batch = tiny.batch([Sample((LARGE,), 4)])
    refused = dict.fromkeys(set(KINDS) - set(kinds_of(name)), "no CLS token: use .* 'received_attention'")
    if name == "llava_onevision":
        refused |= dict.fromkeys(MAPS, "by interpolation.*'received_attention'")
    for kind in KINDS:
        if kind in refused:
            with pytest.raises(PruneZooError, match=refused[kind]) as error:
                encode(tiny.vlm, batch, (kind,))
            assert "\n" not in str(error.value)
    assert set(encode(tiny.vlm, batch, tuple(set(KINDS) - set(refused))).inputs.signals) == set(KINDS) - set(refused)


@pytest.mark.parametrize("name", VIDEO_FAMILIES)
@torch.no_grad()
def test_clips_have_frames(name):
    tiny = tiny_family(name)
    batch, others = tiny.batch(CLIPS), () if name.startswith("qwen") else MAPS
    inputs = encode(tiny.vlm, batch, tuple(kind for kind in kinds_of(name) if kind not in others)).inputs
    check_axes(inputs)
    frame, moving = inputs.signal("frame"), (inputs.cells[..., 0] > 1).any(1) | (inputs.valid.sum(1) > 30)
    clips = torch.tensor([False, True, True, False])
    assert len(moving) == 4 and torch.equal(frame[clips], inputs.cells[clips, :, 0].clamp_min(0))
    assert not frame[~clips].any() and (frame[clips].amax(1) >= 1).all()
    if others:
        with pytest.raises(PruneZooError, match="by interpolation"):
            encode(tiny.vlm, batch, MAPS)


class Reads(Pruner):
    """Keeps the tokens with the largest norm, in one stage or another, and reads what it is told to."""

    name = "reads"

    def __init__(self, stage, needs, *places):
        super().__init__()
        self.stage, self.needs, self.places = stage, needs, places

    def stages(self, depth):
        return self.places

    def score(self, inputs):
        return inputs.features.norm(dim=-1)


@torch.no_grad()
def test_the_vision_stage_reads_every_kind_of_a_block(deep_llava, mixed):
    """Behind a first cut only of the tokens that are left."""
    pruner = Reads("vision", INSIDE_SIGNALS, 0, 1)
    with Watch(pruner) as watch:
        encoded = encode(deep_llava.vlm, mixed, (), run_tower=False)
        run_pruned(deep_llava.vlm, encoded, pruner, torch.tensor([9, 9, 20, 9]))
    (first, _), (second, _) = watch.calls
    check_axes(first)
    check_axes(second)
    assert second.valid.shape[1] < first.valid.shape[1] == 36 and not second.valid.all()
    whole = encode(deep_llava.vlm, mixed, tuple(f"{kind}@0" for kind in INSIDE_SIGNALS)).inputs
    for kind in INSIDE_SIGNALS:
        torch.testing.assert_close(first.signal(kind), whole.signal(f"{kind}@0"), rtol=1e-4, atol=1e-5)
    rows = second.signal("vision_attention").masked_fill(~second.valid[:, None], 0).sum(2)
    assert (rows <= 1 + 1e-5).all() and (rows[second.valid] > 0.5).all()


@torch.no_grad()
def test_the_layer_stage_reads_every_kind_of_a_layer(deep_llava, mixed):
    """Of the layer in front of which it stands, of one before, and of one that ran on all tokens; the rest follows."""
    early = ("vision_attention", "vision_keys", "pixels", "frame", "relevance")
    at = tuple(kind + where for kind in DECODER_SIGNALS for where in ("", f"@{PREVIOUS}", "@0"))
    pruner = Reads("layer", (*early, *at), 1, 3)
    with Watch(pruner) as watch:
        encoded = encode(deep_llava.vlm, mixed, encode_needs(pruner))
        run_pruned(deep_llava.vlm, encoded, pruner, torch.tensor([3, 20, 1, 36]))
    (first, output), (second, _) = watch.calls
    check_axes(first)
    check_axes(second)
    assert set(encoded.inputs.signals) == set(early) and second.valid.shape[1] == 36 and not second.valid.all()
    rows = output.index[..., None]
    kept = first.signal("layer_attention@0").gather(1, rows.expand(-1, -1, 36)).gather(2, rows.mT.expand(-1, 36, -1))
    assert torch.equal(second.signal("layer_attention@0"), kept)
    pixels = [own[index] for own, index in zip(first.signal("pixels"), output.index, strict=True)]
    assert torch.equal(second.signal("pixels"), torch.stack(pixels))
    whole = encode(deep_llava.vlm, mixed, tuple(f"{kind}@1" for kind in DECODER_SIGNALS)).inputs
    for kind in DECODER_SIGNALS:
        torch.testing.assert_close(first.signal(kind), whole.signal(f"{kind}@1"), rtol=1e-4, atol=1e-5)
        if kind in (*STATE_KINDS, *WORD_KINDS):  # which see less than before
            assert not torch.equal(second.signal(kind), second.signal(f"{kind}@0"))


@torch.no_grad()
def test_signals_go_with_the_choices_of_a_group(deep_llava, mixed):
    kinds = tuple(kind for kind in KINDS if kind != "relevance")
    encoded = encode(deep_llava.vlm, mixed, kinds)
    many, source = repeat_samples(encoded, 2)
    check_axes(many.inputs)
    for kind in kinds:
        assert torch.equal(many.inputs.signal(kind), encoded.inputs.signal(kind)[source % len(encoded.sample)])
    group_forward(deep_llava.vlm, encoded, encoded.inputs.valid.expand(2, -1, -1))


def test_a_half_type_leaves_numbers_of_frames_alone(deep_llava):
    batch = deep_llava.batch([LONG, TWO, NONE], [[make_image(0)], [make_image(5), make_image(6)], []])
    inputs = encode(deep_llava.vlm, batch, ("frame", "pixels")).inputs.to(torch.bfloat16)
    assert inputs.signal("frame").dtype == torch.long and inputs.signal("pixels").dtype == torch.bfloat16


class Meant(Pruner):
    """Likes tokens whose first four numbers are like the question's."""

    name, needs = "meant", ("text_features",)

    def score(self, inputs):
        return torch.cosine_similarity(inputs.features[..., :4], inputs.signal("text_features")[:, None], dim=-1)


@torch.no_grad()
def test_a_text_encoder_is_given_and_reads_the_question(deep_llava):
    vlm, pictures = deep_llava.vlm, [[make_image(0)], [make_image(0)]]
    batch = deep_llava.batch([LONG, LONG.replace("left", "right")], pictures)
    seen = []

    def listen(ids, asked):
        seen.append((ids, asked))
        return mean_of_waves(ids, asked)

    inputs = encode_plain(vlm, batch, ("text_features",), text_encoder=listen).inputs
    ((ids, asked),) = seen
    assert torch.equal(ids, batch["input_ids"]) and not (asked & (ids == vlm.config.image_token_id)).any()
    assert torch.equal(inputs.signal("text_features"), mean_of_waves(ids, asked))
    with attach(vlm, Meant(), keep=9, text_encoder=listen) as run:
        logits = vlm(**batch).logits
    expected = run_pruned(vlm, encode(vlm, batch, ("text_features",)), Meant(), 9)
    assert torch.equal(logits, expected.host.logits) and run.stats.after == [9, 9]
    assert not torch.equal(expected.output.index[0], expected.output.index[1]), "the question makes a difference"
    wrongs = {
        "needs a text encoder": None,
        "must give floats": lambda ids, _: ids,
        r"gave torch.float32 \(1, 4\) for 2": lambda ids, asked: mean_of_waves(ids, asked)[:1],
    }
    for words, wrong in wrongs.items():
        with pytest.raises(PruneZooError, match=words), attach(vlm, Meant(), keep=9, text_encoder=wrong):
            vlm(**batch)
