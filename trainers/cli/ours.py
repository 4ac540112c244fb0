"""Start one of our own commands from another, in a process of its own."""

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from prunezoo.core.errors import PruneZooError


def run_ours(module: str, *words: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> None:
    """Run `python -m module words…` to its end; what it prints is seen.

    Args:
        module: Of this repository, as `trainers.fit`.
        words: Of its command line.
        cwd: Where; by default here.
        environment: What is set besides the environment as it is.

    Raises:
        PruneZooError: It failed; its own message stands above.
    """
    set_besides = {**os.environ, **(environment or {})}
    code = subprocess.run([sys.executable, "-m", module, *words], cwd=cwd, env=set_besides, check=False).returncode  # noqa: S603
    if code:
        said = shlex.join(["python", "-m", module, *words])
        raise PruneZooError(f"{said} ended with code {code}; its own message stands above")
