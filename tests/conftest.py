"""Tiny random models of the supported families, made once a session."""

import pytest
import torch
from hub_server import hub  # noqa: F401 - a fixture
from tiny_llava import (
    EOS,
    LONG,
    NONE,
    SHORT,
    SPECIAL,
    TWO,
    load_llava,
    make_image,
    make_llava,
    make_processor,
    save_llava,
)
from trainings import world  # noqa: F401 - a fixture


@pytest.fixture(scope="session")
def tiny_llava_folder(tmp_path_factory):
    return save_llava(tmp_path_factory.mktemp("tiny-llava"))


@pytest.fixture(scope="session")
def tiny_llava(tiny_llava_folder):
    return load_llava(tiny_llava_folder)


@pytest.fixture(scope="session")
def deep_llava(tmp_path_factory):
    """As `tiny_llava`, with decoder layers enough for several stages between them."""
    return load_llava(save_llava(tmp_path_factory.mktemp("deep-llava"), num_hidden_layers=4))


@pytest.fixture(scope="session")
def ending_llava():
    """A random model that likes to end its answers, so that greedy decoding writes short answers and stops."""
    vlm = make_llava(seed=3)
    with torch.no_grad():
        special = torch.arange(len(SPECIAL))[:, None]  # other special tokens than the end are no words of an answer
        vlm.lm_head.weight[: len(SPECIAL)] *= torch.where(special == EOS, 2.0, 0.0)
    vlm.generation_config.eos_token_id = EOS
    vlm.generation_config.pad_token_id = 0
    return vlm, make_processor()


@pytest.fixture
def mixed(deep_llava):
    """A batch for `deep_llava`: prompts with one image, two, none, and one."""
    images = [[make_image(0)], [make_image(5), make_image(6)], [], [make_image(1)]]
    return deep_llava.batch([LONG, TWO, NONE, SHORT], images)
