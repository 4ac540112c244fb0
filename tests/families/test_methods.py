"""Every method on every family: a matrix, from which docs/families.md is made.

Ids read ``FAMILY-METHOD``; each cell records its outcome, "yes" or "refused: why". The models are tiny and random, but
as deep as real ones, since some methods act at layers by number.

Of the newer families one of each new kind of decoder runs all methods of the prompt and layer stage: DECODERS. The
others run SOME, since a method sees of a family only tokens, layers and signals, and these are of one of the kinds.
"""

from functools import cache

import pytest
import torch
from families import ALL, FAMILIES, LARGE, NEWER, Sample

from prunezoo import PruneZooError, attach, list_pruners
from prunezoo.core.registry import pruner_class
from prunezoo.host.families.base import TAKES_FEATURES
from trainers.benchmarking.models import load_for_timing
from trainers.cli.names import has_weights

DEPTH = 28
METHODS = [name for name in list_pruners() if name not in ("full", "none", "combined")]
"""Not those that every table has beside them, nor several of these at once."""
DECODERS = {
    "qwen3_5": "layers with a state",
    "qwen3_vl_moe": "deepstack",
    "gemma4": "sliding windows, inputs by layer",
    "kimi_k25": "MLA",
    "glm4v_moe": "experts",
}
SOME = ("random", "resize", "withdraw")
VARIANTS = ("gemma4_blocks", "gemma4_shared", "mistral3_ministral3")
CELLS = [(name, method) for name in FAMILIES for method in METHODS]
CELLS += [
    (name, method) for name in NEWER if name in DECODERS for method in METHODS if pruner_class(method).stage != "vision"
]
CELLS += [(name, method) for name in NEWER if name not in (*DECODERS, *VARIANTS) for method in SOME]


@cache
def deep(name):
    """A family whose model has DEPTH decoder layers."""
    family = type(ALL[name])()
    shallow = family.config()
    given = shallow.get_text_config()
    lists = {
        key
        for key, value in given.to_dict().items()
        if isinstance(value, list) and len(value) == given.num_hidden_layers
    }
    text = {key: value for key, value in given.to_dict().items() if key not in lists | {"per_layer_config"}}
    if isinstance(given.to_dict().get("mlp_layer_types"), list):  # which not every config makes of the depth
        kinds = given.mlp_layer_types
        text["mlp_layer_types"] = [*kinds, *kinds[-1:] * (DEPTH - len(kinds))]
    shallow.text_config = type(given)(**{**text, "num_hidden_layers": DEPTH})
    family.config = lambda: shallow
    return family


def build(method, config):
    """A method as a command builds it; one that is learned untrained, for the widths of this model."""
    width = config.get_text_config().hidden_size
    cls = pruner_class(method)
    torch.manual_seed(0)
    if method == "budget":  # its width is that of the pruner inside
        return cls(**cls.tiny_config(width, width)).eval()
    return load_for_timing(method, width, getattr(config.vision_config, "hidden_size", None))


@pytest.mark.parametrize(("name", "method"), CELLS)
@torch.no_grad()
def test_methods(name, method, record_property):
    family = deep(name)
    batch = family.batch([Sample((LARGE,), 5)])
    outcome = "yes"
    try:
        with attach(family.vlm, build(method, family.vlm.config), 0.5) as run:
            logits = family.vlm(**batch).logits
        assert logits[:, -1].isfinite().all()
        assert run.stats.after < run.stats.before or pruner_class(method).restore
    except PruneZooError as error:
        outcome = f"refused: {error}"
    record_property("outcome", outcome)
    if not TAKES_FEATURES and "transformers 5.19 or later" in outcome:
        return
    if name in NEWER and "signals of layers are not supported for decoder" in outcome:
        return
    if "cannot act inside this vision tower" in outcome:  # nor can one be trained for it
        return
    if pruner_class(method).stage == "input" and ("of its patches only" in outcome or "before the tower" in outcome):
        return  # one is not trained for a model, but for pages
    if pruner_class(method).stage == "vision" and "would leak into others" in outcome:
        return  # with smaller pictures it can
    if (
        "this vision tower has no CLS token" in outcome
        and "attention" in pruner_class(method).config_class.__annotations__
    ):
        return  # with its other setting it can
    assert outcome == "yes" or not has_weights(method), outcome  # what is trained for a model can be had with it
