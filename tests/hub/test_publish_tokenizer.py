"""Publishing an image tokenizer, and loading it back by its Hub id: the same road as a pruner's, to the bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from PIL import Image
from records import publish_it, refused

from prunezoo import AutoPruner, OneDPiece, build_pruner
from prunezoo.core.errors import PruneZooError
from trainers import publish
from trainers.cards.cards import SHIPPED, weights_digest
from trainers.publishing.package import check

NAME = "org/one-d-piece-test"


@pytest.fixture
def tokenizer(tmp_path) -> Path:
    """The shipped one, with the record that measured it."""
    return Path(shutil.copytree(SHIPPED / "one-d-piece-tiny", tmp_path / "one-d-piece-test"))


def train_on(folder: Path) -> None:
    """Other weights, and the record as if it had measured them."""
    before = weights_digest(folder)
    spoil_weights(folder)
    metrics = folder / "metrics.json"
    metrics.write_text(metrics.read_text().replace(str(before), str(weights_digest(folder))))


def spoil_weights(folder: Path) -> None:
    changed = OneDPiece.from_pretrained(folder)
    with torch.no_grad():
        changed.latent_tokens.add_(0.5)
        changed.quantize.codebook.copy_(changed.quantize.codebook.flip(0))
    changed.save_pretrained(folder)


def same(first: OneDPiece, second: OneDPiece) -> bool:
    """The same tensors, bit for bit, under the same names."""
    mine, others = first.state_dict(), second.state_dict()
    return mine.keys() == others.keys() and all(
        mine[name].dtype == others[name].dtype and torch.equal(mine[name], others[name]) for name in mine
    )


def test_publish_then_load_by_name(tokenizer, hub, capsys, monkeypatch, tmp_path):
    assert f"published: {hub.endpoint}/{NAME} (revision v1)" in publish_it(tokenizer, capsys, NAME)
    repo = hub.repos[NAME]
    assert repo.commits[-1].large == {"model.safetensors"} and repo.commits[-1].summary == "Upload one_d_piece"
    assert repo.commits[-1].files.keys() - {".gitattributes"} == {p.name for p in tokenizer.iterdir()}
    assert "unchanged, nothing was uploaded" in publish_it(tokenizer, capsys, NAME)
    assert [len(repo.commits), list(repo.tags)] == [2, ["v1"]]

    local = OneDPiece.from_pretrained(tokenizer)
    train_on(tokenizer)
    assert "(revision v2)" in publish_it(tokenizer, capsys, NAME)
    assert [len(repo.commits), list(repo.tags)] == [3, ["v1", "v2"]]
    newest, first = OneDPiece.from_pretrained(NAME), OneDPiece.from_pretrained(NAME, revision="v1")
    assert not same(newest, first)
    assert same(newest, OneDPiece.from_pretrained(tokenizer)) and same(first, local)

    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    cached = OneDPiece.from_pretrained(NAME, "v1").float()
    assert same(cached, local.float()) and not hub.requests
    picture = Image.radial_gradient("L").convert("RGB")
    data = cached.compress(picture, 64)
    assert data == local.compress(picture, 64) != newest.float().compress(picture, 64)
    assert cached.decompress(data).tobytes() == local.decompress(data).tobytes()
    with pytest.raises(PruneZooError, match="only the cache may be asked"):
        OneDPiece.from_pretrained("org/other")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    own = {"cache_dir": tmp_path / "own", "local_files_only": True}
    with pytest.raises(PruneZooError, match="not in the cache"):
        OneDPiece.from_pretrained(NAME, **own)
    OneDPiece.from_pretrained(NAME, cache_dir=tmp_path / "own")
    assert same(OneDPiece.from_pretrained(NAME, **own), OneDPiece.from_pretrained(tokenizer))
    with pytest.raises(PruneZooError, match="has no revision 'v9'"):
        OneDPiece.from_pretrained(NAME, "v9")
    with pytest.raises(PruneZooError, match=r"'one_d_piece' is no pruner: load it with OneDPiece\.from_pretrained"):
        AutoPruner.from_pretrained(NAME)


def test_the_card_is_rendered_for_its_hub_id(tokenizer):
    (tokenizer / "README.md").write_text("written by hand")
    card = ModelCard(check(tokenizer, NAME).files["README.md"].decode())
    assert (card.data.library_name, card.data.license) == ("prunezoo", "apache-2.0")
    assert card.data.pipeline_tag == "image-to-image" and card.data.base_model is None
    assert {"prunezoo", "image-tokenizer", "one_d_piece", "arxiv:2501.10064"} <= set(card.data.tags)
    assert (
        f'OneDPiece.from_pretrained("{NAME}")' in card.text and "checkpoints/" not in card.text.split("## Measured")[0]
    )
    quality = json.loads((tokenizer / "metrics.json").read_text())["quality"]
    rows = [row for row in quality["rows"] if row["codec"] == next(iter(quality["weights"]))]
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results["PSNR, dB, 16 tokens"] == next(row["psnr"] for row in rows if row["tokens"] == 16)
    assert len(results) == 4 * len(rows)


def spoil_speed(folder: Path) -> None:
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["speed"]["weights"] = "0" * 64
    (folder / "metrics.json").write_text(json.dumps(metrics))


def spoil_tensor(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["config"]["tokens"] = 128
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "metrics.json").unlink(), "metrics.json is missing; write it with `python -m"),
        (lambda folder: (folder / "curves.png").unlink(), "curves.png is missing"),
        (lambda folder: (folder / "metrics.json").write_text("{"), "metrics.json: not readable JSON"),
        (lambda folder: (folder / "metrics.json").write_text("{}"), "not what a card rests on (KeyError: 'quality')"),
        (lambda folder: (folder / "run.json").write_text('{"a": 1}'), "not the record of a training, it lacks"),
        (spoil_weights, "measured with other weights"),
        (spoil_speed, "measured with other weights"),
        (spoil_tensor, "do not belong together"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x80\x04."), "not a readable safetensors file"),
    ],
)  # fmt: skip
def test_what_is_not_whole_or_not_measured_is_refused(tokenizer, capsys, spoil, message):
    check(tokenizer, NAME)
    spoil(tokenizer)
    with pytest.raises(SystemExit) as caught:
        publish.main([str(tokenizer), NAME, "--dry-run"])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ") and message in line


def test_a_name_that_holds_a_pruner_is_taken(tokenizer, hub, capsys, tmp_path):
    ppm = build_pruner("ppm", width=32, hidden=16, heads=2, blocks=1, text_blocks=1).save_pretrained(tmp_path / "ppm")
    hub.add(NAME, {path.name: path.read_bytes() for path in ppm.iterdir()})
    assert f"{NAME} is taken: it holds the method 'ppm'; choose another name" in refused(tokenizer, capsys, NAME)
    with pytest.raises(PruneZooError, match="method is 'ppm', not 'one_d_piece'"):
        OneDPiece.from_pretrained(NAME)
