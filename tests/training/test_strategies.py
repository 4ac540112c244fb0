"""Two processes on CPUs, under every strategy of `configs/strategy`, train the embedded recipe as one process does."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from launch import Run
from safetensors.torch import load_file

from prunezoo import AutoPruner

ROOT = Path(__file__).parent.parent.parent
STEPS, HALF = 20, 10
DEEPSPEED = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
STRATEGIES = ["ddp", "fsdp2", *(pytest.param(f"zero{stage}", marks=DEEPSPEED) for stage in (1, 2, 3, "3_offload"))]
SHARED = ("fsdp2", "zero3", "zero3_offload")
# Sums of float32 in another order, 20 steps of AdamW long; a wrong share or average is off by parts of a hundred.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def fit(out: Path, processes: int, *extra: str, strategy: str | None = None) -> Path:
    """Run the recipe, with nothing in it that is drawn apart in each process, at a global batch of 4."""
    out.mkdir(exist_ok=True)
    words = [
        f"--config={ROOT / 'configs' / 'ppm_tiny.yaml'}",
        *([f"--config={ROOT / 'configs' / 'strategy' / f'{strategy}.yaml'}"] if strategy else []),
        f"--model.vlm={ROOT / 'checkpoints' / 'tiny-llava'}",
        "--model.guide=attention",
        "--model.guide_layer=2",
        "--model.guide_share=0.5",
        "--model.keep=[0.2,0.2]",
        f"--data.batch_size={4 // processes}",
        "--data.workers=0",
        "--data.validation_items=8",
        f"--trainer.max_steps={STEPS}",
        "--trainer.limit_val_batches=0",
        "--trainer.precision=32-true",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        "--trainer.callbacks+=spies.Losses",
        f"--trainer.callbacks.folder={out}",
        f"--checkpoint.every_n_train_steps={HALF}",
        f"--out={out}",
        *extra,
    ]
    Run(words, out.parent / f"{out.name}.log", processes).finish()
    return out


def losses(out: Path) -> torch.Tensor:
    """The mean over processes, (steps,)."""
    files = [path.read_text().splitlines() for path in sorted(out.glob("losses.*"))]
    return torch.tensor([[float(line.split()[1]) for line in lines] for lines in files], dtype=torch.float64).mean(0)


def checkpoint(out: Path) -> Path:
    return out / "training" / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("single"), 1)


@pytest.fixture(scope="module")
def spread(single, tmp_path_factory):
    """The folder of a run under a strategy, made when first asked for."""
    made: dict[str, Path] = {}

    def run(strategy: str) -> Path:
        if strategy not in made:
            out = tmp_path_factory.mktemp(strategy)
            other = (
                f"--trainer.callbacks.checkpoint={checkpoint(single)}",
                f"--trainer.callbacks.folder={out / 'other'}",
            )
            every = (
                "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
                *(
                    f"--trainer.callbacks.{key}={value}"
                    for key, value in {"dirpath": out, "filename": "{step}", "every_n_train_steps": HALF}.items()
                ),
            )
            extra = "--trainer.callbacks+=spies.ExportOther", *other, *every, "--trainer.callbacks.save_top_k=-1"
            made[strategy] = fit(out, 2, *extra, strategy=strategy)
        return made[strategy]

    return run


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_train_as_one_does(strategy, single, spread):
    out = spread(strategy)
    ours, theirs = losses(out), losses(single)
    assert len(ours) == len(theirs) == STEPS and (theirs[0] - theirs[HALF - 1]).abs() > 0.1, "nothing was learnt"
    torch.testing.assert_close(ours, theirs, **CLOSE)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_frozen_model_is_shared_out_where_parameters_are_and_never_trained(strategy, single, spread):
    """Halves may be filled up to be equal."""
    shares = [[int(word) for word in path.read_text().split()] for path in sorted(spread(strategy).glob("share.*"))]
    ((whole, _),) = [[int(word) for word in path.read_text().split()] for path in single.glob("share.*")]
    assert len(shares) == 2 and [trained for _, trained in shares] == [0, 0]
    for kept, _ in shares:
        assert kept == pytest.approx(whole / 2, rel=0.01) if strategy in SHARED else kept == whole


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_export_has_the_same_bits_whichever_strategy_wrote_it(strategy, single, spread):
    """All of them are given the weights of one checkpoint; beforehand, theirs were others."""
    out = spread(strategy)
    wanted = torch.load(checkpoint(single), weights_only=False)["state_dict"]
    written, before = load_file(out / "other" / "model.safetensors"), load_file(out / "model.safetensors")
    assert {f"pruner.{name}" for name in written} == wanted.keys()
    assert all(torch.equal(written[name], wanted[f"pruner.{name}"]) for name in written)
    assert any(not torch.equal(written[name], before[name]) for name in written), "nothing was loaded"
    assert (out / "other" / "model.safetensors").read_bytes() == (single / "model.safetensors").read_bytes()
    assert AutoPruner.from_pretrained(out).name == "ppm"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_checkpoint_is_one_file_with_the_pruner_alone(strategy, single, spread):
    ours, theirs = (torch.load(checkpoint(out), weights_only=False) for out in (spread(strategy), single))
    assert {name: value.shape for name, value in ours["state_dict"].items()} == {
        name: value.shape for name, value in theirs["state_dict"].items()
    }
    exported = load_file(spread(strategy) / "model.safetensors")
    assert all(torch.equal(ours["state_dict"][f"pruner.{name}"], value) for name, value in exported.items())
    (mine,), (plain,) = ours["optimizer_states"], theirs["optimizer_states"]
    assert mine["state"].keys() == plain["state"].keys()
    for number, state in plain["state"].items():
        for key, value in state.items():
            torch.testing.assert_close(mine["state"][number][key], value, rtol=1e-2, atol=1e-4)


HANDED_ON = [
    ("ddp", "fsdp2"),
    ("fsdp2", None),
    pytest.param("zero3", "zero1", marks=DEEPSPEED),
    pytest.param("fsdp2", "zero3", marks=DEEPSPEED),
]


@pytest.mark.parametrize(("first", "second"), HANDED_ON)
def test_one_strategy_goes_on_where_another_stopped(first, second, single, spread, tmp_path):
    """From the middle; on one process, where no strategy is named."""
    middle = spread(first) / f"step={HALF}.ckpt"
    out = fit(tmp_path / "on", 2 if second else 1, f"--ckpt_path={middle}", strategy=second)
    torch.testing.assert_close(losses(out), losses(single)[HALF:], **CLOSE)
