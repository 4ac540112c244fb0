"""The timed walk runs what a page says, in order and in the right folder, and stops where it fails."""

import pytest

from prunezoo.core.errors import PruneZooError
from trainers.cli.names import ROOT
from trainers.upkeep.walk import ADDRESS, CLONE, Step, record_of, steps_of, walk, walk_section

PAGE = f"""
## Install
```bash install
mkdir {CLONE} && echo {ADDRESS} > {CLONE}/address
```
## Use
```python
x = 1
```
```bash gpu
false
```
```python
print(x + 1)
```
## Measure
```bash
cat address
grep -q https address
```
"""


def test_a_page_is_walked_in_order(tmp_path, capfd):
    seen, where = [], "file:///here"
    walking = walk(PAGE, tmp_path, where)
    for step, seconds in (next(walking) for _ in range(4)):
        assert seconds > 0
        seen.append((step.heading, step.language))
    with pytest.raises(PruneZooError, match=r"README.md, Measure: `grep -q https address` ended with code 1"):
        next(walking)
    assert seen == [("Install", "bash"), ("Use", "python"), ("Use", "python"), ("Measure", "bash")]
    assert capfd.readouterr().out.splitlines() == ["2", where]


def test_what_was_walked_becomes_a_table():
    clone = Step("Install", "bash", f"git clone {ADDRESS} x && cd x && make install", True)
    fit = Step("Train", "bash", "python -m trainers.fit --config a.yaml", False)
    record = record_of([(clone, 90.04), (Step("Use", "python", "x = 1", False), 5.0), (fit, 25.0)], "2.9+cpu", 0.52)
    lines = walk_section(record).splitlines()
    assert lines[2:5] == [
        "| Install | `git clone && cd x && make install` | 90.0 |",
        "| Use | `the Python of README` | 5.0 |",
        "| Train | `python -m trainers.fit` | 25.0 |",
    ]
    assert lines[6].startswith("2.0 minutes in all on a ") and ADDRESS not in str(record)
    assert "torch 2.9+cpu" in lines[6] and "a load of 0.5" in lines[6]


def test_the_readme_has_every_step_of_a_newcomer():
    steps = [step.text for step in steps_of((ROOT / "README.md").read_text("utf-8"))]
    wanted = (
        "pip install git+",
        "git clone",
        "divprune",
        "AutoPruner",
        "trainers.fit",
        "--suite llava-json",
        "trainers.publish",
    )
    places = [next(number for number, text in enumerate(steps) if part in text) for part in wanted]
    assert places == sorted(places)
    assert [step for step in steps if "trainers.fit" in step and "max_steps=20" in step]
    assert [step for step in steps if "trainers.publish" in step and "--dry-run" in step]
