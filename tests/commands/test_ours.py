"""One of our commands, started by another."""

import os

import pytest

from prunezoo import PruneZooError
from trainers.cli.ours import run_ours


def test_what_a_command_prints_is_seen_and_its_place_is_kept(tmp_path, capfd):
    (tmp_path / "shown.py").write_text("import os, sys; print(os.getcwd(), sys.argv[1], os.environ['SAID'])")
    run_ours("shown", "two words", cwd=tmp_path, environment={"SAID": "so"})
    assert capfd.readouterr().out == f"{tmp_path} two words so\n"
    assert "SAID" not in os.environ


def test_a_command_that_fails_is_named_as_it_would_be_typed(capfd):
    with pytest.raises(PruneZooError, match=r"python -m trainers.list 'no such' ended with code 2"):
        run_ours("trainers.list", "no such")
    assert "no pruner is called 'no such'" in capfd.readouterr().err
