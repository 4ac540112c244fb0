"""Let torchvision be imported beside a torch that it was not built for: in `.venv-serve`, by `make test-serve`.

The index may have torchvision for CUDA alone; beside a torch for CPUs its import fails, since the operators that it
registers shapes for are not there. vLLM and transformers use none of them, but import it. So they are declared in front
of that, in the installed package of this environment. Ends with 1 if that was needed: torchaudio and torchcodec, of the
same make, must then go.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

HEAD = """import torch as _torch  # by prunezoo's tests/serve/torchvision_ops.py

_library = _torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    _library.define(_name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def main() -> int:
    """Declare the operators if they are missing."""
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin)
    text = path.read_text(encoding="utf-8")
    if text.startswith(HEAD):
        return 1
    try:
        importlib.import_module("torchvision")
    except (RuntimeError, OSError):
        path.write_text(HEAD + text, encoding="utf-8")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
