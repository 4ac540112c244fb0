"""A small trained pruner, as it is published."""

import json
from pathlib import Path

import pytest
from records import SIZES, record_of

from prunezoo.core.registry import build_pruner
from trainers.cards.cards import write_card
from trainers.cards.parts import weights_digest


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folder = tmp_path / "ppm-test"
    build_pruner("ppm", **SIZES).save_pretrained(folder)
    run: dict[str, object] = {
        "command": "python -m trainers.fit --config c.yaml",
        "vlm": "org/llava",
        "data": "SuiteDataModule(scenes)",
    }
    run |= {"seed": 1, "steps": 30, "seconds": 90.0, "device": "CPU", "processes": 1, "recipe": "seed_everything: 1\n"}
    (folder / "run.json").write_text(json.dumps(run))
    return folder


@pytest.fixture
def published(checkpoint) -> Path:
    """A checkpoint with its card."""
    write_card(checkpoint, record_of(str(checkpoint), weights_digest(checkpoint)))
    return checkpoint
