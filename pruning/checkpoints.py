"""Find the checkpoint to resume from, before anybody reads one."""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path

FOLDER = "checkpoints"
"""Where a run keeps its checkpoints, in its output folder."""

_NAME = re.compile(r"step=(\d+)\.ckpt")


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest readable checkpoint below an output folder, None if there is none at all.

    A damaged file is passed over with a warning that names it.

    Raises:
        ValueError: There are checkpoints and none of them is readable.
    """
    found = newest_first(folder / FOLDER)
    for path in found:
        if is_readable(path):
            return path
        warnings.warn(f"{path} is damaged (truncated?); trying the one before it.", stacklevel=2)
    if found:
        raise ValueError(
            f"None of the {len(found)} checkpoints in {folder / 'checkpoints'} can be read."
        )
    return None


def check_readable(path: Path) -> None:
    """Check a checkpoint before anything is loaded.

    Raises:
        ValueError: It is missing or damaged; names the newest good one beside it.
    """
    if is_readable(path):
        return
    what = "is damaged (truncated?)" if path.exists() else "does not exist"
    good = [other for other in newest_first(path.parent) if is_readable(other)]
    cure = f"resume from {good[0]}" if good else "there is no good one beside it; start again"
    raise ValueError(f"`ckpt_path` {path} {what}; {cure}.")


def is_readable(path: Path) -> bool:
    """Whether a checkpoint is whole: every member of its archives is there with its checksum."""
    archives = sorted(path.rglob("*.pt")) if path.is_dir() else [path]  # sharded: a folder of them
    try:
        return bool(archives) and all(zipfile.ZipFile(a).testzip() is None for a in archives)
    except (OSError, zipfile.BadZipFile):
        return False


def newest_first(folder: Path) -> list[Path]:
    """Checkpoints by the time they were written: an earlier run may have got further in steps."""
    steps = {
        path: int(match[1])
        for path in folder.glob("step=*.ckpt")
        if (match := _NAME.fullmatch(path.name))
    }
    return sorted(steps, key=lambda path: (path.stat().st_mtime_ns, steps[path]), reverse=True)
