"""Records of evaluations, and publishing, for tests of cards and of the Hub."""

from pathlib import Path

import pytest
from measurements import measurement

from trainers import publish
from trainers.evaluation.record import build_record
from trainers.evaluation.scores import Measurement

SIZES = {"width": 32, "hidden": 16, "heads": 2, "blocks": 1, "text_blocks": 1}
"""Of a small PPM, or of any pruner with such a config."""


def record_of(name: str, digest: str | None, rival: str = "bad", **header: str) -> dict:
    """A record in which `name` is measured, with these weights."""
    names = {"good": name, "bad": rival}
    scores = {(names.get(p, p), k): s for (p, k), s in measurement().scores.items()}
    m = measurement()
    facts = {
        "vlm": "org/llava",
        "suite": "scenes",
        "split": "test",
        "seed": 0,
        "command": "python -m trainers.evaluate x",
    }
    return build_record(
        Measurement(m.groups, m.group_of, m.chance, scores), [name], {**facts, "weights": {name: digest}, **header}
    )


def publish_it(folder: Path, capsys, name: str = "org/ppm-test", *options: str) -> str:
    assert publish.main([str(folder), name, *options]) == 0
    return " ".join(capsys.readouterr().out.split())


def refused(folder: Path, capsys, name: str = "org/ppm-test") -> str:
    with pytest.raises(SystemExit) as caught:
        publish.main([str(folder), name])
    assert caught.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]  # the client may log its own tries before
