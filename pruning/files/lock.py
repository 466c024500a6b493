"""One run per output folder: a lock that the system releases whenever its process ends."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from errno import EACCES, EAGAIN
from pathlib import Path

LOCK = ".lock"
"""The lock file in an output folder; it is kept, and names the last process that held it."""


@contextmanager
def locked(folder: Path, setting: str) -> Iterator[None]:
    """Lock an output folder for one run.

    It is a POSIX lock: file systems of clusters share it between machines, and child processes do
    not inherit it.

    Args:
        folder: The folder, created if needed.
        setting: The setting that names it, for the message.

    Raises:
        ValueError: The folder cannot be written, or another process has locked it; names the
            process and since when.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"`{setting}` {folder} cannot be written: {error.strerror}.") from error
    with lock as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (EACCES, EAGAIN):
                raise ValueError(
                    f"`{setting}` {folder} is in use by {_holder(folder / LOCK)}. Wait for its end "
                    "or stop it, or choose another folder."
                ) from None
            warnings.warn(
                f"{folder} cannot be locked ({error.strerror}): make sure that no other run writes "
                "there.",
                stacklevel=2,
            )
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        file.truncate(0)
        json.dump({"host": socket.gethostname(), "process": os.getpid(), "since": since}, file)
        file.flush()
        yield


def _holder(path: Path) -> str:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return f"process {told['process']} on {told['host']}, since {told['since']}"
    except (OSError, KeyError, TypeError, ValueError):
        return "another run"
