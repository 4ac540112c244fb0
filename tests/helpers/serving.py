"""Answers of models that vLLM serves, and those of prunezoo and transformers for the same prompts.

A served answer is a list of token ids, greedy, in float32. vLLM changes classes of transformers in its process, so what
is expected comes from a process of its own: this file, run with the path of a list of jobs.
"""

import hashlib
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).parent.parent.parent
VLM = "checkpoints/tiny-llava"
NEW = 8  # tokens of an answer
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "distributed_executor_backend": "uni",
    "limit_mm_per_prompt": {"image": 4},
    "seed": 0,
}
"""Of vLLM in these tests: one process, no compilation."""
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def questions(count, images=1):
    """Chats of the suite `scenes` as templates take them, with their pictures, as many as `images`."""
    from trainers.data.suite import load_suite

    suite = load_suite("scenes", "test", count + images)
    found = []
    for i in range(count):
        question = suite[i].turns[0][0]
        content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": question}]
        found.append(([{"role": "user", "content": content}], [suite[i + n].image for n in range(images)]))
    return found


def prompts_of(job):
    """Prompts as text, each with its pictures: questions of `scenes`, or what `serving_models` makes for a family."""
    if "family" in job:
        import serving_models

        return serving_models.prompts(job["family"], job["count"], job["images"])
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(job["vlm"])
    return [
        (processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False), images)
        for chat, images in questions(job["count"], job["images"])
    ]


def expect(folder, jobs):
    """Token ids that prunezoo and transformers answer, for each job; see :func:`answer`. Made once in a session."""
    name = hashlib.sha256(json.dumps(jobs, sort_keys=True).encode()).hexdigest()[:16]
    out = Path(folder) / f"{name}.out.json"
    if not out.exists():
        (Path(folder) / f"{name}.json").write_text(json.dumps(jobs))
        words = [sys.executable, __file__, str(Path(folder) / f"{name}.json"), str(out)]
        path = os.pathsep.join(str(ROOT / part) for part in ("", "modules", "tests/helpers"))
        subprocess.run(words, cwd=ROOT, check=True, env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path})
    return json.loads(out.read_text())


def answer(job):
    """Answers to the prompts of a job: `vlm`, `pruner`, `keep`, `positions`, `count`, `images`, perhaps `family`.

    Where a family has newlines they all stay, as they do in vLLM, which must know how many tokens an image has left.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from prunezoo import attach
    from prunezoo.host.encoded import Newlines

    if "family" in job:
        import serving_models

        if not serving_models.exists(job["vlm"]):
            serving_models.write(job["family"], job["vlm"])
    processor = AutoProcessor.from_pretrained(job["vlm"])
    vlm = AutoModelForImageTextToText.from_pretrained(job["vlm"], dtype=torch.float32).eval()
    answers = []
    all_stay = patch.object(Newlines, "alive", lambda lines, _index, _valid: lines.valid)
    with torch.no_grad(), all_stay, attach(vlm, job["pruner"], job["keep"], job["positions"]):
        for text, images in prompts_of(job):
            batch = processor(text=text, images=images, return_tensors="pt", add_special_tokens=False)
            ids = vlm.generate(**batch, max_new_tokens=NEW, do_sample=False)
            answers.append(ids[0, batch["input_ids"].shape[1] :].tolist())
    return answers


def requests(vlm, count, images=1, family=None, **kwargs):
    """The same prompts as vLLM takes them."""
    job = {"vlm": vlm, "count": count, "images": images, **({"family": family} if family else {})}
    return [
        {
            "prompt": text,
            "multi_modal_data": {"image": pictures},
            **({"mm_processor_kwargs": kwargs} if kwargs else {}),
        }
        for text, pictures in prompts_of(job)
    ]


@contextmanager
def served(vlm, pruner, keep, positions="original", **options):
    """vLLM with a model under a pruner, in this process."""
    from prunezoo.serve import engine_args
    from trainers.upkeep.serving_speed import engine

    with engine({**engine_args(vlm, pruner, keep, positions), **ENGINE, **options}) as llm:
        yield llm


def said(llm, prompts):
    """Token ids that it answers, and how many tokens each prompt had."""
    from vllm import SamplingParams

    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=NEW), use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in outputs], [len(one.prompt_token_ids) for one in outputs]


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(json.dumps([answer(job) for job in json.loads(source.read_text())]))
