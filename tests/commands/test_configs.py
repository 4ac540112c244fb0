"""Every recipe in `configs/` parses against the code that it names; so none can rot."""

import sys
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from trainers import fit
from trainers.pretraining.train import train

ROOT = Path(__file__).parent.parent.parent
STRATEGIES = sorted((ROOT / "configs" / "strategy").glob("*.yaml"))
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
TRAINED_BY_FIT = [path for path in RECIPES if "model" in yaml.safe_load(path.read_text())]
PRETRAINED = [path for path in RECIPES if path not in TRAINED_BY_FIT]


class ParseOnly(fit.FitCLI):
    """Stops before any model is loaded."""

    def instantiate_classes(self):
        self.datamodule = self.model = self.trainer = None


def parse(monkeypatch, *words):
    monkeypatch.setattr(fit, "FitCLI", ParseOnly)
    monkeypatch.setattr(sys, "argv", ["fit"])
    return fit.build([str(word) for word in words]).config


@pytest.mark.parametrize("path", TRAINED_BY_FIT, ids=lambda path: path.stem)
def test_every_recipe_parses(path, monkeypatch):
    config = parse(monkeypatch, f"--config={path}")
    assert config.data.init_args.get("vlm") == config.model.init_args.get("vlm")  # a tokenizer has none
    assert config.trainer.default_root_dir.startswith(config.out)


@pytest.mark.parametrize("path", PRETRAINED, ids=lambda path: path.stem)
def test_every_pretraining_recipe_parses(path):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_function_arguments(train)
    config = parser.parse_args([f"--config={path}"])
    phases = [config.tower, *(config.several or config.stages or [config.language])]
    assert phases[-1] is not None and all(phase.steps > 0 for phase in phases if phase is not None)


def test_recipes_are_of_both_kinds():
    assert len(TRAINED_BY_FIT) > 20 and {path.stem for path in PRETRAINED} >= {"tiny_llava", "small_llava"}
    assert sorted([*RECIPES, *STRATEGIES]) == sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda path: path.stem)
def test_every_strategy_goes_with_a_recipe(strategy, monkeypatch):
    config = parse(monkeypatch, f"--config={ROOT / 'configs' / 'ppm_llava.yaml'}", f"--config={strategy}")
    assert config.trainer.strategy not in ("auto", None) and config.trainer.max_steps == 20000
    said = yaml.safe_load(strategy.read_text())["trainer"]["strategy"]
    assert said == "ddp" or config.trainer.strategy.class_path == said["class_path"]


@pytest.mark.parametrize("name", ["ppm_tiny", "ppm_llava"])
def test_recipes_can_be_overridden(name, monkeypatch):
    config = parse(
        monkeypatch,
        f"--config={ROOT / 'configs' / f'{name}.yaml'}",
        "--trainer.max_steps=7",
        "--model.pruner.config.blocks=5",
        "--out=elsewhere",
        "--seed_everything=4",
    )
    assert config.trainer.max_steps == 7 and config.model.init_args.pruner.init_args.config.blocks == 5
    assert config.export.folder == "elsewhere" and config.checkpoint.dirpath.startswith("elsewhere")
    assert config.seeds.seed == 4 and config.data.init_args.seed == 4


def test_a_second_config_wins(monkeypatch, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("model:\n  init_args:\n    lr: 0.5\n")
    config = parse(monkeypatch, f"--config={ROOT / 'configs' / 'ppm_tiny.yaml'}", f"--config={other}")
    assert config.model.init_args.lr == 0.5 and config.model.init_args.vlm == "checkpoints/tiny-llava"
