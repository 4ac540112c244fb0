"""Cards and publishing: every number comes from a measurement of the very weights that are published."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard, constants
from test_evaluate_statistics import measurement

from modules.core.errors import PruneZooError
from modules.core.registry import build_pruner
from trainers import cards, publish
from trainers.cards import weights_digest, write_card
from trainers.evaluation.record import build_record, write_record
from trainers.evaluation.scores import Measurement
from trainers.run_record import RunRecord

CONFIG = {"width": 32, "hidden": 16, "heads": 2, "blocks": 1, "text_blocks": 1}


def record_of(name: str, digest: str | None, rival: str = "bad", **header: str) -> dict:
    """A record in which `name` is measured, with these weights."""
    names = {"good": name, "bad": rival}
    scores = {(names.get(p, p), k): s for (p, k), s in measurement().scores.items()}
    m = measurement()
    facts = {
        "vlm": "org/llava",
        "suite": "scenes",
        "split": "test",
        "seed": 0,
        "command": "python -m trainers.evaluate x",
    }
    return build_record(
        Measurement(m.groups, m.group_of, m.chance, scores), [name], {**facts, "weights": {name: digest}, **header}
    )


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folder = tmp_path / "ppm-test"
    build_pruner("ppm", **CONFIG).save_pretrained(folder)
    run: dict[str, object] = {
        "command": "python -m trainers.fit --config c.yaml",
        "vlm": "org/llava",
        "data": "SuiteDataModule(scenes)",
    }
    run |= {"seed": 1, "steps": 30, "seconds": 90.0, "device": "CPU", "processes": 1, "recipe": "seed_everything: 1\n"}
    (folder / "run.json").write_text(json.dumps(run))
    return folder


@pytest.fixture
def published(checkpoint) -> Path:
    """A checkpoint with its card."""
    write_card(checkpoint, record_of(str(checkpoint), weights_digest(checkpoint)))
    return checkpoint


def test_the_card_says_what_was_measured(published):
    card = ModelCard.load(published / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "prunezoo"
    assert card.data.base_model == "org/llava"
    assert card.data.base_model_relation == "adapter"
    assert {"visual-token-pruning", "ppm", "arxiv:2508.17243"} <= set(card.data.tags)
    results = {(r.dataset_config, r.metric_type, r.metric_name): r.metric_value for r in card.data.eval_results}
    assert results["mean", "retention", "retention, keep 1/9"] == 100
    assert results["count", "accuracy", "accuracy, keep 1/9"] == 1
    assert len(results) == 3 * 2
    lines = card.text.splitlines()
    header = lines.index("| keep | tokens | colour | count | **mean** |")
    assert lines[header + 2] == "| 1/9 | 16.0 | 100.0 (100.0–100.0) | 100.0 (100.0–100.0) | 100.0 (100.0–100.0) |"
    (rival,) = (line for line in lines if line.startswith("| bad |"))
    assert rival.startswith("| bad | 75.0, +25.0 (+")
    assert "30 steps in 1.5 minutes on CPU" in card.text
    assert "python -m trainers.fit --config c.yaml" in card.text
    assert 'AutoPruner.from_pretrained("ppm-test")' in card.text
    assert str(published.parent) not in card.text.replace(str(published), "")
    metrics = json.loads((published / "metrics.json").read_text())
    assert metrics["weights"] == {str(published): weights_digest(published)}


def test_what_no_pruner_can_know_stands_apart(checkpoint):
    write_card(checkpoint, record_of(str(checkpoint), weights_digest(checkpoint), rival="relevance"))
    text = (checkpoint / "README.md").read_text()
    assert "| rival |" not in text
    diagnostic, line, row = [at for at in text.splitlines() if at.startswith("|")][-3:]
    assert diagnostic.startswith("| diagnostic |") and set(line) == {"|", "-"}
    assert row.startswith("| relevance | 75.0, +25.0 (+")


def test_the_command_writes_the_card(checkpoint, tmp_path, capsys):
    write_record(record_of(str(checkpoint), weights_digest(checkpoint)), tmp_path / "e.json")
    assert cards.main([str(checkpoint), "--json", str(tmp_path / "e.json")]) == 0
    assert capsys.readouterr().out.split() == [str(checkpoint / "README.md"), str(checkpoint / "metrics.json")]


@pytest.mark.parametrize(
    ("name", "header", "message"),
    [
        ("divprune", {}, "the evaluation measured divprune, bad, not it"),
        (None, {"weights": {}}, "measured other weights"),
        (None, {"split": "validation"}, "needs the held-out test split"),
    ],
)
def test_a_card_of_something_else_is_refused(checkpoint, name, header, message):
    record = record_of(name or str(checkpoint), weights_digest(checkpoint), **header)
    with pytest.raises(PruneZooError, match=message):
        write_card(checkpoint, record)
    assert not (checkpoint / "README.md").exists()


def test_a_dry_run_shows_the_files_and_uploads_nothing(published, capsys, monkeypatch):
    monkeypatch.setattr(publish, "upload", lambda *_: pytest.fail("a dry run must not upload"))
    (published / "training").mkdir()
    assert publish.main([str(published), "org/ppm-test", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for name in ("config.json", "model.safetensors", "README.md", "metrics.json", "run.json"):
        assert name in out
    assert "left here: training" in out
    assert "dry run: nothing was uploaded" in out


def spoil_card(folder: Path) -> None:
    (folder / "README.md").write_text("# a card without metadata\n")


def spoil_weights(folder: Path) -> None:
    build_pruner("ppm", **CONFIG).save_pretrained(folder)  # other random weights


def spoil_tensor(folder: Path) -> None:
    build_pruner("ppm", **{**CONFIG, "blocks": 2}).save_pretrained(folder.with_name("bigger"))
    (folder / "model.safetensors").write_bytes((folder.with_name("bigger") / "model.safetensors").read_bytes())


@pytest.mark.parametrize(
    ("spoil", "repo", "message"),
    [
        (lambda folder: (folder / "README.md").unlink(), "org/name", "README.md is missing; write it with"),
        (lambda folder: (folder / "metrics.json").unlink(), "org/name", "metrics.json is missing; write it with"),
        (spoil_card, "org/name", "README.md"),
        (spoil_weights, "org/name", "measured with other weights"),
        (spoil_tensor, "org/name", "model.safetensors"),
        (lambda folder: None, "name", "write ORG/NAME"),
        (lambda folder: None, "org/na me", "is no Hub id"),
    ],
)
def test_what_is_not_whole_or_not_measured_is_refused(published, capsys, spoil, repo, message):
    spoil(published)
    with pytest.raises(SystemExit) as caught:
        publish.main([str(published), repo, "--dry-run"])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as an upload of small files needs; keeps what it is sent."""

    commits: list[list[dict]]

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])) if self.headers["Content-Length"] else b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        host = f"http://{self.headers['Host']}"
        answer: dict = {}
        if self.path.endswith("/repos/create"):
            answer = {"url": f"{host}/org/ppm-test", "name": "org/ppm-test"}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        elif "/commit/" in self.path:
            type(self).commits.append([json.loads(line) for line in body.splitlines()])
            answer = {"commitOid": "0" * 40, "commitUrl": f"{host}/org/ppm-test/commit/0", "success": True}
        payload = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)


