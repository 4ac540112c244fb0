"""How fast vLLM serves a random LLaVA bare and under a pruner, and how many blocks of its KV cache that takes.

    .venv-serve/bin/python -m trainers.upkeep.serving_speed --keep 64 --dtype float32 --json hub_cards/serving.json

The same on a GPU, with graphs by `--graphs`. Each setting is an engine of its own, one after another in
one run; times are of requests that come at once, with pictures that no cache has seen.
"""

import argparse
import gc
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.table import Table

from prunezoo.core.budgets import read_keep
from prunezoo.serve import engine_args
from trainers.benchmarking.models import load_model
from trainers.cli.errors import check_output, command
from trainers.cli.options import add_option, check_at_least_one
from trainers.cli.terminal import Terminal
from trainers.evaluation.record import versions, write_record

WORDS = "what color is the ball ?"
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "2"}


@contextmanager
def engine(options: dict[str, Any]) -> Iterator[Any]:
    """An engine of vLLM in this process, so that its time is this process's and its cache can be looked at."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(**options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def requests(prompt: str, count: int, seed: int) -> list[dict[str, Any]]:
    """As many questions about pictures that differ."""
    noise = np.random.default_rng(seed)
    pictures = [Image.fromarray(noise.integers(0, 255, (336, 336, 3), dtype=np.uint8)) for _ in range(count)]
    return [{"prompt": prompt, "multi_modal_data": {"image": picture}} for picture in pictures]


def round_of(llm: Any, prompts: Sequence[dict[str, Any]], decode: int) -> dict[str, float]:
    """Seconds of the processors and of the clock for requests that come at once, and blocks in use at the peak."""
    from vllm import SamplingParams

    core, peak = llm.llm_engine.engine_core.engine_core, 0
    pool = core.scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    cpu, wall = time.process_time(), time.perf_counter()
    greedy = SamplingParams(temperature=0.0, max_tokens=decode, ignore_eos=True)
    llm.enqueue(list(prompts), greedy, use_tqdm=False)
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        peak = max(peak, free - pool.get_num_free_blocks())
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall, "blocks": peak}


def measure(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """A row for each setting, the bare model first; times are the least of the rounds."""
    vlm, processor = load_model(args.vlm, "cpu", args.dtype)
    vlm.save_pretrained(folder)
    processor.save_pretrained(folder)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": WORDS}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    settings: list[tuple[str, Any, dict[str, Any]]] = [
        ("bare", None, {"model": str(folder), "model_impl": "transformers"}),
        *((args.pruner, keep, engine_args(folder, args.pruner, keep)) for keep in args.keep),
    ]
    rows = []
    for name, keep, options in settings:
        common = {"dtype": args.dtype, "max_model_len": 1024, "max_num_seqs": args.batch, "seed": 0}
        common |= {"enforce_eager": not args.graphs, "enable_prefix_caching": False, "max_num_batched_tokens": 8192}
        with engine({**options, **common, "distributed_executor_backend": "uni"}) as llm:
            round_of(llm, requests(prompt, 1, seed=0), args.decode)  # to warm up
            rounds = [
                round_of(llm, requests(prompt, args.batch, seed), args.decode) for seed in range(1, args.repeats + 1)
            ]
        row = {key: min(one[key] for one in rounds) for key in rounds[0]}
        rows.append({"model": name, "keep": None if keep is None else str(keep), **row, "rounds": rounds})
        print(rows[-1], file=sys.stderr)
    return rows


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    argv = sys.argv[1:] if argv is None else list(argv)
    p = argparse.ArgumentParser(prog="python -m trainers.upkeep.serving_speed", description="Measure served pruning.")
    add_option(p, "vlm", default="random:llava-120m", help="random:llava-120m or random:llava-7b")
    add_option(p, "pruner", nargs=None, default="divprune", help="a method without weights")
    add_option(p, "keep", default=["192", "64"])
    add_option(p, "batch", default=8, help="requests at once")
    p.add_argument("--decode", type=int, default=16, help="tokens of an answer")
    p.add_argument("--repeats", type=int, default=3, help="rounds that are measured")
    p.add_argument("--graphs", action="store_true", help="with vLLM's compilation and graphs, as servers run")
    add_option(p, "dtype", default="bfloat16")
    add_option(p, "json")
    args = p.parse_args(argv)
    check_at_least_one(args, "batch", "decode", "repeats")
    check_output("--json", args.json)
    args.keep = [read_keep(keep) for keep in args.keep]
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(args, Path(folder))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    if args.json:
        line = shlex.join(["python", "-m", "trainers.upkeep.serving_speed", *argv])
        record = {"command": line, "device": device, "vlm": args.vlm, "batch": args.batch, "versions": versions()}
        write_record({**record, "rows": rows}, args.json)
    clock = "wall_s" if torch.cuda.is_available() else "cpu_s"
    table = Table("model", "keep", clock, "times as fast", "KV blocks")
    for row in rows:
        ratio = rows[0][clock] / row[clock]
        table.add_row(row["model"], row["keep"] or "all", f"{row[clock]:.2f}", f"{ratio:.2f}", f"{row['blocks']:.0f}")
    Terminal().print(table)


if __name__ == "__main__":
    main()
