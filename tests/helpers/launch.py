"""Trainings in processes of their own, one or several, that are forked when all imports have been done."""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from trainers.cli import recipes
from trainers.cli.lock import held
from trainers.fit import main

recipes.PACKAGES.append("spies")  # callbacks of the tests

MODELS = ("llava.modeling_llava", "clip.modeling_clip", "llama.modeling_llama", "llava.processing_llava")
PRELOAD = [
    __name__,
    "trainers.training.distill",
    "trainers.data.scenes",
    *(f"transformers.models.{name}" for name in MODELS),
]


def child(arguments: list[str], environment: dict[str, str], log: Path) -> None:
    """`python -m trainers.fit` with these words."""
    os.setpgrp()
    os.environ.update(environment)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    sys.argv = ["fit", *arguments]
    main(arguments)


class Run:
    """A training that has been started.

    Args:
        arguments: Words of the command line.
        log: File for what it prints.
        processes: How many; with several, of the strategy that the words name, as torchrun would start them.
    """

    def __init__(self, arguments: list[str], log: Path, processes: int = 1) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOAD, *(["deepspeed"] if find_spec("deepspeed") else [])])
        shared = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "NODE_RANK": "0"}
        ranks = [{**shared, **({"LOCAL_RANK": str(rank)} if processes > 1 else {})} for rank in range(processes)]
        words = [*arguments, f"--trainer.devices={processes}"]
        self.log = log
        self.processes = [context.Process(target=child, args=(words, own, log)) for own in ranks]
        for process in self.processes:
            process.start()

    def finish(self, seconds: float = 600) -> None:
        """Wait for its good end."""
        for process in self.processes:
            process.join(seconds)
        codes = [process.exitcode for process in self.processes]
        assert codes == [0] * len(codes), f"{codes}: {self.log.read_text()[-4000:]}"

    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def kill(self) -> None:
        """SIGKILL to all of it at once, loader workers too."""
        for process in self.processes:
            assert process.pid
            with contextlib.suppress(ProcessLookupError):  # it may not have made a group of its own yet
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
        for process in self.processes:
            process.join()


class Holder:
    """Another process, forked from this one, that holds a lock within a `with` block or until it is released or killed.

    Args:
        place: The folder, or the file, that is locked.
        folder: Whether it is a folder.
    """

    def __init__(self, place: Path, folder: bool = True) -> None:
        context = multiprocessing.get_context("fork")
        self._here, there = context.Pipe()
        self.process = context.Process(target=self._hold, args=(place, folder, there))

    @staticmethod
    def _hold(place: Path, folder: bool, there: Connection) -> None:
        with held("--out", place, folder):
            there.send("held")
            there.poll(60)

    def __enter__(self) -> "Holder":
        self.process.start()
        assert self._here.recv() == "held"
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.is_alive():
            self.release()
        self.process.join()

    @property
    def pid(self) -> int | None:
        return self.process.pid

    def release(self) -> None:
        """Let it end."""
        self._here.send("end")

    def kill(self) -> None:
        """SIGKILL: it cleans nothing up."""
        self.process.kill()
        self.process.join()
