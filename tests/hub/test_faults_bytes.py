"""A few bytes of a stranger that ask for much, lead elsewhere or say two things: refused in one line, at once."""

import json
import os
import struct
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from prunezoo import OneDPiece, PruneZooError, build_pruner, load_pruner
from prunezoo.core.bounds import MOST_DEPTH, MOST_HEADER_BYTES
from prunezoo.core.files import read_json, read_tensors
from prunezoo.tokenizers import container
from trainers.publishing.package import check
from trainers.upkeep.unpickle import unpickle

SMALL = {"width": 32, "hidden": 16, "heads": 2, "blocks": 1, "text_blocks": 1}
TOKENIZER = {"image_size": 48, "tokens": 24, "width": 32, "heads": 2, "head": "pixels", "encoder_layers": 1}
TOKENIZER |= {"decoder_layers": 1, "codes": 64, "code_width": 4}
QUICK = 5.0  # seconds; the worst took 44 before


def ppm(tmp_path):
    return build_pruner("ppm", **SMALL).save_pretrained(tmp_path / "ppm")


def refused(call, words):
    begun = time.monotonic()
    with pytest.raises(PruneZooError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value) and time.monotonic() - begun < QUICK


def nested(depth):
    value = {"inner": "m3"}
    for _ in range(depth):
        value = {"inner": "budget", "inner_config": value}
    return value


@pytest.mark.parametrize(
    ("method", "config", "words"),
    [
        ("budget", nested(5), "'budget' must be another method of the prompt stage"),
        ("budget", nested(150), "levels deep"),
        ("budget", nested(300), "levels deep|recursion"),
        ("budget", {"inner": "combined", "inner_config": {}}, "'combined' must be another method of the prompt stage"),
        ("atp", {"layers": [1], "strides": [1] * 300_000}, "'strides' of ATPConfig must be .* at most 256 entries"),
        ("atp", {"layers": [1], "strides": [2, 2]}, "strides must be different"),
        ("atp", {"layers": list(range(100_000))}, "'layers' of ATPConfig must be .* at most 256 entries"),
        ("pyramiddrop", {"layers": list(range(100_000))}, "'layers' of PyramidDropConfig .* at most 256 entries"),
        ("combined", {"methods": ["x"] * 100_000}, "'methods' .* at most 256 entries"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isalpha() else "",
)  # fmt: skip
def test_configs(tmp_path, method, config, words):
    folder = ppm(tmp_path)
    stored = {"method": method, "prunezoo_version": "1", "config": "HERE", "dtype": "float32"}
    config_text = json.dumps(config) if len(str(config)) > 20_000 or method != "budget" else text_of(config)
    (folder / "config.json").write_text(json.dumps(stored).replace('"HERE"', config_text))
    refused(lambda: load_pruner(folder), words)


def text_of(config):
    """As JSON, however deep."""
    if "inner_config" not in config:
        return json.dumps(config)
    head, depth = "", 0
    while config.get("inner_config"):
        head, config, depth = (
            f'{head}{{"inner": "{config["inner"]}", "inner_config": ',
            config["inner_config"],
            depth + 1,
        )
    return head + json.dumps(config) + "}" * depth


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"method": "ppm", "method": "m3"}', "key 'method' is there twice"),
        ('{"config": {"a": 1, "a": 2}}', "key 'a' is there twice"),
        ("[" * (MOST_DEPTH + 2) + "]" * (MOST_DEPTH + 2), "levels deep"),
        ("[" * 200_000, "not readable JSON"),
        ('"' + "x" * (1 << 21) + '"', "larger than any such file"),
    ],
    ids=["twice", "twice inside", "deep", "deeper", "long"],
)
def test_json(tmp_path, text, words):
    path = tmp_path / "x.json"
    path.write_text(text)
    refused(lambda: read_json(path), words)


def tensors_of(header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (
            tensors_of({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}),
            "a header of",
        ),
        (
            tensors_of({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(9_000)}),
            "9,000 tensors",
        ),
        (tensors_of(b'{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, "a": {}}'), "'a' is there twice"),
        (struct.pack("<Q", MOST_HEADER_BYTES * 50) + b"{}", "a header of"),
        (b"", "not a readable safetensors file"),
    ],
    ids=["100000 tensors", "9000 tensors", "twice", "long header", "empty"],
)
def test_weights(tmp_path, data, words):
    folder = ppm(tmp_path)
    (folder / "model.safetensors").write_bytes(data)
    refused(lambda: read_tensors(folder / "model.safetensors"), words)
    refused(lambda: load_pruner(folder), words)


