"""What is trained does not know what is kept on disk for it: caches import trainings, never the other way round."""

import ast
from pathlib import Path

TRAINING = Path(__file__).parent.parent.parent / "trainers" / "training"


def test_trainings_do_not_import_caches():
    found = {}
    for path in sorted(TRAINING.rglob("*.py")):
        nodes = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ImportFrom)]
        found[path.name] = [node.module for node in nodes if node.module]
    assert len(found) > 15 and "trainers.data.modules" in found["frozen.py"]
    assert not {name for name, modules in found.items() if any(m.startswith("trainers.caches") for m in modules)}
