"""Imports of the package run downwards only: read from the source, so that a lazy import counts as well."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent.parent / "modules" / "prunezoo"
NAMES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
FLOORS = (
    "prunezoo.core",
    "prunezoo.host.parts",
    "prunezoo.host.families",
    "prunezoo.host.encoded",
    "prunezoo.host.signals",
    "prunezoo.host.encode",
    "prunezoo.host.stages",
    "prunezoo.host",
    "prunezoo.training_free",
    "prunezoo.learned",
    "prunezoo.tokenizers",
    "prunezoo.serve",
    "prunezoo",
)
"""From the lowest up; a file is of the longest name that it begins with. Files of one floor may import one another."""


def imports(name):
    """What a file of the package imports, in full names: (file or package outside, name that is imported from it)."""
    path, found = NAMES[name], []
    package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                found.append((whole, "") if whole in NAMES else (base, alias.name))
    return found


def floor(name):
    return max((own for own in FLOORS if name == own or name.startswith(f"{own}.")), key=len)


GRAPH = {name: {base for base, _ in imports(name) if base in NAMES} - {name} for name in NAMES}


def test_there_is_no_circle():
    assert len(GRAPH) > 50 and sum(map(len, GRAPH.values())) > 150  # it did read
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("name", GRAPH)
def test_no_arrow_points_up(name):
    """A package stands for what its `__init__` gives on, which is of its own floor."""
    for target in GRAPH[name]:
        assert FLOORS.index(floor(target)) <= FLOORS.index(floor(name)), f"{name} imports {target}"


@pytest.mark.parametrize("name", GRAPH)
def test_only_families_and_parts_know_transformers(name):
    tops = {base.split(".")[0] for base, _ in imports(name)}
    assert "trainers" not in tops
    if not name.startswith(("prunezoo.host.families", "prunezoo.host.parts")):
        assert "transformers" not in tops, "its classes are for host/families and host/parts"
    if not name.startswith("prunezoo.serve."):
        assert "vllm" not in tops, "it is served in serve/ alone"


def test_vllm_is_imported_when_it_asks():
    """What a client of `prunezoo.serve` imports names nothing of it."""
    served = {name for name in GRAPH if name.startswith("prunezoo.serve")}
    with_vllm = {name for name in served if any(base.split(".")[0] == "vllm" for base, _ in imports(name))}
    assert with_vllm == {f"prunezoo.serve.{name}" for name in ("config", "model", "processor")}


def test_the_contract_knows_no_file():
    for name in ("contract", "config", "budgets", "gates", "plan", "merge", "subsets", "signals"):
        outside = {base.split(".")[0] for base, _ in imports(f"prunezoo.core.{name}")}
        assert not outside & {"safetensors", "huggingface_hub", "json", "os", "shutil", "pathlib"}, name
