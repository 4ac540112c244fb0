"""How `trainers/` is laid out: commands on top, rooms below; who may import whom; and no file of all is too long."""

import ast
from collections import Counter
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from trainers.cli.names import ROOT
from trainers.cli.options import OPTIONS

TRAINERS = ROOT / "trainers"
COMMANDS = [
    *"fit calibrate evaluate benchmark harness show list publish plan schedule search select slim".split(),
    *"teacher codec stop_rule pretrain demo serve".split(),
]
MOST_LINES = 350


def module_of(path: Path) -> str:
    """`trainers/data/suite.py` is `trainers.data.suite`, a package's `__init__.py` the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(TRAINERS.rglob("*.py"))}


@cache
def imports(name: str) -> frozenset[str]:
    """The modules of `trainers` that one of them imports, wherever in its text."""
    package = name if MODULES[name].stem == "__init__" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            found |= {inner if (inner := f"{base}.{alias.name}") in MODULES else base for alias in node.names}
    return frozenset(found & MODULES.keys() - {name})


def test_the_files_on_top_are_the_commands():
    names = {path.stem for path in TRAINERS.glob("*.py")}
    assert names == {*COMMANDS, "__init__", "__main__"}
    assert (TRAINERS / "cards" / "__main__.py").is_file()  # a command and a room
    for path in (*(TRAINERS / f"{name}.py" for name in COMMANDS), TRAINERS / "cards" / "__main__.py"):
        assert "\n@command\ndef main(" in path.read_text("utf-8"), path


def test_imports_are_read():
    """Else the tests below would prove nothing."""
    assert {"trainers.cli.errors", "trainers.fit", "trainers.caches.vlm_cache"} <= imports("trainers.teacher")
    assert "trainers.training.frozen" in imports("trainers.training.distill")  # relative
    assert "trainers.data" in imports("trainers.data.suite")  # in a function


@pytest.mark.parametrize("name", MODULES)
def test_no_room_imports_a_command(name):
    if name.count(".") > 1:
        assert not imports(name) & {f"trainers.{command}" for command in COMMANDS}


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("trainers.training.")])
def test_what_is_trained_knows_nothing_of_caches(name):
    assert not [other for other in imports(name) if other.startswith("trainers.caches")]


@pytest.mark.parametrize("name", MODULES)
def test_options_that_several_commands_have_are_defined_once(name):
    calls = [node for node in ast.walk(ast.parse(MODULES[name].read_text("utf-8"))) if isinstance(node, ast.Call)]
    own = {
        node.args[0].value.removeprefix("--")
        for node in calls
        if isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument"
        if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str)
    }
    # a key of a recipe rather than an option
    lightnings = {"pruner"} if name in ("trainers.stop_rule", "trainers.slim") else set()
    assert own & OPTIONS.keys() == lightnings


def test_imports_make_no_circle():
    packages = {name for name, path in MODULES.items() if path.stem == "__init__"}  # docstrings, but for data's
    TopologicalSorter({name: imports(name) - packages for name in MODULES}).prepare()


@pytest.mark.parametrize("folder", ["trainers", "tests", "modules"])
def test_no_file_is_too_long(folder):
    sizes = {path: len(path.read_text("utf-8").splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert len(sizes) > 50
    assert {str(path.relative_to(ROOT)): size for path, size in sizes.items() if size > MOST_LINES} == {}


def test_no_two_test_files_have_one_name():
    """Pytest imports them by their names alone: of two, the second is no longer collected once the first has been."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(names) > 50
    assert [name for name, times in names.items() if times > 1] == []
