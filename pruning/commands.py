"""Argument parser and usage errors of the commands of the program."""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

_NAME = (
    r"(?:[\w-]*(?:api|access|private|secret)[_-]?key|[\w-]*(?:secret|password|passwd|token)"
    r"|authorization)"
)
_SECRET_NAME = re.compile(rf"(?i)-{{1,2}}(?:[\w.-]*\.)?{_NAME}")
_SECRET_VALUE = re.compile(rf"(?i)((?:^|[^\w-]|--){_NAME}[\"']?\s*[=:]\s*[\"']?)[^\s\"',}}]+")
_IN_URL = re.compile(r"(\w+://)[^/\s@]+@")
_KNOWN = re.compile(
    r"hf_\w{30,}|sk-[\w-]{16,}|gh[pousr]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}"
    r"|xox[abp]-[\w-]{10,}|AKIA[0-9A-Z]{16}"
)
_HIDDEN = "***"

JSON, PAGE = (b"{", b"["), (b"<!doctype html>",)
"""What files that are written with `new_file` begin with."""


def without_secrets(arguments: Iterable[str]) -> list[str]:
    """Arguments as a model card may show them: no tokens, keys or passwords.

    Told by the name of the setting, the form of the value, or the place in a URL.
    """
    shown: list[str] = []
    for argument in arguments:
        if shown and _SECRET_NAME.fullmatch(shown[-1]):
            shown.append(_HIDDEN)
            continue
        hidden = _SECRET_VALUE.sub(rf"\1{_HIDDEN}", argument)
        hidden = _IN_URL.sub(rf"\1{_HIDDEN}@", hidden)
        shown.append(_KNOWN.sub(_HIDDEN, hidden))
    return shown


def typed_command(arguments: Sequence[str]) -> str:
    """The command line of this program as it is typed, without secrets.

    Args:
        arguments: As in `sys.argv`: `python -m secateur` has the path of a file as the first one.
    """
    program, *rest = arguments
    typed = ["-m", Path(program).parent.name] if Path(program).name == "__main__.py" else [program]
    return shlex.join(["python", *typed, *without_secrets(rest)])


class UsageError(ValueError):
    """A wrong command line: a setting that does not exist, or an invalid value.

    The program ends with code 2 after it, and with 1 after any other error.
    """


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most similar to a mistyped one, None if no name is similar."""
    near = get_close_matches(name, sorted(set(known)), n=1, cutoff=0.6)
    return near[0] if near else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question that ends a message, with a space before it; empty if no known name is similar."""
    near = nearest(name, known)
    return f" Did you mean `{near}`?" if near else ""


def import_all(package: ModuleType) -> None:
    """Import all modules of a package: the command line finds imported classes by short name."""
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


class CommandParser(argparse.ArgumentParser):
    """Parser for one command: options by their full names, errors as `UsageError`.

    Args:
        command: Name of the command.
        description: Its help text, printed unchanged.
    """

    def __init__(self, command: str, description: str) -> None:
        super().__init__(
            prog=f"python -m secateur {command}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; report an unknown option before a missing one, since it may be a typo of it.

        Raises:
            UsageError: An argument is unknown, missing, or has an invalid value.
        """
        known = [*self._option_string_actions]
        for argument in args or []:
            name = str(argument).partition("=")[0]
            if name.startswith("--") and name not in known:
                self.error(f"there is no option `{name}`.{did_you_mean(name, known)}")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """End the command without printing the usage, which would hide the message.

        Raises:
            UsageError: Always.
        """
        end = "" if message[-1] in ".?" else "."
        raise UsageError(f"{message}{end} See `{self.prog} --help`.")

    @contextmanager
    def naming(self, **others: str) -> Iterator[None]:
        """Name settings in errors as they are typed: `--window-tokens`, not `window_tokens`.

        Args:
            **others: What the settings of functions are called that have other names here.

        Raises:
            ValueError: As the block raised it.
        """
        names = others | {
            action.dest: action.option_strings[-1] if action.option_strings else str(action.metavar)
            for action in self._actions
        }
        try:
            yield
        except ValueError as error:
            if type(error) is ValueError:  # subclasses carry more than a message

                def typed(found: re.Match[str]) -> str:
                    return f"`{names.get(found[1], found[1])}`"

                error.args = (re.sub(r"`(\w+)`", typed, str(error)),)
            raise


def read_text(path: Path, option: str = "--text") -> str:
    """Read a file of text, or all files `*.txt` of a folder in the order of their names.

    Args:
        path: The file or folder.
        option: The option that names it, for the message.

    Raises:
        ValueError: It cannot be read, is not UTF-8, or is a folder without such files.
    """
    if path.is_dir():
        if not (files := sorted(path.glob("*.txt"))):
            raise ValueError(f"`{option}` {path} holds no files *.txt; name the files themselves.")
        return "\n\n".join(read_text(file, option) for file in files)
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise ValueError(f"`{option}` {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"`{option}` {path} is not UTF-8 text ({error}); convert it.") from error


def device_here(text: str) -> str:
    """A device of torch that computes here.

    Raises:
        ArgumentTypeError: It is none.
    """
    import torch  # takes seconds, and most commands end before

    try:
        torch.empty(1, device=text).item()
    except (AssertionError, RuntimeError) as error:  # the former without support in torch
        raise argparse.ArgumentTypeError(f"{text!r} is not a device here: {error}") from error
    return text


def new_file(starts: tuple[bytes, ...]) -> Callable[[str], Path]:
    """The type of an argument that names a file to write.

    A file that exists may be replaced if it is empty, or of the same kind and not in the folder of
    a model.

    Args:
        starts: What files of the kind begin with, one of them.

    Returns:
        A function from the argument to the path. It raises an ArgumentTypeError if the folder does
        not exist, the path is a folder, or the file is not to be replaced.
    """

    def parse(text: str) -> Path:
        path = Path(text)
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{path} is a folder; name a file")
        if not path.absolute().parent.is_dir():
            raise argparse.ArgumentTypeError(f"{path}: there is no folder {path.absolute().parent}")
        if path.is_file() and path.stat().st_size:
            with path.open("rb") as file:
                same = file.read(max(map(len, starts))).startswith(starts)
            if not same or path.with_name("config.json").exists():
                raise argparse.ArgumentTypeError(
                    f"{path} exists and may not be of this command; name another or remove it"
                )
        return path

    return parse
