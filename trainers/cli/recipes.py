"""What a recipe may ask for: a bounded number of values, and classes of known packages only.

A recipe is code: what it names as a class is imported and built. So it names classes of ours and of the libraries that
we train with; others only where the command line says `--allow-code`.
"""

import re
from collections import Counter
from collections.abc import Mapping
from pydoc import locate
from typing import Any, cast

import yaml
from jsonargparse import ArgumentParser, set_loader, set_parsing_settings

# jsonargparse has no public name for what it reads YAML with, which knows more numbers than PyYAML
from jsonargparse._loaders_dumpers import yaml_load

from prunezoo.core.bounds import MOST_DEPTH, MOST_JSON_BYTES
from prunezoo.core.near import near

FLAG = "--allow-code"
PACKAGES = ["prunezoo", "trainers", "lightning", "torch"]
MOST_VALUES = 10_000
"""Of a recipe, with each alias counted as what it stands for."""


def bound_recipes(any_package: bool = False) -> None:
    """From now on recipes stay small, and name classes of PACKAGES only, or of any."""
    set_parsing_settings(import_path_denylist=[] if any_package else ["*"], import_path_allowlist=list(PACKAGES))
    set_loader("yaml", load_yaml, exceptions=(yaml.YAMLError,))


def load_yaml(text: str) -> Any:
    """The values of a YAML text.

    Raises:
        yaml.YAMLError: It is none, or too long, too deep, or more values than MOST_VALUES; or it says a key twice.
    """
    if len(text) > MOST_JSON_BYTES:
        raise yaml.YAMLError(f"longer than any recipe, more than {MOST_JSON_BYTES:,} characters")
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_DEPTH:
            raise yaml.YAMLError(f"more than {MOST_DEPTH} levels deep")
    count_values(yaml.compose(text, yaml.SafeLoader), {})
    return yaml_load(text)


def nearest_key(message: str, sections: Mapping[str, type]) -> str:
    """What jsonargparse's message about an unknown key does not say: ``; did you mean 'batch_size'?``.

    Args:
        message: Its message.
        sections: What is set by keys of one part, as ``trainer.max_steps``.
    """
    inside = re.search(r".*class_path '([\w.]+)'.*?Option '([\w.]+)' is not accepted", message)
    beside = re.search(r"unrecognized arguments: --(\w+)\.(\w+)", message)
    if inside:
        kind, name = cast(type, locate(inside[1])), inside[2]
    elif beside and beside[1] in sections:
        kind, name = sections[beside[1]], beside[2]
    else:
        return ""
    return near(name, ArgumentParser().add_class_arguments(kind, fail_untyped=False))  # also those of its **options


def count_values(node: yaml.Node | None, known: dict[int, int]) -> int:
    """Values of a node, aliases written out; those counted before are `known`.

    Raises:
        yaml.YAMLError: More than MOST_VALUES, a value that holds itself, or a key that is said twice.
    """
    if id(node) not in known:
        known[id(node)] = MOST_VALUES + 1  # what stands within itself has no end
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
            said = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            if twice := [key for key, count in said.items() if count > 1]:
                raise yaml.YAMLError(f"'{twice[0]}' stands twice in one place; the first would be forgotten")
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        known[id(node)] = 1 + sum(count_values(part, known) for part in inner)
    if known[id(node)] > MOST_VALUES:
        raise yaml.YAMLError(f"asks for more than {MOST_VALUES:,} values; write out its aliases")
    return known[id(node)]
