"""Families beside LLaVA with CLIP, each as a tiny random model: vLLM answers as `attach` does.

In an environment of its own: `make test-serve`.
"""

from types import SimpleNamespace

import pytest
from families import FAMILIES
from serving import expect, requests, said, served

from prunezoo.serve.shapes import ALONE, AXES

pytest.importorskip("vllm", reason="`make test-serve` installs vLLM in an environment of its own")

KEEP, COUNT = 5, 12
RECEIVED = "fastervlm?attention=received"
PRUNERS = {
    "llava_siglip": RECEIVED,
    "llava_next": "fastervlm",
    "llava_onevision": "divprune",
    "qwen2_vl": RECEIVED,
    "qwen2_5_vl": "asked",
}
"""Pruners that look at features, at the tower's attention, and at the prompt."""
KINDS = {name: (1,) if name in ALONE else (1, 2) for name in PRUNERS}
CASES = [(name, pruner, images) for name, pruner in PRUNERS.items() for images in KINDS[name]]
OTHERS = [(name, "uniform", 1) for name in PRUNERS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def expected(folder, answers_folder):
    """By family, pruner and images of a prompt; makes the models."""
    jobs = [
        {"vlm": str(folder / name), "family": name, "pruner": pruner, "keep": KEEP, "positions": "original",
         "count": COUNT, "images": images}
        for name, pruner, images in CASES + OTHERS
    ]  # fmt: skip
    return dict(zip(CASES + OTHERS, expect(answers_folder, jobs), strict=True))


def test_all_that_are_served_are_here():
    assert set(PRUNERS) == set(AXES) - {"llava"} | {"llava_siglip"}


@pytest.mark.parametrize(("name", "pruner"), PRUNERS.items())
def test_served_answers_are_those_of_attach(name, pruner, folder, expected):
    """Pictures of several sizes, in steps that cut them, alone and two in a prompt, one of them in the cache."""
    from vllm.exceptions import VLLMValidationError

    small = {"max_num_batched_tokens": 32, "max_num_seqs": 4, "max_model_len": 256, "enable_chunked_prefill": True}
    vlm = str(folder / name)
    with served(vlm, pruner, KEEP, **small) as llm:
        for images in KINDS[name]:
            answers, lengths = said(llm, requests(vlm, COUNT, images, name))
            assert answers == expected[name, pruner, images]
            assert max(lengths) <= 10 + images * (KEEP + 10)
        if name in ALONE:
            with pytest.raises(VLLMValidationError, match="At most 1 image"):
                said(llm, requests(vlm, 1, 2, name))


def test_the_comparison_can_fail(expected):
    for name, pruner in PRUNERS.items():
        assert expected[name, pruner, 1] != expected[name, "uniform", 1]


@pytest.mark.parametrize(
    ("name", "positions", "message"),
    [
        ("qwen3_vl", "original", "model_type 'qwen3_vl' cannot be served: .*deepstack"),
        ("gemma3", "original", "model_type 'gemma3' cannot be served; llava, "),
        ("qwen2_5_vl", "compact", "serve Qwen2.5-VL with 'original'"),
    ],
)
def test_others_are_refused_by_name(name, positions, message):
    """In what vLLM calls while it reads its options."""
    from prunezoo.serve.config import ServedConfig

    config = FAMILIES[name].config()
    config.prunezoo = {"pruner": "uniform", "keep": 8, "positions": positions}
    with pytest.raises(ValueError, match=message):
        ServedConfig.verify_and_update_model_config(SimpleNamespace(hf_config=config, model="mine"))


@pytest.mark.parametrize(("kind", "served"), [("llava", True), ("llava_next", False), ("qwen2_5_vl", False)])
def test_several_processes_are_refused_where_they_are_not_tested(kind, served):
    from prunezoo.serve.config import ServedConfig

    config = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=SimpleNamespace(model_type=kind)),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, tensor_parallel_size=2),
        speculative_config=None,
        lora_config=None,
    )
    if served:
        ServedConfig.verify_and_update_config(config)
    else:
        with pytest.raises(ValueError, match=f"--tensor-parallel-size is not served with '{kind}'"):
            ServedConfig.verify_and_update_config(config)
