"""The command that measures a GPU, on tiny models and the CPU: the same code, all parts."""

import json

import pytest
import torch

from trainers.benchmarking import parity
from trainers.benchmarking.gpu_table import gpu_section, read_gpu
from trainers.benchmarking.shapes import SHAPES, MadeUp
from trainers.upkeep import gpu, readme

PRUNERS = ("divprune", "fastervlm")


def measured(folder, *options):
    path = folder / "gpu.json"
    assert gpu.main(["--device", "cpu", "--tiny", "--json", str(path), "--pruner", *PRUNERS, *options]) == 0
    return json.loads(path.read_text("utf-8"))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_requests_have_the_tokens_that_are_asked_for(shape):
    vlm = shape.build(True, "cpu", torch.float32)
    for tokens in (16, 32):
        request = MadeUp(vlm, shape, 2, tokens, 5)
        batch = request()
        assert (batch["input_ids"] == vlm.config.image_token_id).sum(1).tolist() == [tokens] * 2
        assert batch["input_ids"].shape == (2, request.columns) and request.length == request.columns - tokens
        with torch.no_grad():
            assert vlm(**batch).logits.shape[:2] == (2, request.columns)


def test_all_parts_are_measured_and_told(tmp_path, monkeypatch):
    record = measured(tmp_path, "--minutes", "30", "--part", SHAPES[0].name, SHAPES[1].name, "stalls", "training")
    parts = record["parts"]
    assert not any(part["not_run"] for part in parts.values())
    rows = parts[SHAPES[0].name]["rows"]
    settings = {(row["batch"], row["image_tokens"], row["keep"], row["decode"]) for row in rows if "decode" in row}
    assert {(1, 16, "1/9", 2), (1, 16, "1/9", 4), (2, 16, "1/9", 2), (1, 32, "1/9", 2), (1, 16, "1/18", 2)} <= settings
    assert {row["part"] for row in rows} >= {"vision", "pruner", "prefill", "first_token", "end_to_end", "peak_memory"}
    bare, pruned = (
        next(row for row in rows if row["pruner"] == name and row["part"] == "prefill") for name in ("bare", "divprune")
    )
    # 3 layers, keys and values, 2 heads of 16, float32; 24 words
    assert bare["kv_bytes"] == (16 + 24) * 3 * 2 * 2 * 16 * 4 and pruned["kv_bytes"] == bare["kv_bytes"] * 26 // 40
    even = [row["pruner"] for row in rows if row["part"] == "break_even" and row["keep"] == "1/9"]
    assert even == list(PRUNERS)
    assert "fastervlm" in parts[SHAPES[1].name]["refused"], "there is no CLS in Qwen2.5-VL's tower"
    waits = {row["pruner"]: row["waits"] for row in parts["stalls"]["rows"]}
    assert waits["bare"] <= waits["divprune"] <= waits["bare"] + 2
    (training,) = parts["training"]["rows"]
    assert training["step_over_floor"] > 1 and training["hours"] > 0 and training["planned_bytes"] > 0
    text = gpu_section(read_gpu(tmp_path / "gpu.json"))
    assert "| `divprune` | 1 | 16 | 1/9 |" in text and "A step of distillation" in text and "`divprune` " in text
    monkeypatch.setattr(readme, "GPUS", tmp_path)
    assert readme.gpu() == text
    monkeypatch.setattr(readme, "GPUS", tmp_path / "none")
    assert readme.gpu() == "No GPU has been measured yet.\n"


def test_a_device_that_computes_something_else_is_seen(monkeypatch):
    rows = list(parity.parity("cpu", gpu.built, lambda: None, ("uniform",)))
    assert all(row["error"] < 1e-4 for row in rows if "error" in row)
    assert {row["way"] for row in rows} >= {"sdpa", "eager", "static cache"}
    assert all(row["agreement"] == 1 for row in rows if row["way"] in ("sdpa", "static cache") and "agreement" in row)
    one = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])
    assert parity.agreement(one, torch.tensor([[1, 2, 0, 4], [1, 2, 3, 4]])) == 0.75


def test_what_does_not_fit_is_listed(tmp_path):
    parts = measured(tmp_path, "--minutes", "0", "--part", "parity", "stalls", SHAPES[2].name)["parts"]
    assert all(not part["rows"] for part in parts.values())
    assert parts["stalls"]["not_run"] == ["bare", *PRUNERS]
    assert "batch 1, 16 image tokens, keep 1/9, 2 new tokens" in parts[SHAPES[2].name]["not_run"]


def test_without_a_gpu_it_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    assert gpu.main([]) == 0 and "no GPU is at hand" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
