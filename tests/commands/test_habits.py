"""What makes the commands pleasant: short names, helps that read well, errors in one line with the remedy, the list."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from prunezoo.core.errors import PruneZooError
from prunezoo.core.registry import list_pruners
from trainers import benchmark, codec, demo, evaluate, fit, show
from trainers import list as zoo
from trainers.cli import names
from trainers.cli.names import CHECKPOINTS, ROOT, find_config, find_folder, find_pruner, find_vlm
from trainers.pretraining.train import Phase
from trainers.upkeep import first_token, policy_record, readme, step_cost, stop_curve, unpickle

COMMANDS = (
    "evaluate",
    "harness",
    "benchmark",
    "publish",
    "cards",
    "list",
    "show",
    "fit",
    "slim",
    "teacher",
    "stop_rule",
    "search",
    "serve",
)


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_short_names_stand_for_what_ships(monkeypatch, tmp_path):
    assert find_pruner("ppm") == find_pruner("ppm-tiny") == "checkpoints/ppm-tiny"
    assert find_pruner("m3") == "checkpoints/m3-tiny"  # not the one with a LoRA, which has a name of its own
    assert find_pruner("ppm?query_aware=true") == "checkpoints/ppm-tiny?query_aware=true"
    assert find_vlm("tiny-llava") == "checkpoints/tiny-llava"
    assert find_config("ppm_tiny") == find_config("ppm_tiny.yaml") == "configs/ppm_tiny.yaml"
    for name in ("divprune", "attention@2", "oracle", "org/ppm", "checkpoints/ppm-tiny"):
        assert find_pruner(name) == name
    assert find_vlm("org/llava") == "org/llava"
    assert find_folder("ppm") == Path("checkpoints/ppm-tiny") and find_folder("tests") == Path("tests")
    assert find_folder("tiny-llava") == Path("checkpoints/tiny-llava")
    monkeypatch.chdir(tmp_path)  # from elsewhere they are found too
    assert find_pruner("ppm") == str(CHECKPOINTS / "ppm-tiny")
    (tmp_path / "ppm").mkdir()
    assert find_pruner("ppm") == "ppm"  # what lies here comes first


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: find_pruner("pmm"), "no pruner is called 'pmm'; did you mean 'ppm'?"),
        (lambda: find_pruner("zzzz"), "no pruner is called 'zzzz'; there are: a"),
        (lambda: find_vlm("tiny-lava"), "no model is called 'tiny-lava'; did you mean 'tiny-llava'?"),
        (lambda: find_config("ppm_tyni"), "no recipe is called 'ppm_tyni'; did you mean 'ppm_tiny'?"),
    ],
)
def test_a_name_that_is_nothing_is_answered_with_the_nearest(call, message):
    with pytest.raises(PruneZooError) as caught:
        call()
    assert str(caught.value).startswith(message)


def test_a_method_stands_for_the_one_pruner_that_ships_of_it(monkeypatch):
    monkeypatch.setattr(names, "methods_shipped", dict)
    with pytest.raises(PruneZooError, match="'m3' is learned and none is shipped: give the folder or Hub id"):
        find_pruner("m3")
    monkeypatch.setattr(names, "methods_shipped", lambda: {"m3-a": "m3", "m3-b": "m3"})
    with pytest.raises(PruneZooError, match="several 'm3' are shipped: say m3-a or m3-b"):
        find_pruner("m3")
    monkeypatch.setattr(names, "methods_shipped", lambda: {"my-m3-tiny": "m3", "m3-tiny": "m3"})
    assert find_pruner("m3").endswith("checkpoints/m3-tiny")
    of_cells = {"patch-classifier": "patch_classifier", "patch-gaps-tiny": "patch_classifier"}
    monkeypatch.setattr(names, "methods_shipped", lambda: of_cells)
    assert find_pruner("patch_classifier").endswith("checkpoints/patch-classifier")
    assert not names.pruners_shipped(), "in front of the tower is no league"
    monkeypatch.setattr(names, "methods_shipped", lambda: {"dtop-tiny": "dtop", "a-clip-tiny": "a_clip"})
    assert names.pruners_shipped() == {"a-clip-tiny": "a_clip"}, "under dtop the language model reads everything"


def test_a_league_asks_one_embedded_model(monkeypatch, tmp_path):
    monkeypatch.setattr(names, "CHECKPOINTS", tmp_path)
    for folder, model in (("m3-tiny", "checkpoints/tiny-llava"), ("hourglass-tiny", "checkpoints/tiny-llava-multi")):
        (tmp_path / folder).mkdir()
        method = folder.removesuffix("-tiny")
        (tmp_path / folder / "config.json").write_text(json.dumps({"method": method, "base_model": {"name": model}}))
    assert names.methods_shipped() == {"hourglass-tiny": "hourglass", "m3-tiny": "m3"}
    assert names.pruners_shipped() == {"m3-tiny": "m3"}
    assert names.pruners_shipped("tiny-llava-multi") == {"hourglass-tiny": "hourglass"}
    assert names.trained_for("hourglass-tiny") == "tiny-llava-multi"


def test_short_names_reach_the_commands(capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--vlm", "tiny-llava", "--pruner", "pmm", "--suite", "scenes"])
    assert capsys.readouterr().err.strip() == "error: no pruner is called 'pmm'; did you mean 'ppm'?"
    config = fit.build(["--config", "ppm_tiny", "--trainer.max_steps=3"]).config
    assert config.model.init_args.vlm == "checkpoints/tiny-llava" and config.trainer.max_steps == 3


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_begins_with_how_to_call_it_and_fits_a_screen(name, capsys):
    main = importlib.import_module("trainers.cards.__main__" if name == "cards" else f"trainers.{name}").main
    with suppress(SystemExit):
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: python -m trainers.{name} ")
    assert len(lines) < 60


def test_the_list_has_every_method_and_what_was_measured(capsys):
    assert zoo.main([]) == 0
    out = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    shipped = names.methods_shipped()
    shown = {name.partition("?")[0] for name in lines}  # some were measured with settings only
    for method in list_pruners():
        assert method in shown or method in shipped.values(), method
    assert lines["ppm-tiny"][1:4] == ["learned", "prompt", "tiny-llava"]
    assert "98.8" in lines["ppm-tiny"] and "2508.17243" in lines["ppm-tiny"]
    assert lines["divprune"][6:10] == ["98.8", "95.6", "83.7", "66.3"]
    assert zoo.main(["ppm"]) == 0
    told = capsys.readouterr().out
    assert (
        "Evidence: paper, in part reconstructed." in told
        and "keep 1/9: 16 tokens, retention 98.8 % (98.1 to 99.6)" in told
    )


def test_the_commands_name_themselves():
    """`python -m trainers` lists the commands, each with what it is for."""
    said = subprocess.run(
        [sys.executable, "-m", "trainers"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for name in COMMANDS:
        assert f"  {name} " in said


VLM, TOKENIZER = "checkpoints/tiny-llava", "checkpoints/one-d-piece-tiny"
EVALUATE = f"--vlm {VLM} --pruner ppm --suite scenes"


@pytest.mark.parametrize(
    ("main", "words", "message"),
    [
        (evaluate.main, f"{EVALUATE} --json FOLDER", "--json FOLDER: a folder is there; name a file"),
        (evaluate.main, f"{EVALUATE} --json FILE/a.json", "--json FILE/a.json: FILE is no folder"),
        (evaluate.main, f"{EVALUATE} --report FILE", "--report FILE: a file is there; name a folder"),
        (evaluate.main, f"{EVALUATE} --card FOLDER", "--card FOLDER: not among what is measured"),
        (benchmark.main, f"--vlm {VLM} --pruner uniform --json FOLDER", "--json FOLDER: a folder is there"),
        (step_cost.main, f"--vlm {VLM} --json FOLDER", "--json FOLDER: a folder is there"),
        (first_token.main, "--size tiny --json FOLDER", "--json FOLDER: a folder is there"),
        (stop_curve.main, f"--vlm {VLM} --pruner x --suite scenes --figure FOLDER", "--figure FOLDER: a folder is"),
        (codec.main, f"speed --tokenizer {TOKENIZER} --json FOLDER", "--json FOLDER: a folder is there"),
        (codec.main, f"measure --tokenizer {TOKENIZER} --images FOLDER --report FILE", "--report FILE: a file is"),
        (show.main, "scenes:3 --out FOLDER", "--out FOLDER: a folder is there"),
        (show.main, "scenes:3 --out FOLDER/kept", "--out FOLDER/kept: not the name of a picture"),
        (show.main, "scenes:3 --serve --port 70000", "--port 70000: a port is a number from 0 to 65535"),
        # found out only when it is written
        (codec.main, f"compress docs/scene.png FOLDER --bytes 96 --tokenizer {TOKENIZER}", "FOLDER: Is a directory"),
        (codec.main, f"compress docs/scene.png FOLDER/a/b --bytes 96 --tokenizer {TOKENIZER}", "No such file or dir"),
    ],
)
def test_a_place_that_cannot_be_written_to_is_refused_before_the_work(main, words, message, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    places = {"FOLDER": str(tmp_path / "folder"), "FILE": str(tmp_path / "file")}
    for name, place in places.items():
        words, message = words.replace(name, place), message.replace(name, place)
    with pytest.raises(SystemExit) as caught:
        main(words.split())
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 2 and line.startswith("error: ") and message in line
    assert (tmp_path / "file").read_text() == "mine" and not any((tmp_path / "folder").iterdir())


@pytest.mark.parametrize(
    ("main", "words", "message"),
    [
        (evaluate.main, f"{EVALUATE} --device foo", "--device foo: cannot be used here (Expected one of cpu"),
        (benchmark.main, "--vlm random:llava-120m --pruner uniform --device foo", "--device foo: cannot be used here"),
        (benchmark.main, "--vlm tiny-llava --pruner ppm-tyni", "called 'ppm-tyni'; did you mean 'ppm-tiny'?"),
        (benchmark.main, "--vlm tiny-llava --pruner m3-tiny --keep auto", "and 'm3' sets none"),
        (benchmark.main, "--vlm tiny-llava --pruner ppm-tiny --keep auto", "is not calibrated: python -m trainers.c"),
        (codec.main, "speed --tokenizer one-d-piece-tiny --device foo", "--device foo: cannot be used here"),
        (codec.main, "speed --tokenizer one-d-piece-tiny --repeats 0", "--repeats 0: at least 1"),
        (codec.main, "speed --tokenizer one-d-piece-tiny --batch 0", "--batch 0: at least 1"),
        (codec.main, "measure --tokenizer one-d-piece-tiny --images docs --limit 0", "--limit 0: at least 1"),
        (step_cost.main, "--vlm tiny-llava --repeats 0", "--repeats 0: at least 1"),
        (first_token.main, "--size tiny --threads 0", "--threads 0: at least 1"),
        (step_cost.main, "--vlm tiny-llava --batch 0", "--batch 0: at least 1"),
        (step_cost.main, "--vlm tiny-lava", "no model is called 'tiny-lava'; did you mean 'tiny-llava'?"),
        (stop_curve.main, "--vlm tiny-llava --pruner tail_drop --suite scenes --mean 0", "--mean 0: at least 1"),
        (stop_curve.main, "--vlm tiny-lava --pruner tail_drop --suite scenes", "did you mean 'tiny-llava'?"),
        (stop_curve.main, "--vlm tiny-llava --pruner ppm --suite scenes", "ppm-tiny: a stop rule is for 'tail_drop'"),
        (demo.main, "--steps 0", "--steps 0: at least 1"),
        (demo.main, "--limit 0", "--limit 0: at least 1"),
        (demo.main, "--out FOLDER/config.json/demo", "FOLDER/config.json is no folder"),
        (policy_record.main, "checkpoints/policy-tiny --updates 0", "--updates 0: at least 1"),
        (policy_record.main, "FOLDER", "FOLDER/run.json: not readable JSON"),
        (unpickle.main, "FOLDER/run.json x --yes", "FOLDER/run.json: refused by torch's weights-only loader"),
        (evaluate.main, "--vlm FOLDER --pruner uniform --suite scenes", "--vlm FOLDER: not a loadable image-text-to"),
        (stop_curve.main, "--vlm FOLDER --pruner tail_drop --suite scenes --limit 7 --cache FOLDER/c", "from 'FOLDER'"),
    ],
)
def test_mistakes_are_one_line_in_every_command(main, words, message, tmp_path, capfd):
    shutil.copytree(VLM, tmp_path / "cut")
    os.truncate(tmp_path / "cut" / "model.safetensors", 5000)
    (tmp_path / "cut" / "run.json").write_text("hello")
    words, message = (text.replace("FOLDER", str(tmp_path / "cut")) for text in (words, message))
    with pytest.raises(SystemExit) as caught:
        main(words.split())
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert caught.value.code == 2 and line.startswith("error: ") and message in line


def test_asking_the_table_maker_for_help_writes_nothing(monkeypatch, capsys):
    monkeypatch.setattr(readme, "PAGES", {})
    assert readme.main([]) == 0
    monkeypatch.setattr(readme, "PAGES", None)  # a page that were read now would fail
    for words, code in ((["--help"], 0), (["--hlep"], 2)):
        with pytest.raises(SystemExit) as caught:
            readme.main(words)
        assert caught.value.code == code
    assert capsys.readouterr().out.startswith("usage: python -m trainers.upkeep.readme")


@pytest.mark.parametrize("words", ["list", "fit --help"])
def test_a_terminal_that_knows_ascii_alone_is_written_to(words):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", *f"trainers.{words}".split()]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "ppm" in done.stdout and "?" in done.stdout, done.stderr


def test_what_trains_the_frozen_model_is_no_recipe_of_pruners(capsys):
    fit.main(["--help"])
    said = capsys.readouterr().out
    assert "tail_drop_tiny" in said and "tiny_llava" not in said
    with pytest.raises(PruneZooError, match="steps=0 of a phase: at least 1"):
        Phase(steps=0, batch_size=2)


def test_ctrl_c_is_no_traceback(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(stop_curve, "load_suite", interrupted)
    with pytest.raises(SystemExit) as caught:
        stop_curve.main("--vlm tiny-llava --pruner tail_drop --suite scenes".split())
    assert caught.value.code == 130 and capsys.readouterr().err.strip() == "stopped"


def test_a_disk_that_is_full_leaves_what_was_there_and_names_the_file(tmp_path):
    """A limit on the size of files does what a full disk does, in a process of its own."""
    (tmp_path / "record.json").write_text("mine")
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "from trainers.cli.errors import command\n"
        "from trainers.evaluation.record import write_record\n"
        f"command(write_record)({{'rows': 'x' * 5000}}, {str(tmp_path / 'record.json')!r})"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'record.json'}: too big")
    assert (tmp_path / "record.json").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
