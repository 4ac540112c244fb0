"""Publishing: only what is whole and was measured, in one commit, tried again where the Hub fails."""

import json
from pathlib import Path

import pytest
import torch
from hub_server import Failure
from huggingface_hub import constants
from records import SIZES, publish_it, record_of, refused
from tiny_llava import make_llava

from prunezoo import AutoPruner, attach
from prunezoo.core.base_model import BaseModel
from prunezoo.core.errors import PruneZooError
from prunezoo.core.registry import build_pruner
from trainers import publish
from trainers.cards import cards
from trainers.cards.cards import write_card
from trainers.cards.parts import weights_digest
from trainers.cli.names import methods_shipped
from trainers.publishing.package import check


def test_a_dry_run_shows_the_files_and_uploads_nothing(published, capsys, monkeypatch):
    monkeypatch.setattr(publish, "upload", lambda *_: pytest.fail("a dry run must not upload"))
    (published / "training").mkdir()
    assert publish.main([str(published), "org/ppm-test", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for name in ("config.json", "model.safetensors", "README.md", "metrics.json", "run.json"):
        assert name in out
    assert "left here: training" in out
    assert "dry run: nothing was uploaded" in out


def spoil_metrics(folder: Path) -> None:
    (folder / "metrics.json").write_text("{}")


def spoil_weights(folder: Path) -> None:
    build_pruner("ppm", **SIZES).save_pretrained(folder)  # other random weights


def spoil_tensor(folder: Path) -> None:
    build_pruner("ppm", **{**SIZES, "blocks": 2}).save_pretrained(folder.with_name("bigger"))
    (folder / "model.safetensors").write_bytes((folder.with_name("bigger") / "model.safetensors").read_bytes())


@pytest.mark.parametrize(
    ("spoil", "repo", "message"),
    [
        (lambda folder: (folder / "metrics.json").unlink(), "org/name", "metrics.json is missing; write it with"),
        (spoil_metrics, "org/name", "not an evaluation"),
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


@pytest.mark.parametrize("name", sorted(methods_shipped()))
def test_all_that_a_card_rests_on_is_published(name, tmp_path):
    """From the published files alone the same is published again: record of a policy, stop rule, pictures and all."""
    files = check(cards.SHIPPED / name, f"org/{name}").files
    for file, content in files.items():
        path = tmp_path / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert check(tmp_path / name, f"org/{name}").files == files
    left = {path.name for path in (cards.SHIPPED / name).iterdir()} - {Path(file).parts[0] for file in files}
    assert not left, "nothing else lies in what ships"


def test_publish_then_load_by_name(published, hub, capsys, monkeypatch):
    """One commit with what belongs to it, a tag; the same again is nothing; what is loaded is what was published."""
    (published / "training").mkdir()
    (published / "training" / "last.ckpt").write_text("nobody's business")
    assert f"published: {hub.endpoint}/org/ppm-test (revision v1)" in publish_it(
        published, capsys, "org/ppm-test", "--private"
    )
    repo = hub.repos["org/ppm-test"]
    assert repo.private and len(repo.commits) == 2  # the first is the Hub's own
    sent = repo.commits[-1]
    assert sent.files.keys() - {".gitattributes"} == {
        *("config.json", "model.safetensors", "README.md", "metrics.json", "run.json")
    }
    assert sent.large == {"model.safetensors"} and sent.summary == "Upload ppm"
    assert 'AutoPruner.from_pretrained("org/ppm-test")' in sent.files["README.md"].decode()

    assert "unchanged, nothing was uploaded" in publish_it(published, capsys)
    assert len(repo.commits) == 2 and list(repo.tags) == ["v1"]

    before = (published / "model.safetensors").read_bytes()
    spoil_weights(published)
    write_card(published, record_of(str(published), weights_digest(published)))
    assert "(revision v2)" in publish_it(published, capsys)
    assert [len(repo.commits), list(repo.tags)] == [3, ["v1", "v2"]]
    assert repo.commits[-1].files["model.safetensors"] != before

    newest, first = (
        AutoPruner.from_pretrained("org/ppm-test"),
        AutoPruner.from_pretrained("org/ppm-test", revision="v1"),
    )
    assert not torch.equal(newest.head.weight, first.head.weight)
    assert torch.equal(newest.head.weight, AutoPruner.from_pretrained(published).head.weight)

    hub.requests.clear()  # what is in the cache is not downloaded again
    assert torch.equal(AutoPruner.from_pretrained("org/ppm-test").head.weight, newest.head.weight)
    assert hub.requests and not [request for request in hub.requests if request.startswith("GET")]
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(AutoPruner.from_pretrained("org/ppm-test", revision="v1").head.weight, first.head.weight)
    assert not hub.requests
    with pytest.raises(PruneZooError, match="is not in the cache, and only the cache may be asked"):
        AutoPruner.from_pretrained("org/other")


def test_what_the_hub_cannot_give(published, hub, capsys, tmp_path):
    publish_it(published, capsys, "org/ppm-test", "--private")
    loads = {
        ("org/ppm-test", "v9"): "has no revision 'v9'",
        ("org/nothing", None): "neither a folder here nor a Hub repository that you can read",
    }
    for (name, revision), words in loads.items():
        with pytest.raises(PruneZooError, match=words):
            AutoPruner.from_pretrained(name, revision)
    with pytest.raises(PruneZooError, match="that you can read"):
        AutoPruner.from_pretrained("org/ppm-test", token=False)
    hub.add("org/bert", {"config.json": b"{}"})
    with pytest.raises(PruneZooError, match="key 'config' is missing"):
        AutoPruner.from_pretrained("org/bert")
    hub.add("org/empty", {})
    with pytest.raises(PruneZooError, match="is missing in the Hub repository 'org/empty'"):
        AutoPruner.from_pretrained("org/empty")
    AutoPruner.from_pretrained("org/ppm-test", cache_dir=tmp_path / "elsewhere")
    assert AutoPruner.from_pretrained("org/ppm-test", cache_dir=tmp_path / "elsewhere", local_files_only=True)
    with pytest.raises(PruneZooError, match="not in the cache"):
        AutoPruner.from_pretrained("org/ppm-test", cache_dir=tmp_path / "third", local_files_only=True)


def test_all_files_are_of_one_commit(published, hub, capsys):
    """A push between the download of the config and that of the weights changes nothing of what is loaded."""
    publish_it(published, capsys)
    first = hub.repos["org/ppm-test"].commits[-1]
    pushed = []
    handler = hub.server.RequestHandlerClass
    resolve = handler.resolve

    def push_after(self, commit, file):
        resolve(self, commit, file)
        if file == "config.json" and self.command == "GET" and not pushed:
            pushed.append(hub.commit("org/ppm-test", "other", {**first.files, "model.safetensors": b"other"}, set()))

    handler.resolve = push_after
    assert torch.equal(
        AutoPruner.from_pretrained("org/ppm-test").head.weight, AutoPruner.from_pretrained(published).head.weight
    )
    assert pushed


@pytest.mark.parametrize(
    "request_", ["POST /api/repos/create", "GET /api/models", "/preupload/", "PUT /upload", "/commit/", "/tag/"]
)
@pytest.mark.parametrize("status", [503, None])
def test_what_fails_once_is_tried_again(published, hub, capsys, request_, status):
    """A busy server, or a line that breaks, at every step: in the end there is one commit, and one tag."""
    hub.failures.append(Failure(request_, status))
    assert "(revision v1)" in publish_it(published, capsys)
    assert hub.failures[0].times == 0
    assert [c.summary for c in hub.repos["org/ppm-test"].commits] == ["initial commit", "Upload ppm"]
    assert hub.repos["org/ppm-test"].tags == {"v1": hub.repos["org/ppm-test"].commits[-1].oid}


@pytest.mark.parametrize("request_", ["PUT /upload", "/commit/"])
def test_a_cut_upload_leaves_nothing_half_done(published, hub, capsys, request_):
    hub.failures.append(Failure(request_, None, times=100))
    assert refused(published, capsys).startswith("error: org/ppm-test: not uploaded;")
    assert len(hub.repos["org/ppm-test"].commits) == 1 and not hub.repos["org/ppm-test"].tags
    hub.failures.clear()
    assert "published:" in publish_it(published, capsys)


def test_a_tag_that_was_not_reached_is_made_up_for(published, hub, capsys):
    hub.failures.append(Failure("/tag/", 500, times=100))
    assert "not uploaded; " in refused(published, capsys)
    hub.failures.clear()
    assert "unchanged, nothing was uploaded" in publish_it(published, capsys)
    assert list(hub.repos["org/ppm-test"].tags) == ["v1"]


def test_refusals_of_the_hub_are_one_line(published, hub, capsys, monkeypatch):
    assert "is the organisation yours?" in refused(published, capsys, "others/ppm-test")
    hub.add("org/bert", {"config.json": b"{}", "pytorch_model.bin": b"?"})
    assert "org/bert is taken: it holds something that is not prunezoo's; choose another name" in refused(
        published, capsys, "org/bert"
    )
    other = published.with_name("m3-test")
    build_pruner("m3", width=32, hidden=16, heads=2).save_pretrained(other)
    hub.add("org/m3", {name: (other / name).read_bytes() for name in ("config.json", "model.safetensors")})
    assert "org/m3 is taken: it holds the method 'm3'" in refused(published, capsys, "org/m3")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "check the token: `hf auth login`, or HF_TOKEN" in refused(published, capsys)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert refused(published, capsys).startswith("error: org/ppm-test: not uploaded;")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused(published, capsys)


def test_a_pruner_of_another_model_is_refused_unless_told(tmp_path):
    """Both are named, with what differs; told so, it runs where the widths allow."""
    vlm, other = make_llava(), make_llava()
    other.config.text_config.hidden_size = 64
    alike = make_llava(seed=1)  # other weights, the same build
    pruner = build_pruner("ppm", **SIZES)
    pruner.base_model = BaseModel.describe(vlm)
    pruner.base_model = BaseModel(**{**pruner.base_model.to_dict(), "name": "org/llava"})
    folder = pruner.save_pretrained(tmp_path / "p")
    assert AutoPruner.from_pretrained(folder, vlm=alike).base_model == pruner.base_model
    other.name_or_path = "org/wide-llava"
    message = "this 'ppm' was trained for org/llava, not for org/wide-llava: width 32 and 64; take .* any_model=True"
    with pytest.raises(PruneZooError, match=message):
        AutoPruner.from_pretrained(folder, vlm=other)
    with pytest.raises(PruneZooError, match=message):
        attach(other, folder, keep=4)
    deeper = make_llava(num_hidden_layers=3)
    with pytest.raises(PruneZooError, match="decoder layers 2 and 3"):
        attach(deeper, folder, keep=4)
    with attach(deeper, AutoPruner.from_pretrained(folder, vlm=deeper, any_model=True), keep=4):
        pass
    for change, words in (({"width": "32"}, "no right width"), ({"tower": None}, "no right tower")):
        stored = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**stored, "base_model": {**stored["base_model"], **change}}))
        with pytest.raises(PruneZooError, match=words):
            AutoPruner.from_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(stored))


@pytest.mark.parametrize("name", ["/home/me/secret/llava", "../secret/llava", "C:\\me\\llava"])
def test_a_model_named_by_its_folder_is_refused(published, name):
    """Pruners saved before such names were shortened, or edited since."""
    folder, base = published, BaseModel("x", "llava", 32, 2, "clip_vision_model", 24)
    config = json.loads((folder / "config.json").read_text())
    config["base_model"] = {**base.to_dict(), "name": name}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        PruneZooError, match=r"config\.json: base_model\.name .* is a folder of a machine; write 'llava'"
    ):
        check(folder, "org/name")
