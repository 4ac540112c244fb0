"""`trainers.benchmark`: what is counted is what the model does. How long anything takes is never asserted."""

import gc
import json
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_llava import IMAGE_SIZE, make_llava, make_processor

from prunezoo.core.compiled import compile_pruner
from prunezoo.core.errors import PruneZooError
from prunezoo.core.prefill import Prefill, decoder_flops
from prunezoo.core.registry import build_pruner
from prunezoo.host import attach
from trainers import benchmark
from trainers.benchmarking import run as timing
from trainers.benchmarking.flops import Work, counted_flops, request_work
from trainers.benchmarking.measure import BARE, MEMORY, Setting, cases_of
from trainers.benchmarking.memory import peak_memory, weights_size
from trainers.benchmarking.models import SIZES, Request, Sizes, load_for_timing, random_llava
from trainers.benchmarking.probe import PARTS, timed_request
from trainers.benchmarking.tables import speed_section
from trainers.evaluation.budgets import parse_budgets

ROOT = Path(__file__).parent.parent.parent
PICTURE = (IMAGE_SIZE, IMAGE_SIZE)
TOKENS = 36  # of an image of the tiny model


@pytest.fixture(scope="module")
def vlm():
    return make_llava()


@pytest.fixture(scope="module")
def request_of(vlm):
    return lambda batch=1, length=20: Request(vlm, make_processor(), batch, length, PICTURE)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_the_formula_counts_what_torch_counts(kernel):
    vlm = make_llava()
    vlm.set_attn_implementation(kernel)
    config = vlm.config.get_text_config()
    assert config.num_key_value_heads < config.num_attention_heads, "grouped queries would not be tested"
    ids = torch.randint(7, 20, (2, 23))
    with torch.no_grad():
        full, prefill = counted_flops(lambda: vlm(input_ids=ids, logits_to_keep=1).logits)
        cache = vlm(input_ids=ids[:, :22], use_cache=True).past_key_values
        step, decode = counted_flops(lambda: vlm(input_ids=ids[:, 22:], past_key_values=cache).logits)
    torch.testing.assert_close(step, full)
    assert prefill == 2 * decoder_flops(config, [23, 23], [23, 23])
    assert decode == 2 * decoder_flops(config, [1, 1], [23, 23])


def test_work_follows_the_lengths_of_the_layers(vlm):
    config = vlm.config.get_text_config()
    whole = request_work(config, [56, 56], decode=3, batch=2, vision=1000)
    half = request_work(config, [56, 24], decode=3, batch=2, vision=1000)
    assert whole.prefill == 2 * decoder_flops(config, [56, 56], [56, 56])
    assert whole.decode == 2 * sum(decoder_flops(config, [1, 1], [56 + n, 56 + n]) for n in (1, 2))
    assert whole.prefill - half.prefill == 2 * (
        decoder_flops(config, [56], [56]) - decoder_flops(config, [24], [24])
    )  # the output embedding is in both
    assert request_work(config, [56, 56], decode=1, batch=2, vision=0).decode == 0
    work = Work(vision=1, prefill=10, decode=100)
    assert [work.of(part) for part in ("vision", "prefill", "decode", "first_token", "end_to_end")] == [
        1, 10, 100, 11, 111,
    ]  # fmt: skip
    assert work.of("preprocessing") is work.of("pruner") is work.of("other") is None


def test_a_request_has_the_length_that_was_asked_for(vlm, request_of):
    for length in (12, 20):
        batch = request_of(2, length)()
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, TOKENS + length)
        assert int((batch["input_ids"] == vlm.config.image_token_id).sum()) == 2 * TOKENS
        assert batch["attention_mask"].all()
        assert not torch.equal(batch["pixel_values"][0], batch["pixel_values"][1])
    with pytest.raises(PruneZooError, match="--length 1: the chat template alone has 2 tokens before the question"):
        request_of(1, 1)


