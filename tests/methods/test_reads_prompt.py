"""What `reads_prompt` promises of every method: without it, no word of the prompt changes what is kept of an image."""

from dataclasses import replace

import pytest
import torch
from made_inputs import ALL, DIM, TEXT, make_inputs

from prunezoo.core.choosing import FROM_PROMPT
from prunezoo.core.registry import build_pruner, pruner_class
from prunezoo.core.signals import parse_signal

VARIANTS = [
    *((name, {}) for name in ALL),
    *((name, {"query_aware": False}) for name in ("ppm", "policy", "tail_drop")),
    ("hiprune", {"text": 0.5}),
    ("budget", {"inner": "uniform", "inner_config": {}}),
]


def make(name, options):
    torch.manual_seed(0)
    return build_pruner(name, **{**pruner_class(name).tiny_config(DIM, TEXT), **options}).eval()


def other_prompts(inputs, seed):
    """The same images with other words, and other values of what comes from the prompt."""
    random = torch.Generator().manual_seed(seed)
    signals = {
        name: value[..., torch.randperm(value.shape[-1], generator=random)] * torch.rand(value.shape, generator=random)
        if parse_signal(name).kind in FROM_PROMPT
        else value
        for name, value in inputs.signals.items()
    }
    return replace(inputs, text=torch.randn(inputs.text.shape, generator=random), signals=signals)


def kept(pruner, inputs):
    """At its last stage: at the first some go by the grid alone."""
    output = pruner(replace(inputs, step=max(len(pruner.stages(64)) - 1, 0)), 6)
    tokens = output.kept_features(inputs).masked_fill(~output.valid[..., None], 0)
    return output.index.tolist(), tokens.tolist()


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=str)
def test_another_question_keeps_other_tokens_only_where_a_pruner_says_so(name, options):
    pruner, inputs = make(name, options), make_inputs()
    if name == "todre":  # which asks whether an attention, such as a model has it, is below a threshold
        attention = inputs.signals["prompt_attention"].masked_fill(~inputs.valid, 0)
        inputs = replace(
            inputs, signals={**inputs.signals, "prompt_attention": 3 * attention / attention.sum(1)[:, None]}
        )
    found = kept(pruner, inputs)
    others = [kept(pruner, other_prompts(inputs, seed)) for seed in range(6)]
    assert any(other != found for other in others) is pruner.reads_prompt
    if not pruner.reads_prompt:
        assert kept(pruner, replace(inputs, text=None, text_valid=None)) == found


def test_some_read_and_some_do_not():
    said = {(name, *options): make(name, options).reads_prompt for name, options in VARIANTS}
    assert said["ppm",] and said["asked",] and not said["ppm", "query_aware"] and not said["m3",]
    assert sum(said.values()) > 5 and sum(not value for value in said.values()) > 5