@pytest.fixture
def hub(monkeypatch):
    """A Hub on this machine; gives its handler class."""
    Hub.commits = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(publish, "HfApi", lambda **options: _api(endpoint, **options))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield Hub
    server.shutdown()
    thread.join()
    server.server_close()


def _api(endpoint: str, **options):
    from huggingface_hub import HfApi

    return HfApi(endpoint=endpoint, token="hf_test", **options)


def test_upload_sends_the_files_in_one_commit(published, hub, capsys):
    (published / "training").mkdir()
    (published / "training" / "last.ckpt").write_text("private")
    assert publish.main([str(published), "org/ppm-test"]) == 0
    assert "published: http://127.0.0.1:" in capsys.readouterr().out
    (commit,) = hub.commits
    sent = {entry["value"]["path"] for entry in commit if entry["key"] == "file"}
    assert sent == {"config.json", "model.safetensors", "README.md", "metrics.json", "run.json"}
    assert commit[0]["value"]["summary"] == "Upload ppm"


def test_a_hub_that_cannot_be_reached_is_told_in_one_line(published, hub, monkeypatch, capsys):
    monkeypatch.setattr(publish, "HfApi", lambda **options: _api("http://127.0.0.1:9", **options))
    with pytest.raises(SystemExit):
        publish.main([str(published), "org/ppm-test"])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: org/ppm-test: not uploaded;")


def test_the_run_record_is_written_beside_the_pruner(tmp_path):
    """Seconds are counted on over a resumed run."""
    record = RunRecord(str(tmp_path / "p"), "python -m trainers.fit", "seed_everything: 1\n", "org/llava", "data", 1)
    module = SimpleNamespace(pruner=build_pruner("ppm", **CONFIG), device=torch.device("cpu"))
    trainer = SimpleNamespace(is_global_zero=True, global_step=7, world_size=1)
    record.load_state_dict({"seconds": 100.0})
    record.on_train_start(trainer, module)
    record.on_train_batch_end(trainer, module, None, None, 0)
    assert 100 <= record.state_dict()["seconds"] < 160
    record.on_fit_end(trainer, module)
    written = json.loads((tmp_path / "p" / "run.json").read_text())
    assert (written["steps"], written["vlm"], written["processes"]) == (7, "org/llava", 1)
    assert written["parameters"] == sum(p.numel() for p in module.pruner.parameters())
