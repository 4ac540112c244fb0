"""Methods of the CLS token on a tower that has none: refused with what works, and what is said there works."""

import pytest
import torch
from families import LARGE, Sample, tiny_family

from prunezoo import PruneZooError, attach, list_pruners
from prunezoo.core.registry import pruner_class

OPTIONAL = [name for name in list_pruners() if "attention" in pruner_class(name).config_class.__dataclass_fields__]


def prefill(tiny, name, **fields):
    cls = pruner_class(name)
    width = tiny.vlm.config.get_text_config().hidden_size
    with attach(tiny.vlm, cls(**cls.tiny_config(width, width), **fields).eval(), keep=4) as run:
        logits = tiny.vlm(**tiny.batch([Sample((LARGE,), 5)])).logits
    return logits, run.stats


def test_there_are_some():
    assert {"fastervlm", "holov", "vispruner", "visionzip"} <= set(OPTIONAL)


@pytest.mark.parametrize("name", OPTIONAL)
@torch.no_grad()
def test_a_method_of_cls_names_what_works_without_it(name):
    tiny, fields = tiny_family("llava_siglip"), pruner_class(name).config_class.__dataclass_fields__
    others = {"block": "projected"} if "block" in fields and fields["block"].type is str else {}
    # the one behind it is not there either
    if fields["attention"].default == "received":
        with pytest.raises(PruneZooError, match="no CLS token: "):
            prefill(tiny, name, attention="cls", **others)
        assert prefill(tiny, name)[0].isfinite().all()
        return
    with pytest.raises(PruneZooError, match=r"no CLS token: .*option attention=received$"):
        prefill(tiny, name, **others)
    logits, stats = prefill(tiny, name, attention="received", **others)
    # of several stages `keep` is the mean
    assert logits.isfinite().all() and stats.after <= [4] and stats.after != stats.before


@torch.no_grad()
def test_the_method_that_is_named_works():
    assert prefill(tiny_family("llava_siglip"), "hiprune")[1].after == [4]
