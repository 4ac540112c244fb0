"""README.md says what the measured files say, and the table of families is made of what the tests recorded."""

import json
import re
import subprocess
import sys
import tomllib

import pytest
from families import FAMILIES

from prunezoo import list_pruners
from prunezoo.core.errors import PruneZooError
from trainers.benchmarking.tables import speed_brief
from trainers.evaluation.league import leaders, league
from trainers.evaluation.record import MEAN, read_record, select
from trainers.evaluation.scores import FULL, NONE
from trainers.evaluation.summary import gather, summary_section
from trainers.upkeep.pages import by_stage
from trainers.upkeep.readme import README, rendered
from trainers.upkeep.support import MATRIX, OUTCOMES, ROOT, run_matrix, support_brief, support_section


def test_readme_is_what_was_measured():
    text = README.read_text(encoding="utf-8")
    assert rendered(text) == text, "run `python -m trainers.upkeep.readme`"
    with pytest.raises(PruneZooError, match="no place for 'models'"):
        rendered(text.replace("<!-- models: end -->", ""))


def test_readme_stays_one_screen():
    """Whatever grows belongs into docs/."""
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120


def test_readme_counts_every_method_and_links_to_its_stage():
    index = (ROOT / "docs" / "methods" / "README.md").read_text(encoding="utf-8")
    lines = by_stage().splitlines()
    assert sum(int(count) for line in lines for count in re.findall(r"(\d+) (?:learned|training)", line)) == len(
        set(list_pruners()) - {FULL, NONE}
    )
    for line in lines:
        (anchor,) = re.findall(r"README\.md#([\w-]+)\)", line)
        assert f"\n## {anchor.replace('-', ' ').capitalize()}\n" in index


def test_readme_shows_five_rows_of_accuracy_and_of_speed():
    rows = [line for line in leaders().splitlines() if line.startswith("| `")]
    assert len(rows) == 5 and rows[-1].startswith("| `random` | baseline |")
    places = {place.name.rpartition("/")[2]: place for place in league()["1/9"]}
    for row in rows[:4]:
        name, kind, *cells = (cell.strip() for cell in row.strip("|").split("|"))
        own = places[name.strip("`")]
        better = [
            place
            for place in places.values()
            if place.kind == own.kind and place.row["retention"] > own.row["retention"]
        ]
        assert kind == own.kind and len(better) < 2 and cells[3].startswith(f"{own.row['retention']:.1f} (")
    record = json.loads((ROOT / "hub_cards" / "speed.json").read_text(encoding="utf-8"))
    (fast,) = (row["speedup"] for row in record["rows"] if row["pruner"] == "fastv" and row["part"] == "prefill")
    brief = [line for line in speed_brief(record, ("fastv", "ppm")).splitlines() if line.startswith("| `")]
    assert len(brief) == 2 and f"| {fast:.1f}x |" in brief[0]


def test_retention_stands_where_as_many_tokens_were_measured():
    names = ("ppm-tiny", "m3-tiny", "atp-tiny")
    records = {name: read_record(ROOT / "checkpoints" / name / "metrics.json") for name in names}
    more = dict(records["m3-tiny"], n=4200)
    zoo = gather({**records, "m3-tiny": more})
    lines = summary_section(zoo).splitlines()
    (m3,) = (line for line in lines if line.startswith("| [`m3-tiny`]"))
    assert "4,200 questions" in m3 and [cell.strip() == "–" for cell in m3.split("|")[2:-1]] == [1, 1, 1, 0, 1, 0]
    (ppm,) = (line for line in lines if line.startswith("| [`ppm-tiny`]"))
    (row,) = (
        r for r in select(records["ppm-tiny"], pruner=records["ppm-tiny"]["pruner"], keep="1/9") if r["group"] == MEAN
    )
    assert ppm.split("|")[5].strip().startswith(f"{row['retention']:.1f} (")
    assert [line.startswith("| [") for line in lines[2:5]] == [True] * 3 and "| random |" in lines[-3]


