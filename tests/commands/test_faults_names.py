"""A name that a user mistypes is answered by the nearest one, wherever it is typed; a width that a user leaves out is
the model's."""

import pytest
from tiny_llava import SHORT, make_image
from trainings import words

from prunezoo import PruneZooError, attach, build_pruner, encode, list_pruners
from prunezoo.core.config import fit_width
from prunezoo.core.registry import load_pruner, pruner_class
from prunezoo.core.signals import parse_signal
from prunezoo.learned.budget import BudgetPolicy
from prunezoo.learned.ppm import PPM
from prunezoo.lmms import PruneZooModel
from trainers import fit
from trainers.benchmarking.models import load_for_timing, load_model
from trainers.cli.names import find_config, find_folder, find_pruner, find_vlm
from trainers.data.suite import load_suite
from trainers.evaluation.methods import build_method
from trainers.training.distill import DistillModule

NEAREST = {
    "attach": ("divprune", lambda vlm: attach(vlm, "divprnue", 4)),
    "attach, options": ("metric", lambda vlm: attach(vlm, "tome?metirc=keys", 4)),
    "load_pruner": ("uniform", lambda _: load_pruner("unifrom")),
    "build_pruner": ("visionzip", lambda _: build_pruner("visonzip")),
    "pruner_class": ("ppm", lambda _: pruner_class("pmp")),
    "a value": ("mmr", lambda _: load_pruner("uniform?select=mrm")),
    "a value of a config": ("cls", lambda _: build_pruner("visionzip", attention="cl")),
    "a value of tome": ("keys", lambda _: build_pruner("tome", metric="keyes")),
    "a value of feather": ("images", lambda _: build_pruner("feather", softmax="imgaes")),
    "a value of lvlm_csp": ("last", lambda _: build_pruner("lvlm_csp", states="lsat")),
    "positions": ("compact", lambda vlm: attach(vlm, "uniform", 4, "compcat")),  # type: ignore[arg-type]
    "signals": ("vision_keys", lambda _: parse_signal("vison_keys")),
    "signals of encode": ("last_attention", lambda vlm: encode(vlm, {}, ("last_atention@1",))),
    "config": ("hidden", lambda _: PPM(hiden=3)),
    "suite": ("scenes", lambda _: load_suite("sceens")),
    "option of a suite": ("root", lambda _: load_suite("photo-grid", roto="x")),
    "evaluate": ("uniform", lambda _: build_method("unifrom")),
    "command": ("ppm", lambda _: find_pruner("pmm")),
    "folder": ("ppm", lambda _: find_folder("pmm")),
    "model": ("tiny-llava", lambda _: find_vlm("tiny-lava")),
    "recipe": ("ppm_tiny", lambda _: find_config("ppm_tyni")),
    "size of a model": ("random:llava-7b", lambda _: load_model("random:lava-7b", "cpu", "float32")),
    "lmms-eval": ("positions", lambda _: PruneZooModel("nowhere", postions="compact")),
}


@pytest.mark.parametrize("place", NEAREST)
def test_the_nearest_name_is_said(place, tiny_llava):
    nearest, call = NEAREST[place]
    with pytest.raises(PruneZooError, match=f"did you mean '{nearest}'") as caught:
        call(tiny_llava.vlm)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "nearest"),
    [
        ("--model.warm_pu=0.1", "warm_up"),
        ("--data.batch_sise=2", "batch_size"),
        ("--trainer.max_stpes=2", "max_steps"),
        ("--checkpoint.evry_n_train_steps=2", "every_n_train_steps"),
        ("--model.pruner.config.hiden=2", "hidden"),
    ],
)
def test_keys_of_recipes(option, nearest, world, tiny_llava_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["fit"])
    with pytest.raises(PruneZooError, match=f"did you mean '{nearest}'") as caught:
        fit.build([*words(world, tiny_llava_folder, tmp_path / "out"), option])
    assert "\n" not in str(caught.value)


# Widths


def without_width(value):
    """Config fields without any width, however deep."""
    if isinstance(value, dict):
        return {key: without_width(inner) for key, inner in value.items() if key != "width"}
    return type(value)(map(without_width, value)) if isinstance(value, list | tuple) else value


def widths(value):
    """All widths of a config."""
    if isinstance(value, dict):
        own = [value["width"]] if "width" in value else []
        return own + [width for inner in value.values() for width in widths(inner)]
    return [width for inner in value for width in widths(inner)] if isinstance(value, list | tuple) else []


TINY = {name: pruner_class(name).tiny_config(32, 32) for name in list_pruners()}
WIDE = [name for name, fields in TINY.items() if widths(build_pruner(name, **fields).config.to_dict())]


def test_methods_with_a_width_are_known():
    assert {"ppm", "m3", "tail_drop", "policy", "atp", "budget", "combined"} <= set(WIDE)


@pytest.mark.parametrize("name", WIDE)
def test_the_width_is_the_models_where_it_is_not_said(name, tiny_llava, tiny_llava_folder):
    width = tiny_llava.vlm.config.get_text_config().hidden_size
    fields = without_width(pruner_class(name).tiny_config(width, width))
    built = build_pruner(name, vlm=tiny_llava.vlm, **fields)
    assert set(widths(built.config.to_dict())) == {width}
    module = DistillModule(str(tiny_llava_folder), pruner_class(name)(**fields), guide_share=0.0, guide_weight=0.0)
    assert set(widths(module.pruner.config.to_dict())) == {width} and type(module.pruner) is type(built)
    for pruner in (built, module.pruner):
        pruner.base_model = None
        with attach(tiny_llava.vlm, pruner, keep=9) as run:
            tiny_llava.vlm(**tiny_llava.batch([SHORT], [[make_image(0)]]))
        assert run.stats.after


@pytest.mark.parametrize("name", [name for name in WIDE if name not in ("combined",)])
def test_the_width_in_a_benchmark(name, tiny_llava):
    """`combined` has no sizes of its own to be timed by."""
    width = tiny_llava.vlm.config.get_text_config().hidden_size
    assert set(widths(load_for_timing(name, width).config.to_dict())) == {width}


def test_a_width_that_is_said_stays(tiny_llava):
    assert build_pruner("ppm", vlm=tiny_llava.vlm, width=64, hidden=16, heads=2).config.width == 64
    pruner = PPM(width=64, hidden=16, heads=2)
    assert fit_width(pruner, 32) is pruner
    inner = BudgetPolicy(inner_config={"width": 64, "hidden": 16, "heads": 2}, reader_config={"hidden": 16, "heads": 2})
    assert fit_width(inner, 32).config.inner_config["width"] == 64 and fit_width(inner, 32).reader.config.width == 32


def test_a_recipe_without_width(world, tiny_llava_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["fit"])
    said = [word for word in words(world, tiny_llava_folder, tmp_path / "out") if "config.width" not in word]
    cli = fit.build([*said, "--model.pruner.config={hidden: 16, heads: 2, blocks: 1, text_blocks: 1}"])
    assert cli.model.pruner.config.width == 32
