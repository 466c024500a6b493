"""Settings of callbacks by name: `--callbacks.SaveCheckpoint.every_n_steps 50`.

The parser reaches the last callback of a list only (`--trainer.callbacks.every_n_steps`). Here the
list that was typed, in files and on the command line, is read, and given to it as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from secateur import typed, yaml_text
from secateur.pruning.commands import UsageError, did_you_mean
from secateur.typed import CLASS, Leaf, Node

_PREFIX = "--callbacks."


def resolve(arguments: Sequence[str]) -> list[str]:
    """The arguments with all callbacks as one list, in place of settings of callbacks by name.

    Raises:
        UsageError: No callback, or more than one, is called so, or a setting has no value.
    """
    rest, given = _taken_out(arguments)
    return [*rest, as_option(callbacks_of(read(arguments)))] if given else rest


def read(arguments: Sequence[str]) -> dict[str, Node]:
    """All settings of a command line, as `typed.read`; those of callbacks by name are in the list.

    Raises:
        UsageError: As for `resolve`, or a file cannot be read, or is not YAML.
    """
    rest, given = _taken_out(arguments)
    tree = typed.read(rest)
    if not given:
        return tree
    callbacks = callbacks_of(tree)
    for option, value in given:
        name, _, setting = option.removeprefix(_PREFIX).partition(".")
        node = typed.of_text(value, callback=name)
        typed.put(_called(callbacks, name, option), setting, node, append=False)
    return tree


def callbacks_of(tree: Mapping[str, Node]) -> list[dict[str, Node]]:
    """The callbacks of settings, in order; they stay part of the tree."""
    trainer = tree.get("trainer")
    nodes = trainer.get("callbacks") if isinstance(trainer, dict) else None
    if not isinstance(nodes, list):
        return []
    nodes[:] = map(typed.as_object, nodes)
    return nodes


def as_option(callbacks: Iterable[Node]) -> str:
    """The argument that gives the trainer these callbacks and no others."""
    return f"--trainer.callbacks={json.dumps([_plain(node) for node in callbacks])}"


def name_of(callback: Mapping[str, Node]) -> str:
    """The name of the class of a callback."""
    return str(callback[CLASS].value).rpartition(".")[2]


def _taken_out(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Other arguments, and pairs of option and value of those that name a callback."""
    rest, given, waiting = [], [], [*arguments]
    while waiting:
        argument = waiting.pop(0)
        option, equals, value = argument.partition("=")
        if not option.startswith(_PREFIX):
            rest.append(argument)
            continue
        if not equals:
            if not waiting:
                raise UsageError(f"`{option}` must be followed by a value.")
            value = waiting.pop(0)
        given.append((option, value))
    return rest, given


def _called(callbacks: Sequence[dict[str, Node]], name: str, option: str) -> dict[str, Node]:
    """The callback whose class has a name.

    Raises:
        UsageError: There is none, or there are several.
    """
    names = [*map(name_of, callbacks)]
    if names.count(name) == 1 and option.count(".") > 1:
        return callbacks[names.index(name)]
    if name in names:
        what = f"{names.count(name)} callbacks" if names.count(name) > 1 else "a callback"
        raise UsageError(f"`{option}` names {what}; it must name one setting of one callback.")
    known = ", ".join(names) or "none"
    raise UsageError(
        f"`{option}` names no callback of this run; it has {known}.{did_you_mean(name, names)}"
    )


def _plain(node: Node) -> Any:
    """A node as the value that the parser reads."""
    if isinstance(node, Leaf):
        return _value(node)
    if isinstance(node, list):
        return [_plain(item) for item in node]
    inside = {key: _plain(item) for key, item in node.items() if key != CLASS}
    if CLASS not in node:
        return inside
    return {"class_path": node[CLASS].value} | ({"init_args": inside} if inside else {})


def _value(leaf: Leaf) -> Any:
    if not leaf.is_text:
        return leaf.value
    try:
        return yaml_text.load(leaf.value)
    except yaml.YAMLError:  # the parser takes such text as it is, too
        return leaf.value
