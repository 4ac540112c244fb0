"""The wheel: the package `prunezoo` of `modules/`, nothing else, importable with its declared dependencies alone.

The bare environment is a new virtual environment that holds the wheel and, as links, the installed distributions that
the wheel's requirements lead to. So nothing is downloaded, and neither this repository nor a package that `prunezoo`
forgot to declare can be imported there.
"""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def closure(requirements: Iterable[str]) -> set[str]:
    """Canonical names of all distributions that the requirements lead to here, themselves included."""
    found: set[tuple[str, str]] = set()
    queue = [(Requirement(text), "") for text in requirements]
    while queue:
        requirement, parent_extra = queue.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": parent_extra}):
            continue
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) in found:
                continue
            found.add((name, extra))
            if name == PROJECT["name"]:
                queue += [(Requirement(text), "") for text in PROJECT["optional-dependencies"].get(extra, [])]
                continue
            try:
                queue += [(Requirement(text), extra) for text in metadata.requires(name) or []]
            except metadata.PackageNotFoundError:
                continue  # an extra that is not installed here
    return {name for name, _ in found} - {PROJECT["name"]}


def test_nothing_requires_torchvision():
    extras = [text for texts in PROJECT["optional-dependencies"].values() for text in texts]
    names = closure([*PROJECT["dependencies"], *extras])
    assert {"torch", "transformers", "lightning", "peft", "tokenizers"} <= names  # it did walk
    assert not names & {"torchvision", "timm"}


def test_torchvision_is_absent():
    """Its only build is for CUDA; where torch is not, it breaks even the import of transformers' models."""
    try:
        version = metadata.version("torchvision")
    except metadata.PackageNotFoundError:
        return
    pytest.fail(f"torchvision {version} is installed: something pulled it in")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy so that no stale build folder can slip in."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("modules", "trainers"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        target,
        source,
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = target.glob("*.whl")
    return path


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    info = f"prunezoo-{PROJECT['version']}.dist-info"
    assert {name.split("/")[0] for name in names} == {"prunezoo", info}
    shipped = {name.removeprefix("prunezoo/") for name in names if name.startswith("prunezoo/")}
    package = ROOT / "modules" / "prunezoo"
    wanted = {path.relative_to(package).as_posix() for path in package.rglob("*.py")} | {"py.typed"}
    assert wanted - shipped == set(), "a sub-package lacks its __init__.py"
    assert wanted >= {name for name in shipped if name.endswith(".py")}
    assert f"{info}/licenses/LICENSE" in names


def bare_python(folder: Path, wheel: Path) -> Path:
    """The interpreter of a new virtual environment with a wheel and what it requires, and nothing else."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in closure(PROJECT["dependencies"]):
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # for another platform
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(str(distribution.locate_file(top)))
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    install = [*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    installed = subprocess.run(install, capture_output=True, text=True)
    assert installed.returncode == 0, installed.stderr
    return python


def run_bare(python: Path, folder: Path, *words: str) -> str:
    """What a process prints that neither PYTHONPATH nor a setting of pip can lend anything."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PIP_"))}
    ran = subprocess.run([python, *words], cwd=folder, env=clean, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_wheel_works_in_a_bare_environment(wheel, tmp_path):
    program = """
import importlib, importlib.util, pkgutil
from pathlib import Path
import prunezoo
from prunezoo import AutoPruner, attach, build_pruner, list_pruners

assert Path(prunezoo.__file__).is_relative_to(Path(__import__("sys").prefix)), prunezoo.__file__
for name in ("modules", "trainers", "lightning", "peft", "matplotlib", "sklearn"):
    assert importlib.util.find_spec(name) is None, name
for found in pkgutil.walk_packages(prunezoo.__path__, "prunezoo."):
    if found.name not in ("prunezoo.serve.config", "prunezoo.serve.model", "prunezoo.serve.processor"):  # by vLLM alone
        importlib.import_module(found.name)
assert all(hasattr(prunezoo, name) for name in prunezoo.__all__)
assert {"random", "divprune", "ppm"} <= set(list_pruners()), list_pruners()
pruner = build_pruner("random")
pruner.save_pretrained("saved")
again = AutoPruner.from_pretrained("saved")
assert type(again) is type(pruner) and again.config == pruner.config
assert callable(attach)
print("the wheel works:", prunezoo.core.hub.version())
"""
    (tmp_path / "work").mkdir()
    python = bare_python(tmp_path / "bare", wheel)
    said = run_bare(python, tmp_path / "work", "-I", "-c", program)  # -I: nor can this folder
    assert said == f"the wheel works: {PROJECT['version']}"


def test_the_folder_above_a_clone_called_prunezoo_does_not_shadow_it(tmp_path):
    """`pip install -e` of the clone, and then Python in the folder above, whose `prunezoo` is the clone, no package."""
    clone = tmp_path / "prunezoo"
    clone.mkdir()
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and not path.name.endswith(".egg-info"):
            (clone / path.name).symlink_to(path)
    (clone / "modules").unlink()  # a build writes there
    shutil.copytree(ROOT / "modules", clone / "modules", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    build = "import setuptools.build_meta as b, sys; b.build_editable(sys.argv[1])"
    built = subprocess.run([sys.executable, "-c", build, tmp_path], cwd=clone, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (editable,) = tmp_path.glob("*.whl")
    python = bare_python(tmp_path / "bare", editable)
    program = (
        "import sys; assert sys.path[0] == ''  # this folder comes first\n"
        "import prunezoo; from prunezoo import attach; print(prunezoo.__file__, attach.__module__)"
    )
    said = run_bare(python, tmp_path, "-c", program)
    assert said == f"{clone / 'modules' / 'prunezoo' / '__init__.py'} prunezoo.host.attach"
