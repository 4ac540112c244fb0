"""Every method against what its authors' own functions chose; see `tests/helpers/golden`."""

import json
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "golden"
OTHERWISE = {"feather": "on a model, in test_golden_feather.py"}
FILES = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}
CASES = [(name, number) for name in FILES if name not in OTHERWISE for number in range(len(FILES[name]["outputs"]))]


def flat(value):
    """The numbers, words and None of a nested answer, in order, each with the way that leads to it."""
    if isinstance(value, dict):
        return [(f"{key}.{way}", leaf) for key in sorted(value) for way, leaf in flat(value[key])]
    if isinstance(value, list | tuple):
        return [(f"{at}.{way}", leaf) for at, item in enumerate(value) for way, leaf in flat(item)]
    return [("", value)]


@pytest.mark.parametrize(("name", "number"), CASES, ids=lambda part: str(part))
def test_the_authors_functions_choose_the_same(name, number):
    case, method = FILES[name]["outputs"][number], import_module(f"golden.{name}")
    found = method.answer(case)
    expected = {key: value for key, value in case.items() if key not in method.INPUTS}
    assert set(found) == set(expected), "a golden case is answered whole"
    for key in expected:
        ours, theirs = flat(found[key]), flat(expected[key])
        digits = getattr(method, "ROUNDED", {}).get(key, 5)
        precision = 1e-5 if digits >= 5 else 1.01 * 10**-digits
        assert [way for way, _ in ours] == [way for way, _ in theirs], key
        for (way, our), (_, their) in zip(ours, theirs, strict=True):
            close = isinstance(their, float) and np.isclose(our, their, rtol=1e-5, atol=precision)
            assert our == their or close, f"{key}.{way}: {our}, theirs {their}"


def test_every_file_is_answered():
    answers = {path.stem for path in (Path(__file__).parents[1] / "helpers" / "golden").glob("[a-z]*.py")}
    assert answers == set(FILES) - set(OTHERWISE)
