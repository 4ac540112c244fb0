"""The environment of vLLM, which reads it when it is imported."""

import os

import pytest
from serving import ENVIRONMENT, ROOT

os.environ.update(ENVIRONMENT)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="session")
def answers_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("answers")
