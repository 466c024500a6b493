"""What the types and signatures of a class tell of its settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import Tensor

WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_NO_OBJECTS = (*WORDS, NoneType, dict, list, tuple, set, Path, Tensor)


def parts_of(hint: Any) -> list[Any]:
    """The alternatives of a type: of unions, of elements of lists, of return values."""
    if get_origin(hint) in (Union, UnionType, list):
        return [part for inner in get_args(hint) for part in parts_of(inner)]
    if get_origin(hint) is Callable:
        return parts_of(get_args(hint)[1])
    return [hint]


def objects_of(hint: Any) -> list[type]:
    """The classes among the alternatives of a type that have settings."""
    return [c for c in parts_of(hint) if inspect.isclass(c) and not issubclass(c, _NO_OBJECTS)]


def takes_list(hint: Any) -> bool:
    """Test whether a list is, or may be, a value of a type."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return any(map(takes_list, get_args(hint)))
    kind = origin or hint
    if kind in (Any, object):
        return True
    return inspect.isclass(kind) and issubclass(kind, Iterable) and kind not in (str, dict)


def is_value(hint: Any) -> bool:
    """Test whether a type is that of plain values, which have no settings of their own."""
    return all(part in (*WORDS, NoneType) or get_origin(part) is Literal for part in parts_of(hint))


def described(hint: Any) -> str:
    """What the values of a type are called."""
    words: list[str] = []
    for part in parts_of(hint):
        if get_origin(part) is Literal:
            words += map(str, get_args(part))
        elif part is NoneType:
            words.append("null")
        else:
            words.append(WORDS.get(part, getattr(part, "__name__", str(part))))
    return " or ".join(dict.fromkeys(words))


def parameters_of(kind: Any) -> dict[str, inspect.Parameter]:
    """The settings of a class by name."""
    found = _signature(kind)
    return {name: p for name, p in found.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}


def takes_any(kind: Any) -> bool:
    """Test whether a class takes settings of any name."""
    return any(p.kind == p.VAR_KEYWORD for p in _signature(kind).values())


def _signature(kind: Any) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(kind).parameters)
    except ValueError:  # of a class that is not written in Python
        return {}


def hints_of(kind: Any) -> dict[str, Any]:
    """The types of the settings of a class, by name; empty if they are not known."""
    # The types of inherited fields are written in the modules of their own classes, which the
    # `__init__` of a dataclass does not know.
    from_init = inspect.isclass(kind) and not is_dataclass(kind)
    try:
        return get_type_hints(kind.__init__ if from_init else kind)
    except NameError:  # of a type that is imported for checkers only
        return {}


def subclasses_of(kind: type[Any]) -> Iterator[type[Any]]:
    """A class and all that are derived from it."""
    yield kind
    for child in kind.__subclasses__():
        yield from subclasses_of(child)
