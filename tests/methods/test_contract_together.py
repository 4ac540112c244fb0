"""Methods that see the images of one prompt at once: by `sample`, and no further."""

from dataclasses import fields, replace

import pytest
import torch
from made_inputs import DIM, TEXT, make_inputs, same, take_rows
from tiny_llava import SHORT, TWO, make_image

from prunezoo import attach, encode, list_pruners
from prunezoo.core.registry import pruner_class
from prunezoo.host import encode_needs, run_pruned


def build(name, **config):
    torch.manual_seed(0)
    cls = pruner_class(name)
    return cls(**{**cls.tiny_config(DIM, TEXT), **config}).eval()


TOGETHER = [
    name
    for name in list_pruners()
    if pruner_class(name).together is True or "together" in {f.name for f in fields(pruner_class(name).config_class)}
]


def together(name):
    pruner = build(name, **({} if pruner_class(name).together is True else {"together": True}))
    assert pruner.together
    return pruner


@pytest.mark.parametrize("name", TOGETHER)
def test_images_of_one_prompt_see_each_other_and_no_others(name):
    inputs = replace(make_inputs(grids=((6, 6), (6, 6), (3, 7))), sample=torch.tensor([0, 0, 1]))
    inputs.features[1, :30] = inputs.features[0, 6:36]  # much of the same picture
    pruner = together(name)
    whole = pruner(inputs, 7)
    assert whole.counts == (7, 7, 7)
    for rows, sample in (([2], [0]), ([1, 0], [3, 3])):  # each prompt as if it were alone, its images in any order
        part = replace(take_rows(inputs, rows), sample=torch.tensor(sample))
        alone = pruner(part, 7)
        for place, row in enumerate(rows):
            same(whole, alone, row, place, whole.kept_features(inputs), alone.kept_features(part))
    # and it makes a difference
    apart = pruner(replace(inputs, sample=torch.arange(3)), 7)
    assert not torch.equal(whole.index[:2], apart.index[:2]) and torch.equal(whole.index[2], apart.index[2])


@pytest.mark.parametrize("name", TOGETHER)
def test_in_a_model_a_prompt_is_as_if_it_were_alone(name, deep_llava):
    vlm, pruner = deep_llava.vlm, together(name)
    pictures = [make_image(0), make_image(0)]
    batch = deep_llava.batch([TWO, SHORT], [pictures, [make_image(1)]])
    encoded = encode(vlm, batch, encode_needs(pruner))
    assert encoded.inputs.sample.tolist() == [0, 0, 1] and encoded.inputs.counts == (36, 36, 36)
    run = run_pruned(vlm, encoded, pruner, 9)
    alone = run_pruned(vlm, encode(vlm, deep_llava.batch([TWO], [pictures]), encode_needs(pruner)), pruner, 9)
    assert torch.equal(run.output.index[:2], alone.output.index)
    with torch.no_grad(), attach(vlm, pruner, keep=9):
        logits = vlm(**batch).logits[:, -1]
    torch.testing.assert_close(logits, run.host.logits[:, -1], rtol=0, atol=1e-5)


def test_some_method_does():
    assert "divprune" in TOGETHER and not build("divprune").together
