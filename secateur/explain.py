"""Find the wrong setting, and name settings as users type them.

The parser of jsonargparse reports errors in terms of types. Here the typed settings are compared
with the signatures of the classes that they name.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from types import NoneType, TracebackType
from typing import Any, NamedTuple, get_origin

import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from secateur import yaml_text
from secateur.pruning.commands import did_you_mean, nearest
from secateur.signatures import (
    WORDS,
    described,
    hints_of,
    is_value,
    objects_of,
    parameters_of,
    parts_of,
    subclasses_of,
    takes_any,
    takes_list,
)
from secateur.typed import CLASS, Leaf, Node

_ROOTS: dict[str, Any] = {"trainer": Trainer, "model": LightningModule, "data": LightningDataModule}
_OF_THE_COMMAND = ("ckpt_path", "return_predictions", "seed_everything", "weights_only")


def wrong_setting(tree: Mapping[str, Node], known: set[str]) -> str | None:
    """Explain what is wrong with the first invalid setting; None if nothing is found.

    Args:
        tree: The settings, see `secateur.typed.read`.
        known: Names of the settings of the command, `trainer`, `model` and `data` among them.
    """
    for name, node in tree.items():
        if name not in known:
            return f"{_said(node, name)} is not a setting.{did_you_mean(name, known)}"
    for name, kind in _ROOTS.items():
        if name in tree and (found := _wrong(tree[name], kind, name)):
            return found
    if missing := [name for name in ("model", "data") if name not in tree]:
        return f"`--{missing[0]}` must be given: a class and its settings, or a `--config` with it."
    return None


def _wrong(node: Node, hint: Any, path: str, default: Any = None) -> str | None:
    """The error of a node or of those below it, as text.

    Args:
        node: What was typed.
        hint: Type of the setting.
        path: Its name.
        default: Its default, whose class applies if none was typed.
    """
    if isinstance(node, list):
        if not takes_list(hint):
            return f"{_said(node, path)} must be {described(hint)}, got a list."
        return next(filter(None, (_wrong(item, hint, path) for item in node)), None)
    if isinstance(node, Leaf):
        if not _names_class(node, hint):
            return _wrong_value(node, hint, path)
        node = {CLASS: node}
    if node and is_value(hint):
        name = next((name for name in node if name != CLASS), CLASS)
        whole = _path_as_typed(node[name], path)
        return f"{_said(node[name], f'{path}.{name}')} is not a setting: {_is(whole, hint)}."
    kind = _class_of(node, hint, path)
    if kind is None and isinstance(default, tuple(objects_of(hint))):
        kind = type(default)
    if kind is None or isinstance(kind, str):
        return kind
    parameters, hints = parameters_of(kind), hints_of(kind)
    for name, child in node.items():
        at = f"{path}.{name}"
        if name not in (CLASS, *parameters) and not takes_any(kind):
            others = "" if CLASS in node else _others(name, hint, _path_as_typed(child, path))
            return (
                f"{_said(child, at)} is not a setting of "
                f"{kind.__name__}.{others or _suggest(child, at, kind)}"
            )
        inner = getattr(default, name, None) or _default_of(kind, name)
        if name in hints and (found := _wrong(child, hints[name], at, inner)):
            return found + (_now(child, at, kind) if isinstance(child, Leaf) else "")
    if get_origin(hint) is not Callable:  # else the caller gives some of them
        for name, parameter in parameters.items():
            if parameter.default is parameter.empty and name not in node:
                return f"`--{path}.{name}` must be given: {kind.__name__} needs it."
    return None


def _default_of(kind: Any, name: str) -> Any:
    """The default of a setting of a class; None if it has none."""
    made = {f.name: f.default_factory for f in fields(kind)} if is_dataclass(kind) else {}
    if callable(make := made.get(name)):
        return make()
    return parameter.default if (parameter := parameters_of(kind).get(name)) else None


def _is(path: str, hint: Any) -> str:
    return f"`--{path}` is {described(hint)}"


def _others(name: str, hint: Any, path: str) -> str:
    """The classes that have a setting, where the default has not, as a sentence."""
    found = {
        c.__name__
        for kind in objects_of(hint)
        for c in subclasses_of(kind)
        if name in parameters_of(c) and not inspect.isabstract(c)
    }
    return (
        f" Set `--{path}` to {' or '.join(sorted(found))}, which has it."
        if 0 < len(found) < 4
        else ""
    )


def forbidden_value(tree: Mapping[str, Node]) -> str | None:
    """Explain a value that the parser takes and no object can use; None if there is none.

    These are null where a setting has none, and numbers that are not finite.

    Args:
        tree: The settings, see `secateur.typed.read`.
    """
    for name, kind in _ROOTS.items():
        for leaf, hint, path in _leaves(tree.get(name, {}), kind, name):
            value, parts = _value_of(leaf), parts_of(hint)
            null = value is None and not {NoneType, Any, object} & {*parts}
            if null or (isinstance(value, float) and not math.isfinite(value)):
                got = leaf.value or "null"
                return f"{_said(leaf, path)} must be {described(hint)}, got {got}."
    return None


def wrong_class(name: str, kind: type[Any], path: str) -> str | None:
    """Explain why a text names no class of a kind; None if it does.

    Args:
        name: Name or path of a class.
        kind: What the class must be derived from.
        path: The setting that has it.
    """
    found = _class_of({CLASS: Leaf(name, is_text=True)}, kind, path)
    return found if isinstance(found, str) else None


def word_of(kind: str) -> str:
    """What the values of a type of Python are called, by its name."""
    return next((word for known, word in WORDS.items() if known.__name__ == kind), kind)


def _leaves(node: Node, hint: Any, path: str) -> Iterator[tuple[Leaf, Any, str]]:
    """Values with their types and paths, as far as the types are known."""
    if isinstance(node, list):
        for item in node:
            yield from _leaves(item, hint, path)
    elif isinstance(node, Leaf):
        yield node, hint, path
    else:
        kind = None if is_value(hint) else _class_of(node, hint, path)
        hints = {} if kind is None or isinstance(kind, str) else hints_of(kind)
        for name, child in node.items():
            if name in hints:
                yield from _leaves(child, hints[name], f"{path}.{name}")


def _value_of(leaf: Leaf) -> Any:
    """The value that the parser makes of a leaf, if it is no text."""
    try:
        return yaml_text.load(leaf.value) if leaf.is_text and leaf.value else leaf.value
    except yaml.YAMLError:
        return leaf.value


def _wrong_value(leaf: Leaf, hint: Any, path: str) -> str | None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        if leaf.is_text:
            parser.parse_args([f"--value={leaf.value}"])
        else:
            parser.parse_object({"value": leaf.value})
    except Exception:  # constructors of types may raise anything
        return f"{_said(leaf, path)} must be {described(hint)}, got {leaf.value!r}."
    return None


def _names_class(leaf: Leaf, hint: Any) -> bool:
    """Test whether a value can only be the name of a class."""
    return (
        bool(objects_of(hint))
        and str not in parts_of(hint)
        and isinstance(leaf.value, str)
        and isinstance(_value_of(leaf), str)  # neither null nor false
        and all(name.isidentifier() for name in leaf.value.split("."))
    )


def _class_of(node: Mapping[str, Node], hint: Any, path: str) -> Any:
    """The class of an object; None if unknown, an error message if no class has that name."""
    kinds, chosen = objects_of(hint), node.get(CLASS)
    if chosen is None:
        return kinds[0] if len(kinds) == 1 and not inspect.isabstract(kinds[0]) else None
    if not isinstance(chosen, Leaf) or not isinstance(chosen.value, str):
        return None
    module, _, name = chosen.value.rpartition(".")
    known: dict[str, Any] = {c.__name__: c for kind in kinds for c in subclasses_of(kind)}
    found = known.get(name)
    if module:
        try:
            found = getattr(package := importlib.import_module(module), name, None)
        except (ImportError, TypeError, ValueError) as error:  # of a path, no module
            why = str(error).rstrip(".")
            return f"{_said(chosen, path)} names {chosen.value}, which cannot be imported: {why}."
        known = vars(package)
    if found:
        if not callable(found) or (inspect.isclass(found) and not issubclass(found, tuple(kinds))):
            return f"{_said(chosen, path)} names {chosen.value}, which is not a {described(hint)}."
        return found
    whole = [key for key, c in known.items() if inspect.isclass(c) and not inspect.isabstract(c)]
    return f"{_said(chosen, path)} names {chosen.value}: no such class.{did_you_mean(name, whole)}"


def _now(node: Node, path: str, kind: Any) -> str:
    """The present name of a setting that has moved, as a sentence."""
    parent, _, last = path.rpartition(".")
    new = getattr(kind, "moved_settings", {}).get(last)
    return f" It is {_said(node, f'{parent}.{new}').split(' in ')[0]} now." if new else ""


def _suggest(node: Node, path: str, kind: Any) -> str:
    """Suggest the nearest setting of a class, or of the objects that are its arguments."""
    if moved := _now(node, path, kind):
        return moved
    own = list(parameters_of(kind))
    known = {name: name for name in (*own, "init_args")}
    for name, hint in hints_of(kind).items():
        for part in objects_of(hint):
            known = {deeper: f"{name}.{deeper}" for deeper in parameters_of(part)} | known
    parent, _, last = path.rpartition(".")
    if not (near := nearest(last, known)):
        return f" It has {', '.join(own) or 'none'}."
    return f" Did you mean {_said(node, f'{parent}.{known[near]}').split(' in ')[0]}?"


def _said(node: Node, path: str) -> str:
    """A setting as it was typed, and the file that it is in."""
    leaf = _first_leaf(node)
    if leaf is not None and leaf.file:
        return f"`{path}` in {leaf.file}"
    return f"`--{_path_as_typed(node, path)}`"


def _path_as_typed(node: Node, path: str) -> str:
    """The name of a setting as it was typed: one of a callback by its name, perhaps."""
    leaf = _first_leaf(node)
    return path if leaf is None else leaf.as_typed(path)


def _first_leaf(node: Node) -> Leaf | None:
    while isinstance(node, dict | list) and node:
        node = next(iter(node.values())) if isinstance(node, dict) else node[0]
    return node if isinstance(node, Leaf) else None


# Names of settings in messages


def as_typed(message: str, raised: TracebackType | None, tree: Mapping[str, Node]) -> str:
    """Rewrite a message to name settings as they are typed: `--data.train`, not `train`.

    Args:
        message: Message with a setting in backquotes, by its name in the class that raised it.
        raised: Traceback; the objects in its frames tell which object has the setting.
        tree: The typed settings.
    """
    roots = ((tree.get(name, {}), kind, name) for name, kind in _ROOTS.items())
    places = [place for root in roots for place in _places(*root)]
    at_work: list[type] = []
    while raised is not None:
        at_work.insert(0, type(raised.tb_frame.f_locals.get("self")))
        raised = raised.tb_next
    near = [place for kind in at_work for place in places if place.kind is kind]

    def typed(match: re.Match[str]) -> str:
        first = match[1].split(".")[0]
        if first in (*_ROOTS, *_OF_THE_COMMAND):
            return f"`--{match[1]}`"
        for place in [*near, *places]:
            if first in parameters_of(place.kind):
                path = f"{place.path}.{match[1]}"
                named = _path_as_typed(_below(place.node, match[1]), path)
                whose = f" of {place.kind.__name__}" if place.path == "trainer.callbacks" else ""
                told = named != path or message[match.end() :].startswith(whose)
                return f"`--{named}`{'' if told else whose}"
        return match[0]

    return re.sub(r"`([a-z_][a-z_0-9.]*)`", typed, message)


class _Place(NamedTuple):
    """An object that was typed, or is a default argument of one."""

    path: str
    kind: type
    node: Node


def _places(node: Node, hint: Any, path: str) -> Iterator[_Place]:
    """Every object that was typed, and their default arguments."""
    if isinstance(node, list):
        for item in node:
            yield from _places(item, hint, path)
        return
    if isinstance(node, Leaf):
        node = {CLASS: node}
    kind = _class_of(node, hint, path)
    if inspect.isclass(kind) and (CLASS in node or is_dataclass(kind) or kind is Trainer):
        yield _Place(path, kind, node)
        for name, inner in hints_of(kind).items():
            yield from _places(node.get(name, {}), inner, f"{path}.{name}")


def _below(node: Node, path: str) -> Node:
    """The node of a setting inside another one, as deep as something was typed."""
    for name in path.split("."):
        if not isinstance(node, dict) or name not in node:
            return node if isinstance(node, Leaf) else None
        node = node[name]
    return node
