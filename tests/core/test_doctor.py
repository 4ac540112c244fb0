"""What the doctor says of a model is what `attach` does there; the command `prunezoo`."""

import copy

import pytest
import torch
from tiny_llava import SHORT, make_image

import prunezoo
from prunezoo import attach, build_pruner, doctor, list_pruners
from prunezoo.command import example, main
from prunezoo.core.errors import PruneZooError
from prunezoo.core.hub import version
from prunezoo.doctor import small_pruner
from trainers.cli.names import has_weights
from trainers.serve import main as serve


@pytest.fixture(scope="module")
def batch(tiny_llava):
    return tiny_llava.batch([SHORT], [[make_image(0)]])


@pytest.fixture(scope="module")
def found(tiny_llava, batch):
    return doctor(tiny_llava.vlm, batch)


def test_every_method_is_tried_and_the_model_is_as_before(tiny_llava, batch, found):
    assert {finding.method for finding in found.findings} == set(list_pruners()) - {"full", "none", "combined"}
    assert found.tried and found.family == "LLaVA" and "divprune" in found.working
    assert not tiny_llava.vlm._forward_pre_hooks and "generate" not in vars(tiny_llava.vlm)
    for finding in found.findings:
        assert finding.learned == has_weights(finding.method), finding
        assert finding.works == (finding.why == "")


def test_what_it_says_is_what_attach_does(tiny_llava, batch, found):
    """The model has two decoder layers: methods that act deeper are refused, in the words of `attach`."""
    refused = {finding.method: finding.why for finding in found.findings if not finding.works}
    assert "fastv" in refused and "corematching" in refused and len(refused) < len(found.findings) / 2
    for method in (*refused, "divprune", "ppm", "tome"):
        said = ""
        try:
            with attach(tiny_llava.vlm, small_pruner(method, 32, 24), 0.5), torch.no_grad():
                tiny_llava.vlm(**batch)
        except PruneZooError as error:
            said = " ".join(str(error).split())
        assert refused.get(method, "") == said


def test_without_inputs_less_is_known_and_that_is_said(tiny_llava, found):
    shallow = doctor(tiny_llava.vlm)
    assert not shallow.tried and set(shallow.working) >= set(found.working)
    assert "not run: give inputs to be sure" in str(shallow) and "run under each" in str(found)
    lines = str(found).splitlines()
    assert lines[0] == (
        f"LlavaForConditionalGeneration (LLaVA): {len(found.working)} of {len(found.findings)} methods work "
        "(run under each)"
    )
    assert len(lines) == 1 + len(found.findings) and any("no   pruner 'fastv'" in line for line in lines)


def test_a_model_that_nobody_knows_and_one_that_breaks(tiny_llava, batch):
    unknown = doctor(torch.nn.Linear(2, 2))
    assert not unknown.working and "is not supported; supported: LLaVA" in str(unknown)
    broken = copy.deepcopy(tiny_llava.vlm)
    broken.model.language_model.forward = None
    why = {finding.method: finding.why for finding in doctor(broken, batch).findings}
    assert why["divprune"].startswith("failed with TypeError: ")


def test_the_version_is_the_distributions(capsys):
    assert prunezoo.__version__ == version()
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"prunezoo {version()}\n"


def test_the_command_lists_methods(capsys):
    assert main(["list"]) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines()}
    assert set(lines) == set(list_pruners())
    assert lines["divprune"][1:3] == ["prompt", "ready"] and lines["ppm"][1:3] == ["prompt", "learned"]
    for name in list_pruners():
        assert (lines[name][2] == "learned") == has_weights(name), name
    assert main(["list", "divprune"]) == 0
    assert "arxiv.org/abs/" in capsys.readouterr().out


def test_the_command_checks_a_model_and_writes_what_serves(tiny_llava_folder, tiny_llava, capsys):
    assert main(["attach-check", str(tiny_llava_folder), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "methods work (run under each)" in out and "prompt  divprune         yes  (ready)" in out
    assert tiny_llava.vlm(**example(tiny_llava.processor, tiny_llava.vlm)).logits.isfinite().all()
    assert main(["serve-args", "divprune", "--keep", "1/9"]) == 0
    own = capsys.readouterr().out
    assert serve(["--pruner", "divprune", "--keep", "1/9", "--print-args"]) == 0
    assert capsys.readouterr().out == own


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["attach-check", "no/where/at/all"], "error: no/where/at/all: not a loadable image-text-to-text model"),
        (["attach-check", "x", "--keep", "few"], "error: "),
        (["list", "divprun"], "error: unknown pruner 'divprun'; did you mean 'divprune'?"),
        (["serve-args", "fastv", "--keep", "64"], "error: pruner 'fastv' cannot be served"),
    ],
)
def test_mistakes_are_one_line(words, message, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1


def test_small_instances_are_of_the_models_width():
    assert small_pruner("ppm", 48).config.width == 48
    assert small_pruner("divprune", 48).config == build_pruner("divprune").config
