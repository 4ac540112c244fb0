"""`python -m trainers.search`: trials of equal cost, gone on with, and a file of options that the methods take."""

import json

import pytest

from prunezoo import PruneZooError, load_pruner
from trainers import search as command
from trainers.evaluation.search import check_space, is_range, parse_range, with_options

WORDS = "vflowopt --vlm tiny-llava --suite scenes --keep 1/3 --limit 7 --check 7 --batch-size 7".split()
RANGES = ["--range", "cell=3:12", "second=0.5:1.0", "layers=null,[1,3],[2,4]"]


def test_ranges_are_numbers_or_choices():
    assert parse_range("cell=3:24") == ("cell", (3, 24)) and is_range((3, 24))
    assert parse_range("alpha=-1:0.5") == ("alpha", (-1, 0.5))
    assert parse_range("attention=cls,received") == ("attention", ("cls", "received"))
    assert parse_range("layers=null,[1,3],[2,4]") == ("layers", (None, [1, 3], [2, 4]))
    for wrong in ("cell", "cell=", "=3:4", "cell=9:3", "cell=a:b"):
        with pytest.raises(PruneZooError, match="write NAME=LEAST:MOST"):
            parse_range(wrong)


def test_a_start_outside_and_an_unknown_option_are_refused():
    config = load_pruner("vflowopt").config.to_dict()
    with pytest.raises(PruneZooError, match="names no options to search"):
        check_space("vflowopt", {}, config)
    with pytest.raises(PruneZooError, match="no such option; did you mean 'cell'"):
        check_space("vflowopt", {"cells": (3, 4)}, config)
    with pytest.raises(PruneZooError, match=r"the start, 6.0, is not in it; give another .* vflowopt\?cell="):
        check_space("vflowopt", {"cell": (7.0, 9.0)}, config)
    check_space("vflowopt", load_pruner("vflowopt").search_space(28), config)


def test_names_carry_options_back_and_forth():
    name = with_options("vflowopt?first=1.2&cell=4", {"cell": 5.5, "layers": [1, 3], "count": "code"})
    config = load_pruner(name).config
    assert (config.first, config.cell, config.layers, config.count) == (1.2, 5.5, (1, 3), "code")
    assert with_options("vflowopt", {}) == "vflowopt"


def test_a_file_of_options_is_taken_and_read_strictly(tmp_path):
    path = tmp_path / "options.json"
    path.write_text(json.dumps({"method": "vflowopt", "options": {"cell": 4.5, "layers": [1, 3]}}))
    pruner = load_pruner(f"vflowopt?options={path}&second=0.7")
    assert pruner.config.cell == 4.5 and pruner.config.layers == (1, 3) and pruner.config.second == 0.7
    assert load_pruner(f"vflowopt?options={path}&cell=9").config.cell == 9
    for record, said in (
        ({"method": "fastv", "options": {}}, "options of 'fastv' are not for 'vflowopt'"),
        ({"method": "vflowopt"}, "it lacks options; give a file that `python -m trainers.search` wrote"),
        ({"method": "vflowopt", "options": [1]}, "options must be an object"),
        ({"method": "vflowopt", "options": {"cells": 4}}, "cells"),
    ):
        path.write_text(json.dumps(record))
        with pytest.raises(PruneZooError, match=said):
            load_pruner(f"vflowopt?options={path}")
    with pytest.raises(PruneZooError, match=r"python -m trainers\.search"):
        load_pruner(f"vflowopt?options={tmp_path / 'nothing.json'}")


@pytest.mark.slow
def test_it_searches_goes_on_and_writes_what_methods_take(tmp_path, capsys):
    out = tmp_path / "search"
    assert command.main([*WORDS, *RANGES, "--trials", "3", "--out", str(out)]) == 0
    first = json.loads((out / "options.json").read_text())
    assert first["trials"] == 3 and first["n"] == 7 and first["method"] == "vflowopt" and first["split"] == "train"
    assert first["found"]["value"] <= first["start"]["value"]
    assert command.main([*WORDS, *RANGES, "--trials", "6", "--out", str(out)]) == 0
    record = json.loads((out / "options.json").read_text())
    assert record["trials"] == 6 and record["start"] == first["start"]
    assert record["found"]["value"] <= first["found"]["value"]
    assert record["found"]["tokens"] <= 48 * 1.01
    assert set(record["options"]) == {"cell", "second", "layers"} and 3 <= record["options"]["cell"] <= 12
    load_pruner(f"vflowopt?options={out / 'options.json'}")
    check = json.loads((out / "check.json").read_text())
    assert check["split"] == "validation" and check["paired"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command.main([*WORDS, "--range", "cell=3:9", "--trials", "7", "--out", str(out)])
    assert stop.value.code == 2 and "holds a search with another space: name another folder" in capsys.readouterr().err


def test_what_is_no_search_is_refused(tmp_path, capsys):
    for extra, said in (
        (["--keep", "auto"], "a search is for one budget"),
        (["--trials", "0"], "--trials 0: at least 1"),
        (["--range", "cell=9"], "the start, 6.0, is not in it"),
    ):
        with pytest.raises(SystemExit) as stop:
            command.main([*WORDS, "--out", str(tmp_path / "x"), *extra])
        assert stop.value.code == 2 and said in capsys.readouterr().err
