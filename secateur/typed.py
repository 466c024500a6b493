"""Settings as typed, on the command line and in its configuration files, unchecked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from secateur import yaml_text
from secateur.pruning.commands import UsageError

CLASS = "class_path"
CALLBACKS = "trainer.callbacks."
_FLAGS = ("--help", "--print_config", "-h")


@dataclass(frozen=True)
class Leaf:
    """A value and where it was typed.

    Args:
        value: Text from the command line, or a value from YAML.
        is_text: Whether the value is text that the parser has not parsed yet.
        file: The file that it is in; None for the command line.
        callback: The callback whose name it was typed under, as in
            `--callbacks.SaveCheckpoint.keep`; None if under none.
    """

    value: Any
    is_text: bool
    file: Path | None = None
    callback: str | None = None

    def as_typed(self, path: str) -> str:
        """The name of a setting that this leaf is in, as it was typed."""
        name = f"callbacks.{self.callback}."
        return path if self.callback is None else path.replace(CALLBACKS, name, 1)


Node = Any
"""A `Leaf`, a list of nodes, or a dictionary: settings of an object, its class as `class_path`."""


def read(arguments: Sequence[str]) -> dict[str, Node]:
    """All settings of a command line.

    Raises:
        UsageError: A file cannot be read, or is not YAML.
    """
    tree: dict[str, Node] = {}
    for name, text in _options(arguments):
        if text is None:
            raise UsageError(f"`{name}` must be followed by a value.")
        if name in ("--config", "-c"):
            _merge(tree, _of_file(text))
        else:
            put(tree, name[2:].removesuffix("+"), of_text(text), append=name.endswith("+"))
    return tree


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Names and values; the value of an option that has none is None."""
    rest = [argument for argument in arguments if argument not in _FLAGS]
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("-"):
            continue
        if equals:
            yield name, value
        else:
            yield name, rest.pop(0) if rest and not rest[0].startswith("--") else None


def _of_file(name: str) -> dict[str, Node]:
    try:
        content = yaml_text.load(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"`--config` {name} cannot be read: {error.strerror}.") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"`--config` {name} is not YAML: {_reason(error)}.") from error
    if not isinstance(content, dict):
        raise UsageError(
            f"`--config` {name} holds no settings; see configs/disp.yaml for an example."
        )
    found: dict[str, Node] = _of_yaml(content, Path(name))
    return found


def _reason(error: Exception) -> str:
    """The reason why a file cannot be parsed, in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return str(error)


def of_text(text: str, callback: str | None = None) -> Node:
    """The node of a value as it is typed on the command line, perhaps under a callback's name."""
    try:
        value = yaml_text.load(text)
    except yaml.YAMLError:
        value = text
    if isinstance(value, dict | list):
        return _of_yaml(value, callback=callback)
    return Leaf(text, is_text=True, callback=callback)


def _of_yaml(value: Any, file: Path | None = None, callback: str | None = None) -> Node:
    """The node of a YAML value; the level `init_args` is left out."""
    if isinstance(value, list):
        return [_of_yaml(item, file, callback) for item in value]
    if not isinstance(value, dict):
        return Leaf(value, is_text=False, file=file, callback=callback)
    node: dict[str, Node] = {}
    for key, item in value.items():
        if key in ("init_args", "dict_kwargs") and isinstance(item, dict):
            node |= _of_yaml(item, file, callback)
        else:
            node[str(key)] = _of_yaml(item, file, callback)
    return node


def put(tree: dict[str, Node], name: str, node: Node, append: bool) -> None:
    """Store a setting under its dotted name; in a list it belongs to the last object."""
    *parents, last = name.replace(".init_args.", ".").split(".")
    for parent in parents:
        child = tree.get(parent)
        if isinstance(child, list) and child:
            child[-1] = tree = as_object(child[-1])
        else:
            tree[parent] = child = as_object(child)
            tree = child
    before = tree.get(last)
    if append:
        tree[last] = [*(before if isinstance(before, list) else []), node]
    elif isinstance(node, dict) and isinstance(before, dict):
        _merge(before, node)
    else:
        tree[last] = node


def as_object(node: Node) -> dict[str, Node]:
    """Turn a node into one that holds settings; a leaf becomes its `class_path`."""
    if isinstance(node, dict):
        return node
    return {CLASS: node} if isinstance(node, Leaf) else {}


def _merge(into: dict[str, Node], new: Mapping[str, Node]) -> None:
    if CLASS in new and getattr(into.get(CLASS), "value", None) != new[CLASS].value:
        into.clear()
    for key, node in new.items():
        if isinstance(node, dict) and isinstance(into.get(key), dict):
            _merge(into[key], node)
        else:
            into[key] = node