def test_the_probe_changes_nothing_and_reads_the_true_lengths(vlm, request_of):
    request = request_of(2, 20)
    with attach(vlm, build_pruner("uniform"), 9):
        expected = vlm.generate(**request(), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    hooks = {name: list(m._forward_hooks) for name, m in vlm.named_modules()}  # some are transformers' own, for good
    reading = timed_request(vlm, request, build_pruner("uniform"), 9, decode=4, count=True)
    assert reading.lengths == (29, 29)
    assert set(reading.seconds) == set(PARTS)
    assert min(reading.seconds.values()) >= 0
    inner = [reading.seconds[part] for part in ("preprocessing", "vision", "pruner", "other", "prefill")]
    assert sum(inner) == pytest.approx(reading.seconds["first_token"])  # the prompt stage has no overlap
    assert reading.seconds["first_token"] + 3 * reading.seconds["decode"] == pytest.approx(
        reading.seconds["end_to_end"]
    )
    bare = timed_request(vlm, request, None, 1.0, decode=1, count=True)
    assert bare.lengths == (TOKENS + 20,) * 2
    assert "decode" not in bare.seconds
    assert bare.vision_flops == reading.vision_flops > 0
    assert {name: list(m._forward_hooks) for name, m in vlm.named_modules()} == hooks
    assert not vlm.get_decoder()._forward_pre_hooks
    assert "get_image_features" not in vars(vlm.model)
    with attach(vlm, build_pruner("uniform"), 9):
        assert torch.equal(vlm.generate(**request(), max_new_tokens=4, min_new_tokens=4, do_sample=False), expected)


def test_a_pruner_in_front_of_the_tower_is_timed_beside_it(vlm, request_of):
    """Its own time is none of the tower's, which does less."""
    request = request_of(2, 20)
    reading = timed_request(vlm, request, build_pruner("uniform_input"), 9, decode=1, count=True)
    bare = timed_request(vlm, request, None, 1.0, decode=1, count=True)
    assert reading.lengths == (9 + 20,) * 2 and 0 < reading.vision_flops < bare.vision_flops
    inner = [reading.seconds[part] for part in ("preprocessing", "vision", "pruner", "other", "prefill")]
    assert min(inner) > 0 and sum(inner) == pytest.approx(reading.seconds["first_token"])


@pytest.mark.parametrize(
    ("name", "lengths", "inside"),
    [("tome", (9 + 20,) * 2, "vision"), ("fastv", (TOKENS + 20, 9 + 20), "prefill")],
)
def test_pruners_inside_the_model_are_timed_where_they_run(vlm, request_of, name, lengths, inside):
    pruner = build_pruner(name, **({"layer": 1} if name == "fastv" else {}))
    request = request_of(2, 20)
    reading = timed_request(vlm, request, pruner, 9, decode=3, count=True)
    assert reading.lengths == lengths
    seconds = timed_request(vlm, request, pruner, 9, decode=3).seconds
    assert 0 < seconds["pruner"] < seconds[inside]
    between = [seconds[part] for part in ("preprocessing", "vision", "other", "prefill")]
    assert sum(between) == pytest.approx(seconds["first_token"])
    bare = timed_request(vlm, request, None, 1.0, decode=3, count=True)
    assert (reading.vision_flops < bare.vision_flops) == (inside == "vision")
    rows = Setting(vlm, request, cases_of([(name, pruner)], parse_budgets(["9"])), decode=3, repeats=1)
    rows.measure(lambda: None)
    row = next(r for r in rows.rows() if (r["pruner"], r["part"]) == (name, "prefill"))
    assert row["tokens"] == sum(lengths) / 2 - 20
    config = vlm.config.get_text_config()
    whole = decoder_flops(config, bare.lengths, bare.lengths)
    assert row["ideal_speedup"] == pytest.approx(whole / decoder_flops(config, lengths, lengths), rel=1e-5)


def test_rows_have_measured_beside_ideal(vlm, request_of):
    cases = cases_of([("uniform", build_pruner("uniform"))], parse_budgets(["1/9", "1/3"]))
    setting = Setting(vlm, request_of(2, 20), cases, decode=4, repeats=3)
    steps = []
    setting.measure(lambda: steps.append(1))
    assert len(steps) == setting.steps == 2 * 4 + 2 * 3 * 3
    rows = {(row["pruner"], row["keep"], row["part"]): row for row in setting.rows()}
    assert {key[:2] for key in rows} == {(BARE, "1.0"), ("full", "1.0"), ("uniform", "1/9"), ("uniform", "1/3")}
    assert {key[2] for key in rows if key[0] == "uniform"} == {*PARTS, *MEMORY}
    config = vlm.config.get_text_config()
    for keep, tokens in (("1/9", 4), ("1/3", 12)):
        row = rows["uniform", keep, "prefill"]
        assert (row["tokens"], row["batch"], row["length"]) == (tokens, 2, 20)
        long, short = (decoder_flops(config, [n + 20] * 2, [n + 20] * 2) for n in (TOKENS, tokens))
        assert row["ideal_speedup"] == pytest.approx(long / short, rel=1e-5)
        assert row["ideal_speedup"] < TOKENS / tokens  # the text is not pruned
        case = next(c for c in setting.cases if c.keep == keep)
        ratios = sorted(bare["prefill"] / own["prefill"] for bare, own in case.pairs)
        assert row["speedup"] == pytest.approx(ratios[1], rel=1e-5)
        assert rows["uniform", keep, "vision"]["ideal_speedup"] == 1
        assert rows["uniform", keep, "working_memory"]["speedup"] > 1
    assert rows["full", "1.0", "prefill"]["tokens"] == TOKENS
    assert rows["full", "1.0", "prefill"]["ideal_speedup"] == 1
    assert all(rows[BARE, "1.0", part]["speedup"] == 1 for part in PARTS if part != "pruner")
    overhead = setting.overhead()
    assert overhead is not None
    assert (overhead["batch"], overhead["length"], overhead["tokens"]) == (2, 20, TOKENS + 20)
    pairs = next(case for case in setting.cases if case.name == "full").pairs
    more = sorted((own["other"] + own["pruner"] - bare["other"]) / bare["prefill"] for bare, own in pairs)
    assert overhead["share"] == pytest.approx(more[1], rel=1e-5)


def test_an_interrupt_leaves_what_was_timed(vlm, request_of):
    cases = cases_of([("uniform", build_pruner("uniform"))], parse_budgets(["1/9"]))
    setting = Setting(vlm, request_of(), cases, decode=2, repeats=3)
    assert setting.rows() == []
    assert setting.overhead() is None
    left = iter(range(2 * 3 + 2))  # all counted, and one pair of the first case

    def advance() -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        setting.measure(advance)
    assert {row["pruner"] for row in setting.rows()} == {BARE, "full"}
    assert setting.overhead() is not None


def test_peak_memory_is_that_of_the_tensors():
    def run() -> None:
        first = torch.zeros(1_000_000)
        second = first + 1
        del first
        torch.zeros(500_000).add_(second.sum())

    before = torch.zeros(10_000_000)  # is not counted
    assert 8_000_000 <= peak_memory(torch.device("cpu"), run) < 8_001_000
    assert before.sum() == 0
    shared = torch.nn.Linear(8, 8, bias=False)
    assert weights_size(torch.nn.ModuleList([shared, shared])) == 4 * 64


def test_sizes_that_are_made_up():
    vlm = random_llava(Sizes(64, 128, 2, 96, 128, 2, heads=4, vocabulary=200, tied=True), "cpu", torch.float32)
    assert vlm.lm_head.weight is vlm.get_input_embeddings().weight
    names = sorted(SIZES)
    with torch.device("meta"):
        counts = [sum(p.numel() for p in random_llava(SIZES[n], "meta", torch.float32).parameters()) for n in names]
    assert names == ["llava-120m", "llava-500m", "llava-7b"]
    assert 1.0e8 < counts[0] < 1.3e8
    assert 4.8e8 < counts[1] < 5.8e8
    assert 6.9e9 < counts[2] < 7.2e9  # LLaVA-1.5-7B has 7.06


def test_a_learned_method_is_built_for_the_width(vlm, tmp_path):
    pruner = load_for_timing("ppm", 32)
    assert pruner.config.width == 32
    assert not pruner.training
    assert load_for_timing("uniform", 32).name == "uniform"
    build_pruner("ppm", **type(pruner).tiny_config(32, 32)).save_pretrained(tmp_path)
    assert load_for_timing(str(tmp_path), 64).config.width == 32


def test_a_learned_method_is_built_as_its_options_say(vlm):
    """And not the shipped one of that method, under another config than it was trained with."""
    prefill = Prefill.of(vlm.config)
    own, small = (load_for_timing(f"ppm?heads=2&budget_flops={share}", 32, None, prefill) for share in (1, 0.2))
    assert small.config.hidden < own.config.hidden < 512
    mine = load_for_timing("ppm?hidden=48&select=mmr", 32)
    assert (mine.config.hidden, mine.config.width, mine.select) == (48, 32, "mmr")
    assert load_for_timing("fastervlm?select=mmr", 32).select == "mmr"
    with pytest.raises(PruneZooError, match="unknown config key 'hiden'"):
        load_for_timing("ppm?hiden=48", 32)


def test_compiled_networks_are_timed_beside(tiny_llava_folder, tmp_path, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(timing, "compile_pruner", partial(compile_pruner, backend="eager"))  # inductor takes a minute
    words = f"--vlm {tiny_llava_folder} --pruner uniform ppm --compile --keep 1/9 --length 20 --decode 2 --repeats 1"
    assert benchmark.main([*words.split(), "--picture", "30x24", "--json", str(tmp_path / "b.json")]) == 0
    rows = json.loads((tmp_path / "b.json").read_text())["rows"]
    tokens = {row["pruner"]: row["tokens"] for row in rows if row["part"] == "prefill"}
    assert tokens.keys() == {BARE, "full", "uniform", "ppm", "ppm compiled"}, "what has no network is timed once"
    assert tokens["ppm compiled"] == tokens["ppm"] == 4


def test_the_command_writes_rows(tiny_llava_folder, tmp_path, capsys, caplog):
    words = f"--vlm {tiny_llava_folder} --pruner uniform ppm full --keep 1/9 12 --batch 1 2 --length 20"
    words += f" --decode 3 --repeats 2 --picture 30x24 --json {tmp_path / 'b.json'}"
    assert benchmark.main(words.split()) == 0
    gc.collect()  # an attachment that nobody entered says so when it is forgotten
    assert "changed nothing" not in caplog.text
    record = json.loads((tmp_path / "b.json").read_text())
    assert {(row["pruner"], row["keep"]) for row in record["rows"]} == {
        (BARE, "1.0"), ("full", "1.0"), *((name, keep) for name in ("uniform", "ppm") for keep in ("1/9", "12")),
    }  # fmt: skip
    wanted = {"pruner", "keep", "tokens", "batch", "length", "part", "median_s", "spread", "speedup", "ideal_speedup"}
    assert all(wanted <= set(row) for row in record["rows"])
    assert {(row["batch"], row["length"]) for row in record["rows"]} == {(1, 20), (2, 20)}
    assert {row["tokens"] for row in record["rows"] if row["keep"] == "1/9"} == {4}
    assert record["command"].startswith("python -m trainers.benchmark --vlm")
    assert {"torch", "transformers"} <= set(record["versions"])
    assert record["device"].endswith(("thread", "threads")) or torch.cuda.is_available()
    assert len(record["overhead"]) == 2
    section = speed_section(record).splitlines()
    assert section[0] == "Batch 1, 20 text tokens:"
    assert [line.split(" | ")[:3] for line in section if line.startswith("| ")][:4] == [
        ["| pruner", "keep", "tokens"], ["| bare", "1.0", "36"], ["| full", "1.0", "36"], ["| uniform", "1/9", "4"],
    ]  # fmt: skip
    assert len({line.count("|") for line in section if line.startswith("|")}) == 1
    assert section[-3:] == ["```", record["command"], "```"]
    out = capsys.readouterr().out
    assert "batch 2, 20 text tokens" in out
    assert "of a prefill more in front of the language model (interquartile range" in " ".join(out.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vlm", "random:llava-8b"], "--vlm random:llava-8b: no such size; did you mean 'random:llava-7b'"),
        (["--vlm", "no/where/at/all"], "--vlm no/where/at/all: not a loadable image-text-to-text model"),
        (["--keep", "0"], "--keep 0: a budget is at least 1 token"),
        (["--repeats", "0"], "--repeats 0: at least 1"),
        (["--batch", "1", "0"], "--batch 0: at least 1"),
        (["--picture", "640"], "--picture 640: write width and height in pixels, as 640x480"),
        (["--length", "1"], "--length 1: the chat template alone has"),
        (["--pruner", "unifrom"], "unifrom"),
    ],
)
def test_mistakes_are_told_in_one_line(tiny_llava_folder, capsys, words, message):
    with pytest.raises(SystemExit) as caught:
        benchmark.main(["--vlm", str(tiny_llava_folder), "--pruner", "uniform", "--picture", "24x24", *words])
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_ctrl_c_ends_the_command_cleanly(tiny_llava_folder, tmp_path):
    words = f"-m trainers.benchmark --vlm {tiny_llava_folder} --pruner uniform --length 20 --repeats 100000"
    words += f" --json {tmp_path / 'b.json'}"
    process = subprocess.Popen(
        [sys.executable, *words.split()], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert "uniform" in process.stdout.readline()  # the line that says what is going to be measured
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    assert error.strip().splitlines()[-1] == "stopped; what was measured stands above, no file was written"
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())
