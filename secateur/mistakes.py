"""Report mistakes of users in one to three lines; other errors keep their traceback.

Our own errors are ValueErrors that name setting, value and cure. Errors of libraries keep their
message, or get a clearer one here.
"""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from secateur.pruning.commands import UsageError

_LINES = 3
_LONGEST = 600  # characters of a line

_WHERE = "SECATEUR_DEBUG=1 shows where."
_OURS = (ValueError, OSError, FloatingPointError, ImportError)

# By name: importing the libraries only for their exceptions would take seconds.
_BETTER = {
    "DistNetworkError": (
        "{} Another program may listen there: MASTER_PORT names another port, 1024 to 65535."
    ),
    "OutOfMemoryError": (
        "{} Lower `--data.batch_size` or `--data.window_tokens`, or set "
        "`--model.gradient_checkpointing true`; docs/memory.md has more."
    ),
}


@contextmanager
def told() -> Iterator[None]:
    """End the program with a message after a mistake of the user: code 1, or 2 for usage errors.

    With SECATEUR_DEBUG in the environment the traceback is shown instead.

    Raises:
        SystemExit: The user made a mistake, or stopped the program.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit("\nStopped; no incomplete file is left.") from None
    except Exception as error:
        message = explain(error)
        if message is None or os.environ.get("SECATEUR_DEBUG"):
            raise
        sys.stdout.flush()
        sys.stderr.write(f"\nerror: {message}\n")
        raise SystemExit(2 if isinstance(error, UsageError) else 1) from error


def explain(error: BaseException) -> str | None:
    """The text of an error in at most three lines; None if it is not a mistake of the user."""
    names = [kind.__name__ for kind in type(error).__mro__]
    words = next((_BETTER[name] for name in names if name in _BETTER), "{}")
    if words == "{}" and _while_resuming(error):
        what = " ".join(f"{type(error).__name__}: {error}".split())
        return (
            f"The checkpoint does not have the state that this run needs ({what:.200}). Resume "
            f"from another one, or start again without `--ckpt_path`.\n{_WHERE}"
        )
    if words == "{}" and not isinstance(error, _OURS) and not _of_library(error):
        return None
    notes = [line for note in getattr(error, "__notes__", ()) for line in _lines(note)]
    if not isinstance(error, UsageError):
        notes.append(_WHERE)
    own = _lines(words.format(_text(error)))
    room = max(1, _LINES - len(notes))
    if len(own) > room:  # libraries put the failure first and the reason last
        own = [*own[: room - 1], own[-1]]
    return "\n".join([*own, *notes])


def _while_resuming(error: BaseException) -> bool:
    """Whether Lightning was handing out what a checkpoint holds, and nothing of ours judged it."""
    place, restoring, module = error.__traceback__, False, ""
    while place is not None:
        code, module = place.tb_frame.f_code, place.tb_frame.f_globals.get("__name__", "")
        restoring |= (
            code.co_filename.endswith("checkpoint_connector.py") and "restore" in code.co_name
        )
        place = place.tb_next
    judged = isinstance(error, _OURS) and module.startswith("secateur.")
    return restoring and not judged


def _of_library(error: BaseException) -> bool:
    """Test whether a library has raised an error on purpose, as it does about a wrong setting."""
    if type(error).__module__.startswith("safetensors"):  # compiled: has no frame
        return True
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    if place is None:
        return False
    file = place.tb_frame.f_code.co_filename
    line = linecache.getline(file, place.tb_lineno).strip()
    return "site-packages" in file and line.startswith("raise")


def _text(error: BaseException) -> str:
    """The message of an error; for system errors, with the file before the reason."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}."
    return str(error) or type(error).__name__


def _lines(text: str) -> list[str]:
    lines = (" ".join(line.split()) for line in text.splitlines())
    return [line if len(line) <= _LONGEST else f"{line[:_LONGEST]} ..." for line in lines if line]
