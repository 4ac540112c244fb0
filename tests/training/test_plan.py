"""Plans, against what really happens: memory at its peak, operations, parameters."""

import copy
import json
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from tiny_llava import make_image

from prunezoo import PruneZooError, build_pruner, encode
from prunezoo.host import gated_forward
from trainers import plan
from trainers.benchmarking.flops import counted_flops
from trainers.benchmarking.memory import peak_memory
from trainers.benchmarking.models import Request, load_model
from trainers.planning.models import KNOWN, load_config
from trainers.planning.simulate import count_weights, run, simulate
from trainers.training.distill import DistillModule
from trainers.upkeep import step_cost
from trainers.upkeep.step_cost import OneBatch, with_labels

ROOT = Path(__file__).parent.parent.parent
RECIPE = f"--config={ROOT / 'configs' / 'ppm_llava.yaml'}"


@pytest.mark.parametrize("recompute", [False, True])
def test_the_peak_of_a_real_step_is_foretold(recompute, tmp_path):
    """Of a model of 125 M parameters, within 15 %: student, logits, gradients and AdamW of the pruner."""
    vlm, processor = load_model("random:llava-120m", "cpu", "float32")
    batch = with_labels(Request(vlm, processor, 1, 32, (640, 480))())
    vlm.save_pretrained(tmp_path / "vlm")
    pruner = build_pruner("ppm", width=768, hidden=64)
    second_stage = {"guide_share": 0.0, "guide_weight": 0.0}
    module = DistillModule(
        str(tmp_path / "vlm"), pruner, vlm_dtype="float32", recompute=recompute, **second_stage
    )  # fmt: skip
    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, default_root_dir=tmp_path,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    del vlm
    measured = peak_memory(torch.device("cpu"), lambda: trainer.fit(module, datamodule=OneBatch(batch, 1)))
    trained = sum(p.numel() for p in pruner.parameters())
    text = module.vlm.config.get_text_config()
    passes = simulate(
        text, torch.float32, 1, batch["input_ids"].shape[1], autocast=False, fused=False, recompute=recompute
    )
    foretold = passes.student_bytes + 12 * trained
    print(f"measured {measured / 2**20:.1f} MiB, foretold {foretold / 2**20:.1f} MiB")
    assert measured > 50 * 2**20 and foretold == pytest.approx(measured, rel=0.15)


def test_what_is_computed_anew_gives_the_same_gradients(tiny_llava_folder, tiny_llava):
    torch.manual_seed(0)
    pruner = build_pruner("ppm", width=32, hidden=16, heads=2, blocks=1, text_blocks=1)
    prompts = ["<s> USER: <image> what color is the ball ? ASSISTANT: red </s>"]
    batch = tiny_llava.batch(prompts, [[make_image(0)]])
    grads, kept = [], []
    for recompute in (False, True):
        module = DistillModule(str(tiny_llava_folder), pruner, recompute=recompute)
        encoded = encode(module.vlm, batch)
        gates = torch.full(encoded.inputs.valid.shape, 0.5, requires_grad=True)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            logits = gated_forward(module.vlm, encoded, gates).logits
        grads.append(torch.autograd.grad(logits[:, -1].square().sum(), gates)[0])
        kept.append(sum(saved))
        assert not any(
            part.training for part in module.vlm.modules() if isinstance(part, torch.nn.Dropout | torch.nn.Linear)
        )
    assert torch.equal(*grads) and grads[0].abs().max() > 0
    assert kept[1] < 0.5 * kept[0], "nothing was left out"


def test_two_shallow_decoders_tell_of_a_deep_one(tiny_llava):
    text = copy.deepcopy(tiny_llava.vlm.config.get_text_config())
    text.num_hidden_layers = 9
    told, real = simulate(text, torch.float32, 2, 50, False), run(text, torch.float32, 2, 50, False)
    for name, value in vars(real).items():
        assert getattr(told, name) == pytest.approx(value, rel=1e-6), name
    assert told.student_bytes > 2 * told.teacher_bytes


def test_operations_and_parameters_are_those_of_the_real_model(deep_llava):
    vlm, text = deep_llava.vlm, deep_llava.vlm.config.get_text_config()
    embeddings = torch.randn(2, 50, text.hidden_size, requires_grad=True)
    mask = torch.zeros(2, 1, 50, 50)

    def both():
        vlm(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).logits[:, -8:].sum().backward()

    _, flops = counted_flops(both)
    told = simulate(text, torch.float32, 2, 50, False)
    assert told.forward_flops + told.backward_flops == pytest.approx(flops, rel=1e-6)
    weights = count_weights(vlm.config)
    assert weights.vision + weights.language == sum(p.numel() for p in vlm.parameters())
    assert weights.layer == sum(p.numel() for p in vlm.get_decoder().layers[0].parameters())


