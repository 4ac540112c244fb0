"""`--rivals` on a model that cannot have all of them: the rest is measured, and what was left out is said."""

import pytest
import torch
from fake_suite import FakeSuite
from PIL import Image
from tiny_llava import IMAGE_SIZE, PATCH, make_llava, make_processor
from transformers import LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

from prunezoo import build_pruner
from trainers import evaluate, show
from trainers.data import suite as suites
from trainers.evaluation.record import read_record

WHY = "this vision tower has no CLS token"


@pytest.fixture(scope="module")
def without_cls(tmp_path_factory):
    """A LLaVA with a SigLIP tower, as a folder."""
    folder = tmp_path_factory.mktemp("siglip")
    vision = SiglipVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=IMAGE_SIZE,
        patch_size=PATCH, vision_use_head=False,
    )  # fmt: skip
    config = make_llava().config
    own = LlavaConfig(
        vision_config=vision, text_config=config.text_config, image_token_id=config.image_token_id,
        vision_feature_layer=-1, vision_feature_select_strategy="full", image_seq_length=(IMAGE_SIZE // PATCH) ** 2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlavaForConditionalGeneration(own).save_pretrained(folder)
    processor = make_processor()
    processor.vision_feature_select_strategy, processor.num_additional_image_tokens = "full", 0
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def fake_suite(monkeypatch):
    monkeypatch.setitem(suites._SUITES, "fake", FakeSuite)


def test_rivals_that_a_tower_cannot_have_are_left_out_and_named(without_cls, tmp_path, capsys):
    pruner = build_pruner("ppm", width=32)
    pruner.save_pretrained(tmp_path / "own")
    words = [
        "--vlm",
        str(without_cls),
        "--pruner",
        str(tmp_path / "own"),
        "--rivals",
        "--keep",
        "1/9",
        "--suite",
        "fake",
    ]
    words += ["--limit", "6", "--json", str(tmp_path / "e.json"), "--report", str(tmp_path / "report")]
    assert evaluate.main([*words, "--card", str(tmp_path / "own")]) == 0
    record = read_record(tmp_path / "e.json")
    (left,) = record["left_out"]
    assert left["pruner"] == "fastervlm" and left["why"].startswith(WHY)
    measured = {row["pruner"] for row in record["rows"]}
    assert measured == {str(tmp_path / "own"), "full", "none", "random", "uniform", "pool", "resize", "divprune"}
    said = f"Left out, since this model cannot have them: fastervlm ({WHY}"
    assert said in " ".join(capsys.readouterr().out.split())
    assert said in (tmp_path / "own" / "README.md").read_text()
    assert said in (tmp_path / "report" / "index.html").read_text()


def test_one_that_was_asked_for_by_name_is_refused_before_anything_is_measured(without_cls, tmp_path, capsys):
    words = ["--vlm", str(without_cls), "--keep", "1/9", "--suite", "fake", "--json", str(tmp_path / "e.json")]
    for named in (["--pruner", "uniform", "fastervlm"], ["--pruner", "fastervlm", "--rivals"]):
        with pytest.raises(SystemExit) as caught:
            evaluate.main([*words, *named])
        assert caught.value.code == 2
        assert f"error: --pruner fastervlm: {WHY}" in capsys.readouterr().err
    assert not (tmp_path / "e.json").exists()


def test_what_shows_one_picture_names_the_pruner_too(without_cls, tmp_path, capsys):
    Image.new("RGB", (24, 24)).save(tmp_path / "p.png")
    words = [
        str(tmp_path / "p.png"),
        "what ?",
        "--vlm",
        str(without_cls),
        "--keep",
        "4",
        "--out",
        str(tmp_path / "o.png"),
    ]
    with pytest.raises(SystemExit):
        show.main([*words, "--pruner", "uniform", "fastervlm"])
    assert f"error: --pruner fastervlm: {WHY}" in capsys.readouterr().err
