"""What can be served, and what is refused by name before anything starts; without vLLM."""

import sys
from contextlib import suppress
from types import SimpleNamespace

import pytest

from prunezoo import build_pruner, list_pruners
from prunezoo.core.errors import PruneZooError
from prunezoo.core.registry import pruner_class
from prunezoo.serve import engine_args
from prunezoo.serve.settings import Settings, check_served
from trainers import serve

SERVED = {
    "aptp", "asked", "budget", "cdpruner", "divprune", "fast3d", "fastervlm", "fopru", "hiprune", "holov", "m3",
    "mmtok", "optiprune", "policy", "pool", "ppm", "prumerge", "prumerge_plus", "random", "recoverable", "resize",
    "scope", "tail_drop", "token_correlation", "uniform", "visionzip", "vispruner",
}  # fmt: skip
REFUSED = [
    ("fastv", 64, "'fastv' cannot be served: it acts in the layer stage"),
    ("tome", 64, "'tome' cannot be served: it acts in the vision stage"),
    ("full", 64, "serve the model as it is, without prunezoo"),
    ("none", 64, "it decides itself how many tokens it keeps"),
    ("changed", 64, "it compares the images of a prompt or a stream"),
    ("checkpoints/explain-cnn-tiny", 64, "it needs 'prompt_head_attention', which only a pass of the language model"),
    ("checkpoints/m3-lora-tiny", 64, "it brings a LoRA of the language model; serve an m3 without one"),
    ("checkpoints/ppm-atp-tiny", 64, "it acts in the layer stage"),
    ("checkpoints/budget-tiny", "auto", "keep='auto' cannot be served"),
    ("checkpoints/budget-tiny", "auto:16", "keep='auto:16' cannot be served"),
    ("divprune", 0, "keep=0 is out of range"),
    ("divprune", "many", "keep='many' is none"),
    ("nothing/there", 64, "nothing/there"),
]


@pytest.mark.parametrize(("pruner", "keep", "message"), REFUSED, ids=str)
def test_what_cannot_be_served_is_refused_by_name(pruner, keep, message):
    with pytest.raises(PruneZooError) as caught:
        engine_args("V", pruner, keep)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("scaling", "served"), [("image", True), ("batch", False)])
def test_options_that_compare_the_images_of_a_batch_are_refused(scaling, served, tmp_path):
    build_pruner("cdpruner", scaling=scaling).save_pretrained(tmp_path / "mine")
    if served:
        assert engine_args("V", tmp_path / "mine", 64)["hf_overrides"]["prunezoo"]["keep"] == 64
    else:
        with pytest.raises(PruneZooError, match="'cdpruner' cannot be served: scaling='batch' compares the images"):
            engine_args("V", tmp_path / "mine", 64)


def test_every_method_is_served_or_refused_with_what_works_instead():
    served = set()
    for name in list_pruners():
        pruner = build_pruner(name, **pruner_class(name).tiny_config(32, 32))
        with suppress(PruneZooError):
            check_served(pruner)
            served.add(name)
        if name not in SERVED:
            with pytest.raises(PruneZooError, match=f"pruner '{name}' cannot be served: .*; serve "):
                check_served(pruner)
    assert served == SERVED


def test_arguments_of_the_engine_are_plain_and_read_again(tmp_path):
    build_pruner("uniform").save_pretrained(tmp_path / "mine")
    args = engine_args("org/model", tmp_path / "mine", "1/9", positions="compact")
    assert args["model"] == "org/model" and args["hf_overrides"]["architectures"] == [
        "PrunezooForConditionalGeneration"
    ]
    settings = Settings.of(SimpleNamespace(**args["hf_overrides"]))
    assert settings == Settings(str(tmp_path / "mine"), 1 / 9, "compact")
    assert settings.count(576) == 64 and settings.load().name == "uniform"


@pytest.mark.parametrize("given", [None, {}, {"pruner": "uniform"}, {"pruner": "uniform", "keep": 4, "keeep": 4}])
def test_settings_that_are_not_whole_are_refused(given):
    with pytest.raises(PruneZooError, match="--hf-overrides: 'prunezoo' must be an object of pruner, keep, positions"):
        Settings.of(SimpleNamespace(prunezoo=given))


def test_a_request_asks_for_at_most_what_the_server_keeps():
    settings = Settings("uniform", 16)
    assert [settings.count(144, asked) for asked in (None, 16, 5, 0.05, 1 / 9)] == [16, 16, 5, 7, 16]
    assert settings.count(9) == settings.count(9, 16) == 9
    for asked in (0, -1, 17, 0.5, 1.0, True, "4", None.__class__, [4], float("nan")):
        with pytest.raises(PruneZooError, match="keep"):
            settings.count(144, asked)


def test_the_command_prints_what_a_shell_hands_on_as_it_is(capsys, monkeypatch):
    assert serve.main("--pruner divprune --keep 64 --print-args --dtype float32".split()) == 0
    out, err = capsys.readouterr()
    assert out.split() == [
        "--hf-overrides.architectures+", "PrunezooForConditionalGeneration",
        "--hf-overrides.prunezoo.pruner", "divprune",
        "--hf-overrides.prunezoo.keep", "64",
        "--hf-overrides.prunezoo.positions", "original",
        "--dtype", "float32",
    ]  # fmt: skip
    assert not err
    assert serve.main("--pruner ppm --keep 1/9 --positions compact --print-args".split()) == 0
    out, err = capsys.readouterr()
    assert "/checkpoints/ppm-tiny" in out and err.startswith("note: 'ppm' reads the prompt: ")
    started: list[str] = []
    monkeypatch.setattr(serve, "start", started.extend)
    monkeypatch.setattr(serve, "find_spec", lambda name: name)
    assert serve.main("--vlm tiny-llava --pruner uniform --keep 8 --port 8001".split()) == 0
    assert started[:5] == [sys.executable, "-m", serve.SERVER, "--model", "checkpoints/tiny-llava"]
    assert started[-2:] == ["--port", "8001"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--pruner fastv --keep 64 --print-args", "pruner 'fastv' cannot be served: it acts in the layer stage"),
        ("--pruner pmm --keep 64 --print-args", "no pruner is called 'pmm'; did you mean 'ppm'?"),
        ("--pruner uniform --keep auto --print-args", "keep='auto' cannot be served"),
        ("--pruner uniform --keep 8 --positions other --print-args", "positions='other' is unknown"),
        ("--pruner uniform --keep 8", "--vlm is missing"),
    ],
)
def test_the_command_refuses_in_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        serve.main(words.split())
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and line.startswith("error: ") and message in line
