"""Every JSON and YAML that is read goes through `core/bounds.py` or `cli/recipes.py`: none passes by, each refuses."""

import ast
import json
import os
import signal
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from prunezoo.core.bounds import MOST_DEPTH, MOST_JSON_BYTES, MOST_RECORD_BYTES, parse_json, read_bytes
from prunezoo.core.errors import PruneZooError
from prunezoo.core.files import read_json
from prunezoo.core.registry import split_options
from trainers import pretrain
from trainers.cards import parts, zoo
from trainers.cli import names
from trainers.cli.names import ROOT
from trainers.compression.card import read_measurement
from trainers.data.llava_json import LlavaJson
from trainers.data.shards import ShardedCache
from trainers.data.web_shards import read_index
from trainers.evaluation.record import read_record
from trainers.evaluation.summary import Zoo
from trainers.training.run_record import read_run
from trainers.upkeep import policy_record, readme

BOUNDED = {"modules/prunezoo/core/bounds.py", "trainers/cli/recipes.py"}
PARSERS = {"json": {"load", "loads", "JSONDecoder"}, "yaml": {name for name in vars(yaml) if "load" in name}}
TEXTS = {
    "modules/prunezoo/core/files.py", "modules/prunezoo/core/registry.py", "trainers/data/easy_vqa.py",
    "trainers/data/llava_json.py", "trainers/data/selection/chosen.py", "trainers/data/shards.py",
    "trainers/data/web_shards.py", "trainers/evaluation/search.py", "trainers/evaluation/web.py",
    "trainers/harnessing/jobs.py",
}  # fmt: skip
"""What may parse a text that is no file, or whose file it has bounded itself."""


def passes_by(tree):
    """The places of a file that parse JSON or YAML by themselves."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in PARSERS.get(node.value.id, ()):
                yield f"{node.lineno}: {node.value.id}.{node.attr}"
        elif isinstance(node, ast.ImportFrom):
            taken = PARSERS.get(node.module or "", {"yaml_load"})  # which is jsonargparse's
            yield from (f"{node.lineno}: {name.name}" for name in node.names if name.name in taken)


def sources():
    for folder in ("modules", "trainers"):
        yield from ((str(path.relative_to(ROOT)), path.read_text("utf-8")) for path in (ROOT / folder).rglob("*.py"))


def test_no_reader_passes_by():
    assert list(passes_by(ast.parse("import json\njson.loads('')"))) and len(PARSERS["yaml"]) > 8  # it does see
    files = dict(sources())
    assert all(list(passes_by(ast.parse(files[name]))) for name in BOUNDED)
    found = {name: places for name, text in files.items() if (places := list(passes_by(ast.parse(text))))}
    assert {name: places for name, places in found.items() if name not in BOUNDED} == {}


def test_texts_are_parsed_in_few_places():
    assert {name for name, text in sources() if "parse_json(" in text} - BOUNDED == TEXTS


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A zoo that ships one pruner, `mine`, whose config is to be read."""
    monkeypatch.setattr(names, "CHECKPOINTS", tmp_path)
    monkeypatch.setattr(zoo, "CHECKPOINTS", tmp_path)
    monkeypatch.setattr(parts, "CARDS", tmp_path)
    return tmp_path


def entries():
    zoo.methods_shipped = lambda: {"mine": "ppm"}
    return zoo.entries(Zoo({}, {}, {}))


READERS = {
    "evaluation": ("metrics.json", lambda folder: read_record(folder / "metrics.json")),
    "speed": ("mine/speed.json", lambda folder: parts.speed_of(folder / "mine", "ppm")),
    "speed of all": ("speed.json", lambda folder: parts.speed_of(folder / "mine", "ppm")),
    "stop rule": ("mine/stop_rule.json", lambda folder: parts.stop_rule_of(folder / "mine")),
    "policy": ("mine/policy.json", lambda folder: parts.policy_of(folder / "mine")),
    "run": ("run.json", lambda folder: read_run(folder / "run.json")),
    "run of a policy": ("run.json", policy_record.read_recipe),
    "codec": ("quality.json", lambda folder: read_measurement(folder / "quality.json")),
    "upkeep": ("support.json", lambda folder: readme._read(folder / "support.json", "support")),
    "shipped": ("mine/config.json", lambda _: names.methods_shipped()),
    "shipped models": ("mine/config.json", lambda _: entries()),
    "manifest": ("manifest.json", lambda folder: ShardedCache(folder, {}, 4, 2, "make it")),
    "annotations": ("a.json", lambda folder: LlavaJson(folder / "a.json", folder)),
    "annotation lines": ("a.jsonl", lambda folder: LlavaJson(folder / "a.jsonl", folder)),
}

