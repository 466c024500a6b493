"""Read YAML of users: limit its size, refuse repeated keys, accept old class names."""

from __future__ import annotations

import re
import sys
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

_MOST_VALUES, _MOST_CHARACTERS = 100_000, 1_000_000
_OLD_PATH = re.compile(r"(?:modules|callbacks|pruning)\.(?:\w+\.)*([A-Z]\w*)")
_RENAMED = {
    "pruning.depth.Magnitude": "BlockMagnitude",
    "pruning.depth.scores.Magnitude": "BlockMagnitude",
}
"""New names of renamed classes, by their old paths."""

_load_as_before = get_loader("yaml")


def install() -> None:
    """Make the command line read configurations and values with `load`."""
    set_loader("yaml", load, (yaml.YAMLError,))


def load(text: str) -> Any:
    """A value from YAML text.

    Raises:
        YAMLError: The text is not YAML, has a key twice, or expands to too many values.
    """
    if len(text) > _MOST_CHARACTERS:
        raise yaml.YAMLError(f"it has more than {_MOST_CHARACTERS:,} characters")
    try:
        _check(yaml.compose(text, Loader=yaml.SafeLoader), {})
        return present(_load_as_before(text))
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


def present(value: Any) -> Any:
    """A value in which paths of moved classes are replaced by the current ones, at any depth."""
    if isinstance(value, dict):
        return {key: present(item) for key, item in value.items()}
    if isinstance(value, list):
        return [present(item) for item in value]
    if isinstance(value, str) and (old := _OLD_PATH.fullmatch(value)):
        return _present_path(value, _RENAMED.get(value, old[1]))
    return value


def _present_path(old: str, name: str) -> str:
    """Current path of a class by its name; of several, the one with the module most like the old.

    A name that is not found is returned unchanged: it may be a file.
    """

    def shared(module: str) -> int:
        return len(set(re.split(r"[._]", module)) & set(re.split(r"[._]", old)))

    homes = {
        vars(module)[name].__module__
        for path, module in [*sys.modules.items()]
        if path.startswith("secateur.") and isinstance(vars(module).get(name), type)
    }
    ours = sorted(home for home in homes if home.startswith("secateur."))
    return f"{max(ours, key=shared)}.{name}" if ours else old


def _check(node: Any, sizes: dict[int, int]) -> int:
    """Count the values of a node; an alias counts each time that it is used.

    Raises:
        YAMLError: There are too many, or a mapping has a key twice.
    """
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise yaml.YAMLError(f"{_line(node)}: an alias refers to a node that contains it")
        return sizes[id(node)]
    sizes[id(node)] = 0
    parts = []
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [key for key in keys if keys.count(key) > 1 and key != "<<"]:
            raise yaml.YAMLError(f"{_line(node)}: `{twice[0]}` is given twice")
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    count = 1
    for part in parts:
        count += _check(part, sizes)
        if count > _MOST_VALUES:
            raise yaml.YAMLError(f"it expands to more than {_MOST_VALUES:,} values")
    sizes[id(node)] = count
    return count


def _line(node: Any) -> str:
    return f"line {node.start_mark.line + 1}"
