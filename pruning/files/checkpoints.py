"""Checkpoints as files: written whole or not at all, and found before anybody reads one."""

from __future__ import annotations

import json
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

FOLDER = "checkpoints"
"""Where a run keeps its checkpoints, in its output folder."""

_BEST = "best.json"
_PARTIAL = ".{}.partial"
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
        raise ValueError(f"None of the {len(found)} checkpoints in {folder / FOLDER} can be read.")
    return None


def best_checkpoint(folder: Path) -> Path | None:
    """The best checkpoint below an output folder, None if the run has chosen none.

    Raises:
        ValueError: It is missing or damaged; names the newest good one.
    """
    figures = read_figures(folder / FOLDER)
    if not figures:
        return None
    path = folder / FOLDER / min(figures, key=figures.__getitem__)
    check_readable(path)
    return path


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
    """Whether a checkpoint is whole: every member of the archive is there with its checksum."""
    try:
        return zipfile.ZipFile(path).testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def step_of(name: str) -> int | None:
    """The optimiser step that a file name tells, None if it is not that of a checkpoint."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def newest_first(folder: Path) -> list[Path]:
    """Checkpoints by the time they were written: an earlier run may have got further in steps."""
    steps = {path: step_of(path.name) for path in folder.glob("step=*.ckpt")}
    found = [
        (path.stat().st_mtime_ns, step, path) for path, step in steps.items() if step is not None
    ]
    return [path for *_, path in sorted(found, reverse=True)]


def read_figures(folder: Path, monitor: str | None = None) -> dict[str, float]:
    """By what the best checkpoints in a folder were chosen: file name to figure, lowest first.

    Args:
        folder: Folder of checkpoints.
        monitor: Name of the figure; any if None.

    Raises:
        ValueError: They were chosen by another figure.
    """
    noted = _noted(folder)
    if noted and monitor not in (None, noted["monitor"]):
        raise ValueError(
            f"`monitor` is {monitor!r}, and the best checkpoints in {folder} were chosen by "
            f"{noted['monitor']!r}; give the same, or remove {_BEST} there, and they go."
        )
    figures: dict[str, float] = noted.get("figures", {})
    return figures


def write_figures(folder: Path, monitor: str | None, figures: Mapping[str, float]) -> None:
    """Note the best checkpoints in a folder, and the figures by which they were chosen.

    Args:
        folder: Folder of checkpoints.
        monitor: Name of the figure; None for the one that is noted already.
        figures: File name to figure.
    """
    if not figures:
        (folder / _BEST).unlink(missing_ok=True)
        return
    name = monitor or _noted(folder)["monitor"]
    noted = json.dumps({"monitor": name, "figures": dict(figures)}, indent=2) + "\n"
    write_whole(folder / _BEST, lambda file: file.write(noted.encode()))


def _noted(folder: Path) -> dict[str, Any]:
    path = folder / _BEST
    noted: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return noted


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file whole or not at all; what this has returned from outlasts a loss of power.

    Args:
        path: The file, replaced if it exists; its folder is made.
        write: Writes the content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(_PARTIAL.format(path.name))
    with partial.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name
    finally:
        os.close(folder)


def remove_partial(folder: Path) -> None:
    """Remove what a killed run was writing."""
    for stale in folder.glob(_PARTIAL.format("*")):
        stale.unlink(missing_ok=True)