def test_what_other_records_say_of_a_module_counts_for_the_same_weights():
    record = read_record(ROOT / "checkpoints" / "ppm-tiny" / "metrics.json")
    name = record["pruner"]
    rows = [dict(row, keep="1/2", tokens=72) for row in select(record, pruner=name, keep="1/3")]
    other = {**record, "rows": [*record["rows"], *rows, *(dict(row, pruner="fastv?layer=1") for row in rows)]}
    assert gather({"ppm-tiny": record}).shipped["ppm-tiny"].at(72) is None
    zoo = gather({"ppm-tiny": record}, [other])
    assert zoo.shipped["ppm-tiny"].at(72) == zoo.shipped["ppm-tiny"].at(72.5) != zoo.shipped["ppm-tiny"].at(48)
    assert len(zoo.rivals["divprune"].rows) == len(gather({"ppm-tiny": record}).rivals["divprune"].rows)
    assert summary_section(zoo).splitlines()[-3].startswith("| fastv?layer=1 |")
    stale = gather({"ppm-tiny": record}, [{**other, "weights": {name: "another"}}])
    assert stale.shipped["ppm-tiny"].at(72) is None and "fastv?layer=1" in stale.rivals
    with pytest.raises(PruneZooError, match="split is train, elsewhere test"):
        gather({"ppm-tiny": record}, [{**other, "split": "train"}])


def test_every_outcome_reaches_the_table():
    both = {
        "prompt-llava-half": "yes", "prompt-llava-video": "refused: LLaVA reads no clips: pass images",
        "layer-llava_siglip-half": "refused: pruner 'tome' cannot: take another", "prompt-qwen2_vl-half": "yes",
        "prompt-gemma3-half": "yes", "prompt-gemma3-video": "refused: Gemma 3 reads no clips: pass images",
    }  # fmt: skip
    old = {**both, "prompt-qwen2_vl-half": "refused: Qwen2-VL needs 5.9: upgrade", "prompt-gemma3-beams": "refused: no"}
    new = {**both, "prompt-gemma3-beams": "yes"}
    record = {"runs": [{"transformers": "5.6", "outcomes": old}, {"transformers": "5.9", "outcomes": new}]}
    assert support_section(record).splitlines() == [
        "| | prompt stage | layer stage |",
        "|---|---|---|",
        "| LLaVA | yes [1] | – |",
        "| LLaVA (siglip) | – | no [2] |",
        "| Qwen2-VL | yes [3] | – |",
        "| Gemma 3 | yes [1] [4] | – |",
        "",
        "[1] video: reads no clips: pass images  ",
        "[2] cannot: take another  ",
        "[3] transformers 5.6: needs 5.9: upgrade  ",
        "[4] beams: no  ",
        "",
        "Up to 3 checks a cell, each with transformers 5.6 and 5.9.",
    ]
    assert support_brief(record).splitlines() == [
        "- **prompt stage**: LLaVA, Qwen2-VL*, Gemma 3",
        "- **none**: LLaVA",
        "- tested on tiny random models, with transformers 5.6 and 5.9 (*: needs a newer one than 5.6); clips, and why "
        "a stage is missing: [families](docs/families.md)",
    ]


def test_stages_that_work_are_named():
    every = {f"{stage}-{family}-half": "yes" for family in ("llava", "gemma3") for stage in ("prompt", "layer")}
    every |= {f"{stage}-llava-half": "yes" for stage in ("input", "vision")}
    every |= {f"{stage}-qwen2_vl-half": "yes" for stage in ("input", "prompt", "layer")}
    brief = support_brief({"runs": [{"transformers": "5.9", "outcomes": every}]}).splitlines()
    assert brief[:3] == [
        "- **all stages**: LLaVA",
        "- **prompt and layer stage**: Gemma 3",
        "- **input, prompt and layer stage**: Qwen2-VL",
    ]


def test_the_recorded_cells_are_those_of_the_tests():
    """Whatever was added or renamed since must be run and recorded."""
    words = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-k", "test_matrix", *MATRIX]
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    cells = set(re.findall(r"test_matrix\[(.*)\]", listed))
    oldest, newest = json.loads(OUTCOMES.read_text(encoding="utf-8"))["runs"]
    older = {cell for cell in cells if cell.split("-")[1] in FAMILIES}  # others need a newer release
    assert set(newest["outcomes"]) == cells, "run `make support`"
    assert set(oldest["outcomes"]) == older, "run `make support`"


def test_the_oldest_environment_has_the_oldest_release():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (bound,) = (r for r in project["dependencies"] if r.startswith("transformers"))
    oldest = bound.removeprefix("transformers>=").split(",")[0]
    listed = subprocess.run(
        ["make", "-n", "-B", "test-min"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert f"'transformers=={oldest}'" in listed


def test_a_matrix_that_does_not_pass_is_not_noted():
    with pytest.raises(PruneZooError, match="the matrix did not pass"):
        run_matrix("/bin/false")