@pytest.mark.parametrize(
    ("value", "words"), [(torch.inf, "inf"), (-torch.inf, "inf"), (3e38, r"3e\+38"), (torch.nan, "NaN")]
)
@pytest.mark.parametrize("where", ["pruner", "lora", "tokenizer"])
def test_numbers_that_no_weight_is(tmp_path, where, value, words):
    """Neither loaded nor saved, and the tensor is named."""
    made = {
        "pruner": lambda: build_pruner("ppm", **SMALL),
        "lora": lambda: lora_pruner(),
        "tokenizer": lambda: OneDPiece(**TOKENIZER),
    }[where]()
    folder = made.save_pretrained(tmp_path / "saved")
    file = folder / ("lora/adapter_model.safetensors" if where == "lora" else "model.safetensors")
    state = load_file(file)
    name = next(name for name, tensor in state.items() if tensor.is_floating_point())
    state[name].view(-1)[0] = value
    save_file(state, file)
    refused(lambda: type(made).from_pretrained(folder), f"tensor '{name}' holds .*{words}")
    with torch.no_grad():
        parameter = next(made.lora.parameters() if where == "lora" else made.parameters())
        parameter.view(-1)[0] = value
    refused(lambda: made.save_pretrained(tmp_path / "other"), f"not saved to .* holds .*{words}")
    assert not (tmp_path / "other").exists()


def lora_pruner():
    pruner = build_pruner("m3", width=32, hidden=16, heads=2, blocks=1, lora_rank=2)
    pruner.lora._add("model.language_model.layers.0.self_attn.q_proj", torch.randn(2, 32), torch.randn(32, 2))
    return pruner


def test_a_picture_of_gigabytes_in_fourteen_bytes():
    tokenizer = OneDPiece(**TOKENIZER)
    bits = tokenizer.config.bits
    data = container.pack(container.Row([1], 8, 8, tokenizer.fingerprint), bits, 14)
    head = bytearray(data)
    head[3:7], head[10:12] = b"\xff" * 4, b"\0\0"
    head[10:12] = struct.pack(">H", container._checksum(bytes(head)))
    refused(lambda: tokenizer.decompress(bytes(head)), "65536 x 65536 is too big")
    refused(lambda: container.pack(container.Row([1], 60_000, 60_000, 0), bits, 14), "60000 x 60000 is too big")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["link out", "pipe", "link to a pipe", "folder", "broken link"])
def test_files_that_are_no_files_of_the_folder(tmp_path, file, kind):
    folder = ppm(tmp_path)
    put(folder / file, kind, tmp_path)
    words = "link out of the folder" if kind == "link out" else "no plain file"
    refused(lambda: load_pruner(folder), f"{file} is .*{words}|{words}")


def put(path, kind, elsewhere):
    whole = path.read_bytes()
    path.unlink()
    if kind == "link out":
        (elsewhere / "secret").write_bytes(whole)
        path.symlink_to(elsewhere / "secret")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a pipe":
        os.mkfifo(elsewhere / "pipe")
        path.symlink_to(elsewhere / "pipe")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("nowhere")


def test_a_pipe_read_as_json_does_not_wait(tmp_path):
    os.mkfifo(tmp_path / "x.json")
    refused(lambda: read_json(tmp_path / "x.json"), "not a plain file")
    refused(lambda: read_tensors(tmp_path / "x.json"), "not a plain file")


def test_a_download_of_the_hub_is_links_and_loads(tmp_path):
    """`snapshots/COMMIT` holds links into `blobs`."""
    folder, blobs = ppm(tmp_path), tmp_path / "cache" / "blobs"
    snapshot = tmp_path / "cache" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).rename(blobs / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert load_pruner(snapshot).name == "ppm"


@pytest.mark.parametrize("file", ["model.safetensors", "metrics.json", "run.json", "kept.webp"])
def test_publishing_packs_no_linked_file(published, tmp_path, file):
    if not (published / file).exists():
        (published / file).write_bytes(b"x")
    put(published / file, "link out", tmp_path)
    refused(lambda: check(published, "org/name"), f"{file} is a link out of the folder")


@pytest.mark.parametrize("text", ["{", "[]", "{}", "[" * 100_000], ids=["cut", "list", "empty", "deep"])
def test_a_damaged_record_of_a_training(published, text):
    (published / "run.json").write_text(text)
    refused(lambda: check(published, "org/name"), "run.json")


@pytest.mark.parametrize(
    "state",
    [
        {"w": torch.zeros(1).expand(10**9)},
        dict.fromkeys(map(str, range(100)), torch.zeros(10_000)),
        {"w": torch.zeros(3, 3).to_sparse()},
    ],
    ids=["expanded", "one memory under many names", "sparse"],
)
def test_pickled_tensors_that_are_not_whole_in_the_file(tmp_path, state):
    torch.save(state, tmp_path / "w.bin")
    refused(lambda: unpickle(tmp_path / "w.bin", tmp_path / "w.safetensors"), "w.bin: ")
    assert not (tmp_path / "w.safetensors").exists()
