"""`python -m trainers.schedule`: what it makes is what the methods take."""

import pytest
import torch

from prunezoo import PruneZooError, build_pruner, load_pruner
from prunezoo.core.schedule import Schedule
from trainers import schedule as command
from trainers.benchmarking.flops import counted_flops
from trainers.cli.names import CHECKPOINTS
from trainers.planning.costs import blocks_of, layer_costs, tower_costs


def test_by_hand_and_shown(tmp_path, capsys):
    path = tmp_path / "s.json"
    words = f"hand --stage vision --available 144 --counts 144 96 64 36 --out {path}"
    assert command.main(words.split()) == 0
    assert Schedule.load(path) == Schedule("vision", 144, (144, 96, 64, 36))
    assert command.main(["show", str(path)]) == 0
    assert "144 96 64 36" in capsys.readouterr().out
    pruner = load_pruner(f"tome?schedule={path}&metric=states")
    steps = pruner.steps(torch.tensor([36]), torch.tensor([144]), 4)
    assert [int(step) for step in steps] == [144, 96, 64, 36] and pruner.config.metric == "states"


def test_precrop_meets_its_share(tmp_path):
    tower, layers = tmp_path / "tower.json", tmp_path / "layers.json"
    assert command.main(f"precrop --vlm tiny-llava --share 1/2 --vision {tower} --layer {layers}".split()) == 0
    one, two = Schedule.load(tower), Schedule.load(layers)
    assert one.stage == "vision" and two.stage == "layer" and one.available == two.available == 144
    assert len(set(one.counts)) == 1 and one.counts[0] >= two.counts[0]
    load_pruner(f"pyramiddrop?schedule={layers}")


def test_what_diffrate_learned_serves_others(tmp_path):
    pruner = build_pruner("diffrate", blocks=4, tokens=144)
    with torch.no_grad():
        for row, count in enumerate((100, 60, 20)):
            pruner.merge[row, (pruner.candidates == count).nonzero()] = 1000
            pruner.drop[row, 0] = 1000
    folder, path = pruner.save_pretrained(tmp_path / "rates"), tmp_path / "s.json"
    assert command.main(f"read {folder} --out {path}".split()) == 0
    assert Schedule.load(path) == Schedule("vision", 144, (144, 100, 60, 20), "diffrate")
    load_pruner(f"gtp?schedule={path}")
    with pytest.raises(PruneZooError, match="learns no schedule"):
        command.read_trained("tome")


@pytest.mark.parametrize(
    ("name", "depth"), [("tome", 4), ("flowcut", 4), ("vflowopt?second=0.5", 5), ("pyramiddrop", 5)]
)
def test_what_a_method_does_by_itself_serves_others(tmp_path, name, depth):
    file = tmp_path / "own.json"
    assert (
        command.main(["of", name, "--vlm", str(CHECKPOINTS / "tiny-llava"), "--keep", "1/2", "--out", str(file)]) == 0
    )
    schedule = Schedule.load(file)
    assert schedule.available == 144 and len(schedule.counts) == depth and schedule.counts[-1] < 144
    asked, found = torch.tensor([72]), torch.tensor([144])
    own = load_pruner(name)
    before = [int(left) for left in own.steps(asked, found, depth)]
    least = [min(before[: number + 1]) for number in range(len(before))]  # one that only looks leaves what it finds
    assert [schedule.counts[place] for place in own.stages(depth)] == least
    other = load_pruner(f"{'tome' if own.stage == 'vision' else 'pyramiddrop'}?schedule={file}")
    taken = [int(left) for left in other.steps(torch.tensor([schedule.counts[-1]]), found, depth)]
    assert taken == [schedule.counts[place] for place in other.stages(depth)]


def test_a_method_that_acts_once_has_no_schedule(tmp_path, capsys):
    words = ["of", "divprune", "--vlm", str(CHECKPOINTS / "tiny-llava"), "--keep", "1/2", "--out", str(tmp_path / "s")]
    with pytest.raises(SystemExit):
        command.main(words)
    assert "acts once, at the prompt stage: name one of the vision or layer stage" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_costs_are_what_torch_counts(tiny_llava):
    vlm, tokens = tiny_llava.vlm, 36
    tower = vlm.model.vision_tower
    block = tower.encoder.layers[0]
    states = torch.randn(1, tokens, tower.config.hidden_size)
    _, counted = counted_flops(lambda: block(states, None))
    assert tower_costs(tower.config, tokens) == counted
    text = torch.randn(1, tokens, vlm.config.text_config.hidden_size)
    depth = vlm.config.text_config.num_hidden_layers
    _, counted = counted_flops(lambda: vlm.model.language_model(inputs_embeds=text))
    assert depth * layer_costs(vlm.config.text_config, tokens) == counted
    assert blocks_of(vlm.config) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("precrop --vlm tiny-llava --share 3/2", "--share 1.5"),
        ("hand --stage vision --available 9 --counts 4 5 --out x.json", "never rise"),
        ("show none.json", "none.json"),
    ],
)
def test_mistakes_end_in_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(words.split())
    said = capsys.readouterr().err
    assert stop.value.code == 2 and message in said and said.count("\n") == 1
