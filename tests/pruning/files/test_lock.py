from __future__ import annotations

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from secateur.pruning.files.lock import LOCK, locked

HOLD = """
import sys, time
from pathlib import Path
from secateur.pruning.files.lock import locked
with locked(Path(sys.argv[1]), "folder"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_another_process_is_refused_until_the_holder_dies(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        who = rf"process {holder.pid} on {socket.gethostname()}, since 20"
        with (
            pytest.raises(ValueError, match=f"`folder` {tmp_path} is in use by {who}"),
            locked(tmp_path, "folder"),
        ):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    with locked(tmp_path, "folder"):
        assert f'"process": {os.getpid()}' in (tmp_path / LOCK).read_text()


def test_a_file_system_without_locks_gives_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with (
        pytest.warns(UserWarning, match="cannot be locked .No locks available."),
        locked(tmp_path / "new", "folder"),
    ):
        assert (tmp_path / "new" / LOCK).is_file()
