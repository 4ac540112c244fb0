"""Blocks of several threads on one model, and blocks that Ctrl-C hits anywhere: the model is never half attached."""

import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Event

import pytest
import torch
from m3_lora import made_for
from tiny_llava import LONG, SHORT, make_image

from prunezoo import PruneZooError, attach

PRUNERS = ["uniform", "fastv", "combined", "m3"]


def named(name, vlm):
    return (
        made_for(vlm) if name == "m3" else ["fastervlm", "fastv"] if name == "combined" else name,
        [9, 4] if name == "combined" else 9,
    )


def traces(vlm):
    """All that is on a model and its parts besides weights."""
    return {
        name: (
            type(module),
            sorted(set(vars(module)) - {"_parameters", "_buffers", "_modules"}),
            [len(table) for key, table in vars(module).items() if "hooks" in key and hasattr(table, "__len__")],
            module.training,
        )
        for name, module in vlm.named_modules()
    }


class Interrupt:
    """Raises KeyboardInterrupt at the n-th line that the package or torch's hooks run on entering or leaving.

    A line that is run for each of many modules counts twice at most.
    """

    def __init__(self, number):
        self.left, self.visits = number, Counter()

    def __call__(self, frame, event, _):
        path = frame.f_code.co_filename
        if "prunezoo" not in path and "torch/utils/hooks.py" not in path:
            return None
        place = path, frame.f_lineno
        self.visits[place] += event == "line"
        if event == "line" and self.visits[place] <= 2:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self


def block(vlm, pruner, keep, batch, enter, leave):
    """A block with interrupts on the way in, on the way out."""
    attached = attach(vlm, pruner, keep=keep)
    sys.settrace(enter)
    try:
        with attached:
            del attached
            sys.settrace(None)
            if batch is not None:
                vlm(**batch)
            sys.settrace(leave)
    finally:
        sys.settrace(None)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # one that hits what is forgotten
@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("way", ["enter", "leave"])
def test_an_interrupt_at_any_line_leaves_a_bare_model(name, way, deep_llava):
    vlm, batch = deep_llava.vlm, deep_llava.batch([SHORT], [[make_image(0)]])
    pruner, keep = named(name, vlm)
    before, bare, number = traces(vlm), vlm(**batch).logits, 0
    while True:
        number += 1
        interrupt = Interrupt(number)
        with suppress(KeyboardInterrupt):
            tried = (interrupt, None) if way == "enter" else (None, interrupt)
            block(vlm, pruner, keep, batch if way == "leave" and name == "m3" else None, *tried)
        assert traces(vlm) == before, number
        if number % 20 == 0 or interrupt.left > 0:
            assert torch.equal(vlm(**batch).logits, bare), number
        if interrupt.left > 0:
            break
    assert number > 20
    with attach(vlm, pruner, keep=keep):  # nothing is held any more, in this thread or another
        assert vlm(**batch).logits.shape[1] < bare.shape[1] or name == "fastv"
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: attach(vlm, pruner, keep=keep, timeout=5).__enter__().disable()).result()


def test_blocks_of_threads_take_turns(deep_llava):
    vlm, before = deep_llava.vlm, traces(deep_llava.vlm)
    batch = deep_llava.batch([LONG], [[make_image(0)]])
    bare = vlm(**batch).logits
    cases = [("uniform", 4), ("fastv", 9), ("divprune", 16)]
    expected = []
    for name, keep in cases:
        with attach(vlm, name, keep=keep):
            expected.append(vlm.generate(**batch, max_new_tokens=4, return_dict_in_generate=True, output_logits=True))

    def request(number):
        name, keep = cases[number % 3]
        with attach(vlm, name, keep=keep) as run:
            out = vlm.generate(**batch, max_new_tokens=4, return_dict_in_generate=True, output_logits=True)
        same = torch.equal(torch.stack(out.logits), torch.stack(expected[number % 3].logits))
        return same and run.stats.before == [36]

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(request, range(18)))
    assert traces(vlm) == before and torch.equal(vlm(**batch).logits, bare)


def test_a_thread_waits_no_longer_than_it_was_told(tiny):
    vlm, entered, leave = tiny.vlm, Event(), Event()

    def holds():
        with attach(vlm, "uniform", keep=4):
            entered.set()
            assert leave.wait(60)

    with ThreadPoolExecutor(1) as pool:
        holder = pool.submit(holds)
        assert entered.wait(60)
        late = pytest.raises(PruneZooError, match=r"did not leave it within 0\.05 s")
        with late, attach(vlm, "pool", keep=4, timeout=0.05):
            pytest.fail("two on one model")
        leave.set()
        with attach(vlm, "pool", keep=4, timeout=60):
            holder.result()
    assert "generate" not in vars(vlm)


@pytest.mark.parametrize("name", ["uniform", "fastv", "m3", "pyramiddrop"])
def test_direct_calls_take_turns(name, deep_llava):
    vlm = deep_llava.vlm
    batches = [deep_llava.batch([LONG.replace("left ", "left " * i)], [[make_image(i)]]) for i in range(8)]
    pruner = made_for(vlm) if name == "m3" else name
    with attach(vlm, pruner, keep=4) as run:
        expected = [vlm(**batch).logits for batch in batches]
        with ThreadPoolExecutor(8) as pool:
            for _ in range(6):
                found = list(pool.map(lambda batch: vlm(**batch).logits, batches))
                assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert run.stats.before == [36] * 56


def test_a_failed_direct_call_gives_its_turn_back(tiny):
    vlm, batch = tiny.vlm, tiny.batch([LONG], [[make_image(0)]])

    def fail(*_):
        raise interrupt

    with attach(vlm, "uniform", keep=4), ThreadPoolExecutor(1) as pool:
        expected = vlm(**batch).logits
        for interrupt in (ZeroDivisionError(), KeyboardInterrupt()):
            handle = vlm.lm_head.register_forward_hook(fail)
            with pytest.raises(type(interrupt)):
                vlm(**batch)
            handle.remove()
            if isinstance(interrupt, KeyboardInterrupt):  # torch tells no hook of it; the next call of the thread does
                assert torch.equal(vlm(**batch).logits, expected)
            assert torch.equal(pool.submit(vlm, **batch).result(60).logits, expected)
        with pytest.raises(PruneZooError):
            vlm(**{**batch, "input_ids": batch["input_ids"][:, 6:]})
        assert torch.equal(pool.submit(vlm, **batch).result(60).logits, expected)
