"""What a release needs: one version, a dated section, forms and workflows that say what is there."""

import re
import shutil
import subprocess
import tomllib

import pytest
import yaml

from prunezoo.core.errors import PruneZooError
from trainers.cli.names import ROOT
from trainers.upkeep.release import check_git, check_shipped, notes_of, version_of

GITHUB = ROOT / ".github"


@pytest.fixture
def clone(tmp_path):
    for name in ("pyproject.toml", "CITATION.cff", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def test_one_version(clone):
    assert version_of(ROOT) == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    (clone / "CITATION.cff").write_text("version: 9.9.9\n")
    with pytest.raises(PruneZooError, match=r"CITATION.cff: version is 9.9.9, that of pyproject.toml 0"):
        version_of(clone)
    (clone / "pyproject.toml").write_text('[project]\nversion = "one"\n')
    with pytest.raises(PruneZooError, match="version 'one' is none"):
        version_of(clone)


def test_notes_are_the_section_of_the_version(clone):
    (clone / "CHANGELOG.md").write_text(
        "# Changelog\n\n## [Unreleased]\n\n- c\n\n## [1.0.0] - 2026-02-01\n\n### Added\n\n- b\n\n## [0.1.0]\n\n- a\n"
    )
    assert notes_of(clone, "1.0.0") == "### Added\n\n- b\n"
    with pytest.raises(PruneZooError, match=r"write '## \[0.1.0\] - YEAR-MONTH-DAY'"):
        notes_of(clone, "0.1.0")
    with pytest.raises(PruneZooError, match=r"nothing under '## \[1x0.0\]'"):
        notes_of(clone, "1x0.0")


def test_a_tag_elsewhere_and_changes_are_refused(clone):
    def git(*words):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=clone, check=True, capture_output=True
        )

    with pytest.raises(PruneZooError, match="run it in a clone"):
        check_git(clone, "0.1.0")
    git("init")
    with pytest.raises(PruneZooError, match="3 files are not committed"):
        check_git(clone, "0.1.0")
    git("add", ".")
    git("commit", "-m", "one")
    check_git(clone, "0.1.0")
    git("tag", "v0.1.0")
    check_git(clone, "0.1.0")
    git("commit", "--allow-empty", "-m", "two")
    with pytest.raises(PruneZooError, match=r"tag v0\.1\.0 stands at another commit"):
        check_git(clone, "0.1.0")


def test_all_that_ships_could_be_published():
    check_shipped()


def commands_of(workflow):
    """The `make` targets that a workflow runs, its matrix written out."""
    found = set()
    for job in yaml.safe_load((GITHUB / "workflows" / workflow).read_text("utf-8"))["jobs"].values():
        targets = job.get("strategy", {}).get("matrix", {}).get("target", [])
        for step in job["steps"]:
            run = step.get("run", "")
            if run.startswith("make ${{"):
                found |= set(targets)
            elif run.startswith("make "):
                found.add(run.split()[1])
    return found


def test_the_workflow_does_what_ci_does():
    own = set(re.findall(r"^make ([\w-]+)", (ROOT / ".ci" / "run").read_text("utf-8"), re.M))
    assert {"quality", "test", "test-min", "test-extras", "demo"} <= own
    assert commands_of("ci.yml") == own | {"test-newest"}
    assert commands_of("nightly.yml") == {"test-newest"} and commands_of("release.yml") == {"release-check"}
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    assert commands_of("ci.yml") | commands_of("release.yml") <= targets
    ci = yaml.safe_load((GITHUB / "workflows" / "ci.yml").read_text("utf-8"))
    pythons = ci["jobs"]["test"]["strategy"]["matrix"]["python-version"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [line.rpartition(" ")[2] for line in project["classifiers"] if "Python :: 3." in line]
    assert pythons == named


@pytest.mark.parametrize("path", sorted((GITHUB / "workflows").glob("*.yml")), ids=lambda path: path.stem)
def test_workflows_ask_for_no_more_than_they_need(path):
    permissions = yaml.safe_load(path.read_text("utf-8"))["permissions"]
    assert permissions == {"contents": "write" if path.stem == "release" else "read"}


@pytest.mark.parametrize("path", sorted((GITHUB / "ISSUE_TEMPLATE").glob("[!c]*.yml")), ids=lambda path: path.stem)
def test_issue_forms_are_forms(path):
    form = yaml.safe_load(path.read_text("utf-8"))
    assert form["name"] and form["description"] and form["body"]
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    for field in form["body"]:
        assert field["type"] in ("input", "textarea", "dropdown", "checkboxes") and field["attributes"]["label"]


def test_the_citation_is_whole():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()  # what the format requires
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert [{"name": author["name"]} for author in cited["authors"]] == project["authors"]
    assert cited["license"] == project["license"]
