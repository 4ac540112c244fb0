"""The comparison of speed records: what is named as slower, and what is noise."""

import copy
import json

import pytest

from prunezoo.core.errors import PruneZooError
from trainers import benchmark
from trainers.upkeep import bench_check


@pytest.fixture(scope="module")
def stored():
    """The record that ships."""
    return bench_check.read_speed(bench_check.STORED)


def saved(folder, record):
    """Where a record was written."""
    path = folder / "new.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    return path


def changed(record, pruner, part, times):
    """A copy in which one ratio, or one pruner's own time, is another, and has no spread."""
    copied = copy.deepcopy(record)
    (row,) = (row for row in copied["rows"] if row["pruner"] == pruner and row["part"] == part)
    for name in ("speedup", "median_s"):
        if row[name] is not None:
            row[name] *= times
    row["spread"] = row["speedup_spread"] = 0.0
    return copied


def test_equal_records_have_nothing_slower(stored, tmp_path, capsys):
    assert bench_check.main(["--new", str(saved(tmp_path, stored))]) == 0
    count = len(bench_check.ratios_of(stored))
    assert count > 100 and f"{count} of {count} ratios" in capsys.readouterr().out


@pytest.mark.parametrize(("times", "named"), [(0.5, True), (0.95, False), (2.0, False)])
def test_a_lower_speedup_is_named(stored, tmp_path, capsys, times, named):
    calm = changed(stored, "divprune", "first_token", 1.0)
    path = saved(tmp_path, calm)
    new = tmp_path / "slow.json"
    new.write_text(json.dumps(changed(calm, "divprune", "first_token", times)), encoding="utf-8")
    assert bench_check.main(["--stored", str(path), "--new", str(new)]) == int(named)
    said = capsys.readouterr().out
    assert ("slower than stored" in said) == named and ("divprune" in said) == named


def test_a_pruner_that_takes_longer_is_named(stored):
    """Its own time counts in prefills: ten times as long matters for one that takes 2 % of a prefill."""
    prefill = next(r["median_s"] for r in stored["rows"] if r["pruner"] == "bare" and r["part"] == "prefill")
    own = next(r["median_s"] for r in stored["rows"] if r["pruner"] == "ppm" and r["part"] == "pruner")
    slow = changed(stored, "ppm", "pruner", prefill / own)  # as long as a prefill
    rows = bench_check.compare(bench_check.ratios_of(stored), bench_check.ratios_of(slow))
    assert [key[2:] for key, *_, worse in rows if worse] == [("ppm", "1/9", "pruner")]


def test_noise_is_not_named(stored):
    """A ratio that is worse by less than what it scatters."""
    calm, noisy = bench_check.Ratio(2.0, 0.1), bench_check.Ratio(1.7, 0.3)
    assert [worse for *_, worse in bench_check.compare({("x",): calm}, {("x",): noisy})] == [False]
    assert [worse for *_, worse in bench_check.compare({("x",): calm}, {("x",): bench_check.Ratio(1.7, 0.1)})] == [True]


def test_the_stored_command_is_run_again(stored):
    options = benchmark.parser().parse_args(bench_check.options_of(stored, ["ppm", "divprune"], 1))
    assert (options.vlm, options.pruner, options.repeats) == (stored["vlm"], ["divprune", "ppm"], 1)
    whole = benchmark.parser().parse_args(bench_check.options_of(stored, [], None))
    assert whole.repeats == stored["repeats"] and set(whole.pruner) <= {row["pruner"] for row in stored["rows"]}


def test_refusals(stored, tmp_path):
    with pytest.raises(PruneZooError, match=r"--only nobody: the stored record has .*divprune"):
        bench_check.options_of(stored, ["nobody"], None)
    with pytest.raises(PruneZooError, match="make speed"):
        bench_check.options_of({**stored, "command": "rm -r x"}, [], None)


def test_another_model_is_not_compared(stored, tmp_path, capsys):
    path = saved(tmp_path, {**stored, "vlm": "another"})
    with pytest.raises(SystemExit, match="2"):
        bench_check.main(["--new", str(path)])
    assert "no comparison" in capsys.readouterr().err