@pytest.fixture
def planned(monkeypatch):
    """The numbers of a plan."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "argv", ["plan"])

    def make(*words: str, gpus: int = 8, strategy: str | None = None, image_tokens: int | None = None):
        sizes = {"text_tokens": 64, "image_tokens": image_tokens, "items": None}
        args = plan.argparse.Namespace(gpus=gpus, tflops=300, memory=80, **sizes)
        second = [f"--config={ROOT / 'configs' / 'strategy' / f'{strategy}.yaml'}"] if strategy else []
        job, _ = plan.make_job(args, [RECIPE, *second, *words])
        return plan.plan(job, 300, None)

    return make


def test_what_is_shared_out_gets_smaller_with_more_processes(planned):
    found = {name: planned(strategy=name)["memory"] for name in ("ddp", "zero1", "zero2", "zero3", "fsdp2")}
    for part, first in (("AdamW", "zero1"), ("gradients", "zero2"), ("pruner", "zero3"), ("frozen model", "zero3")):
        names = list(found)
        shared = [name for name in names if found[name][part] < found["ddp"][part]]
        assert shared == names[names.index(first) :], part
        assert found[shared[0]][part] == pytest.approx(found["ddp"][part] / 8)
    assert found["zero3"]["frozen model, gathered for the moment"] > 0


@pytest.mark.parametrize(("name", "billions"), list(zip(KNOWN, (7.06, 13.35, 8.0, 73.2), strict=True)))
def test_models_of_all_sizes_are_planned_from_sizes_alone(name, billions, planned):
    found = planned(f"--model.vlm={name}", strategy="zero3", image_tokens=729)
    sizes = found["parameters"]
    assert sizes["vision"] + sizes["language"] == pytest.approx(billions * 1e9, rel=0.03)
    assert found["hours"] > 0 and sum(found["memory"].values()) > 2 * sizes["language"] / 8
    assert found["flops_per_step"]["second stage"] > found["flops_per_step"]["first stage"]


def test_cached_answers_save_the_teachers_pass(planned):
    found = planned("--model.guide_weight=0", "--model.guide_share=0")
    flops = found["flops_per_step"]
    assert 0.6 < flops["second stage, cached answers"] / flops["second stage"] < 0.75
    assert found["hours_cached"] < 0.75 * found["hours"]


def test_the_command_prints_it_all(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plan"])
    tiny = f"--model.vlm={ROOT / 'checkpoints' / 'tiny-llava'}", "--model.pruner.config.width=128"
    plan.main([RECIPE, *tiny, "--gpus", "2", "--memory", "0.001"])
    said = " ".join(capsys.readouterr().out.split())
    for words in (
        "memory of a GPU: ddp on 2",
        "together",
        "its own config.json",
        "more than the 0.001 GiB",
        "hours at",
    ):
        assert words in said


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--model.vlm=/nowhere/at/all"], "no configuration of '/nowhere/at/all'"),
        (["--gpus", "0"], "--gpus 0: must be above 0"),
        (["--items", "-4"], "--items -4: must be above 0"),
        (["--image-tokens", "0"], "--image-tokens 0: must be above 0"),
        (["--data.batch_size=0"], "data.batch_size=0: at least 1"),
        (["--trainer.strategy=deepspeed_stage_2"], "trainer.strategy=deepspeed_stage_2 is not planned"),
        (["--trainer.max_steps=-1"], "trainer.max_steps must say"),
        ([f"--config={ROOT / 'configs' / 'm3_llava.yaml'}"], "plans are for trainers.training.distill.DistillModule"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(wrong, said, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "argv", ["plan"])
    with pytest.raises(SystemExit):
        plan.main([RECIPE, *wrong] if "m3" not in wrong[0] else wrong)
    assert said in capsys.readouterr().err.strip().splitlines()[-1]


def test_how_many_tokens_an_image_has_must_be_known(planned):
    with pytest.raises(PruneZooError, match="does not say how many tokens an image has: --image-tokens"):
        planned("--model.vlm=llava-hf/llava-onevision-qwen2-7b-ov-hf")


def test_an_unknown_model_names_those_that_are_known(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PruneZooError, match=r"llava-hf/llava-1\.5-7b-hf"):
        load_config("/nowhere")


def test_the_cost_of_a_step_is_measured_beside_its_floor(tiny_llava_folder, tmp_path, capsys):
    """That it runs and says all it should; times are not for tests."""
    step_cost.main(
        [f"--vlm={tiny_llava_folder}", "--length=10", "--hidden=16", "--repeats=1", f"--json={tmp_path / 'x'}"]
    )
    found = json.loads((tmp_path / "x").read_text())
    assert found["step_over_floor"] > 0 and found["cached_over_step"] > 0 and found["tokens"] == 46
    peaks = found["peak_bytes"]
    assert 0 < peaks["step with model.recompute"] < peaks["step"] and peaks["floor"] > 0
    assert "with the cache" in capsys.readouterr().out
