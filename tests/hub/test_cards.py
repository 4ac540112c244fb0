"""Cards: every number comes from a measurement of the very weights that they tell of."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from records import SIZES, record_of

from prunezoo.core.errors import PruneZooError
from prunezoo.core.registry import build_pruner, list_pruners, pruner_class
from trainers.cards import cards
from trainers.cards.__main__ import main as write_cards
from trainers.cards.about import stage_of
from trainers.cards.cards import CHEAPER, RESTORED, render_card, write_card
from trainers.cards.parts import weights_digest
from trainers.cli.names import CHECKPOINTS
from trainers.evaluation.record import read_record, write_record
from trainers.evaluation.summary import read_zoo
from trainers.training.run_record import RunRecord


def test_the_card_says_what_was_measured(published):
    card = ModelCard.load(published / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "prunezoo"
    assert card.data.base_model == "org/llava"
    assert card.data.base_model_relation == "adapter"
    assert {"visual-token-pruning", "ppm", "16-tokens", "arxiv:2508.17243"} <= set(card.data.tags)
    assert card.data.datasets == ["scenes"]
    results = {(r.dataset_config, r.metric_type, r.metric_name): r.metric_value for r in card.data.eval_results}
    assert results["mean", "retention", "retention, keep 1/9"] == 100
    assert results["count", "accuracy", "accuracy, keep 1/9"] == 1
    assert len(results) == 3 * 2
    lines = card.text.splitlines()
    header = lines.index("| keep | tokens | colour | count | **mean** |")
    assert lines[header + 2] == "| 1/9 | 16.0 | 100.0 (100.0–100.0) | 100.0 (100.0–100.0) | 100.0 (100.0–100.0) |"
    (rival,) = (line for line in lines if line.startswith("| bad |"))
    assert rival.startswith("| bad | 75.0, +25.0 (+")
    assert "Evidence: paper, in part reconstructed." in lines
    assert "| 1/9 | 64 |" in card.text and "random:llava-120m" in card.text  # speed, of the method
    assert "30 steps in 1.5 minutes on CPU" in card.text
    assert "python -m trainers.fit --config c.yaml" in card.text
    assert 'AutoPruner.from_pretrained("ppm-test")' in card.text
    assert str(published.parent) not in card.text.replace(str(published), "")
    metrics = json.loads((published / "metrics.json").read_text())
    assert metrics["weights"] == {str(published): weights_digest(published)}


def test_a_card_lists_all_models_and_suites_of_a_training(checkpoint):
    run = json.loads((checkpoint / "run.json").read_text())
    run |= {"vlm": {"scenes": "org/llava", "pages": "org/other"}, "data": "SuitesInTurn(scenes, pages)"}
    (checkpoint / "run.json").write_text(json.dumps(run))
    write_card(checkpoint, record_of(str(checkpoint), weights_digest(checkpoint)))
    card = ModelCard.load(checkpoint / "README.md")
    assert "; frozen models: `org/llava` on scenes, `org/other` on pages; seed 1." in card.text
    assert card.data.datasets == ["scenes", "pages"]


def test_what_no_pruner_can_know_stands_apart(checkpoint):
    write_card(checkpoint, record_of(str(checkpoint), weights_digest(checkpoint), rival="relevance"))
    text = (checkpoint / "README.md").read_text()
    assert "| rival |" not in text
    diagnostic, line, row = [at for at in text.splitlines() if at.startswith("|")][-6:-3]  # a table, before speed
    assert diagnostic.startswith("| diagnostic |") and set(line) == {"|", "-"}
    assert row.startswith("| relevance | 75.0, +25.0 (+")


def test_the_command_writes_the_card(checkpoint, tmp_path, capsys):
    write_record(record_of(str(checkpoint), weights_digest(checkpoint)), tmp_path / "e.json")
    assert write_cards([str(checkpoint), "--json", str(tmp_path / "e.json")]) == 0
    assert capsys.readouterr().out.split() == [str(checkpoint / "README.md"), str(checkpoint / "metrics.json")]


def test_every_stage_says_what_it_makes_cheaper():
    assert set(CHEAPER) == {stage_of(pruner_class(name)) for name in list_pruners()}
    assert "first blocks see every patch" in (CHECKPOINTS / "a-clip-tiny" / "README.md").read_text("utf-8")
    restoring = CHECKPOINTS / "dtop-tiny"
    assert RESTORED in str(render_card(restoring, read_record(restoring / "metrics.json")))
    assert not (restoring / "kept.webp").exists()  # it would show every token at every budget


def test_nothing_ships_without_a_card_and_the_record_behind_it():
    folders = [path.parent for path in cards.SHIPPED.glob("*/config.json")]
    assert len(folders) > len(read_zoo().shipped) > 1
    for folder in folders:
        assert (folder / "README.md").is_file() and (folder / "metrics.json").is_file(), folder


@pytest.mark.parametrize("name", read_zoo().shipped)
def test_every_shipped_card_is_what_was_measured(name):
    """Rendered anew from the records in the folder, it is the card that ships, letter by letter."""
    folder = cards.SHIPPED / name
    stored = json.loads((folder / "config.json").read_text())
    card = str(render_card(folder, read_record(folder / "metrics.json")))
    assert card == (folder / "README.md").read_text(encoding="utf-8"), f"run `python -m trainers.cards {folder}`"
    copy = (cards.CARDS / f"{name}.md").read_text(encoding="utf-8")
    assert copy == cards.shipped_copy(card, name) != card
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", copy):
        assert (cards.CARDS / picture).is_file(), picture
    assert (folder / "kept.webp").is_file()
    assert stored["base_model"]["name"] == "checkpoints/tiny-llava"


def test_a_record_of_before_the_oracle_scale_still_makes_a_card(checkpoint, tmp_path, capsys):
    record = record_of(str(checkpoint), weights_digest(checkpoint))
    del record["oracle_scale"], record["layers"]
    write_record(record, tmp_path / "old.json")
    assert write_cards([str(checkpoint), "--json", str(tmp_path / "old.json")]) == 0
    first = (checkpoint / "README.md").read_text()
    assert "as one who knew the answers would choose" not in first
    assert write_cards([str(checkpoint)]) == 0  # anew, from its own metrics
    assert (checkpoint / "README.md").read_text() == first


@pytest.mark.parametrize(
    ("name", "header", "message"),
    [
        ("divprune", {"weights": {"divprune": None}}, "the evaluation measured divprune, bad, not it"),
        (None, {"weights": {}}, "measured other weights"),
        (None, {"split": "validation"}, "needs the held-out test split"),
    ],
)
def test_a_card_of_something_else_is_refused(checkpoint, name, header, message):
    record = record_of(name or str(checkpoint), weights_digest(checkpoint), **header)
    with pytest.raises(PruneZooError, match=message):
        write_card(checkpoint, record)
    assert not (checkpoint / "README.md").exists()


def test_a_folder_is_known_by_its_weights_wherever_it_lies(checkpoint, tmp_path):
    digest = weights_digest(checkpoint)
    record = record_of("runs/a/ppm", digest)
    moved = shutil.copytree(checkpoint, tmp_path / "another")
    assert cards.metrics_of(moved, record)["pruner"] == "runs/a/ppm"
    both = {**record, "weights": {"runs/a/ppm": digest, "runs/b/ppm": "another"}}
    both["rows"] = [*record["rows"], *(dict(row, pruner="runs/b/ppm") for row in record["rows"])]
    assert cards.metrics_of(shutil.copytree(checkpoint, tmp_path / "ppm"), both)["pruner"] == "runs/a/ppm"


def test_the_run_record_is_written_beside_the_pruner(tmp_path):
    """Seconds are counted on over a resumed run."""
    record = RunRecord(str(tmp_path / "p"), "python -m trainers.fit", "seed_everything: 1\n", "org/llava", "data", 1)
    module = SimpleNamespace(pruner=build_pruner("ppm", **SIZES), device=torch.device("cpu"))
    trainer = SimpleNamespace(is_global_zero=True, global_step=7, world_size=1)
    record.load_state_dict({"seconds": 100.0})
    record.on_train_start(trainer, module)
    record.on_train_batch_end(trainer, module, None, None, 0)
    assert 100 <= record.state_dict()["seconds"] < 160
    record.on_fit_end(trainer, module)
    written = json.loads((tmp_path / "p" / "run.json").read_text())
    assert (written["steps"], written["vlm"], written["processes"]) == (7, "org/llava", 1)
    assert written["parameters"] == sum(p.numel() for p in module.pruner.parameters())