DEEP = "[" * (MOST_DEPTH + 2) + "]" * (MOST_DEPTH + 2)
BAD = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "deep": lambda path: path.write_text(DEEP),
    "deeper": lambda path: path.write_text("[" * 200_000),
    "twice": lambda path: path.write_text('{"a": 1, "a": 2}'),
    "no text": lambda path: path.write_bytes(b"\xff\xfe{}"),
    "cut": lambda path: path.write_text('{"rows": ['),
    "other": lambda path: path.write_text("7"),
}


@contextmanager
def soon():
    """What waits for a pipe is interrupted."""

    def stop(*_):
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(10)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("reader", READERS)
def test_each_reader_refuses_in_one_line(reader, kind, repository, monkeypatch):
    monkeypatch.setattr(zoo, "methods_shipped", zoo.methods_shipped)
    name, read = READERS[reader]
    (repository / "mine").mkdir()
    BAD[kind](repository / name)
    with soon(), pytest.raises(PruneZooError, match=Path(name).name) as caught:
        read(repository)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("reader", [name for name in READERS if not name.startswith("annotation")])
def test_each_reader_looks_at_the_size_first(reader, repository, monkeypatch):
    monkeypatch.setattr(zoo, "methods_shipped", zoo.methods_shipped)
    name, read = READERS[reader]
    (repository / "mine").mkdir()
    with (repository / name).open("wb") as file:
        file.truncate(1 << 40)  # a hole; whoever reads it before looking has no memory left
    with soon(), pytest.raises(PruneZooError, match="larger than any such file"):
        read(repository)


def test_a_damaged_index_is_none(tmp_path):
    for number, (kind, make) in enumerate(BAD.items()):
        make(tmp_path / str(number))
        with soon():
            assert read_index(tmp_path / str(number), 7) is None, kind


def test_a_key_that_is_twice_is_found_soon():
    many = [f'"{number}": 1' for number in range(150_000)]
    with soon(), pytest.raises(ValueError, match="key '149999' is there twice"):
        parse_json("{" + ", ".join([*many, many[-1]]) + "}")


def test_records_may_be_longer_than_configs(tmp_path):
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(["x" * MOST_JSON_BYTES]))
    assert read_json(path, MOST_RECORD_BYTES)
    with pytest.raises(PruneZooError, match="larger than any such file"):
        read_json(path)


def test_an_option_of_brackets_is_a_text():
    assert split_options(f"divprune?x={'[' * 100_000}&y=[1]")[1] == {"x": "[" * 100_000, "y": [1]}


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]\n" for i in range(1, 10)
)


@pytest.mark.parametrize(("text", "words"), [(LAUGHS, "more than 10,000 values"), ("tower: " + "[" * 9999, "deep")])
def test_the_recipe_of_pretraining(tmp_path, text, words, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with soon(), pytest.raises(SystemExit) as caught:
        pretrain.main(["--config", str(path)])
    said = capsys.readouterr().err
    assert caught.value.code == 2 and words in said and said.startswith("error: ") and said.count("\n") == 1


def test_the_recipe_of_a_policy(tmp_path):
    record = {"command": "c", "data": "d", "steps": 1, "recipe": LAUGHS}
    (tmp_path / "run.json").write_text(json.dumps(record))
    with soon(), pytest.raises(PruneZooError, match=r"run\.json: .*more than 10,000 values"):
        policy_record.read_recipe(tmp_path)


def test_a_small_file_takes_no_more_memory_than_it_has(tmp_path):
    """However large its like may be: `read(n)` allocates n bytes at once."""
    path = tmp_path / "small.json"
    path.write_text("{}")
    tracemalloc.start()
    try:
        assert read_bytes(path, MOST_RECORD_BYTES) == b"{}"
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < MOST_RECORD_BYTES // 64
