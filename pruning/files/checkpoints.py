"""Checkpoint files: written completely or not at all, and checked before they are read."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from secateur.pruning.checksums import checksum

FOLDER = "checkpoints"
"""Folder of checkpoints in the output folder of a run."""

_BEST = "best.json"
_PARTIAL = ".{}.partial"
_SEAL_BYTES = 128
_NAME = re.compile(r"step=(\d+)\.ckpt")


@dataclass(frozen=True, order=True)
class Seal:
    """Run, step and checksum of a checkpoint, stored at its end.

    Args:
        run: Number of the launch that wrote it, 1 or more, counted up for every launch in a folder.
        step: Optimiser steps taken, 0 or more.
        checksum: Checksum of these two and of everything before the seal, hex, 32 digits.
    """

    run: int
    step: int
    checksum: str


def seal(file: BinaryIO, run: int, step: int) -> None:
    """Append the seal to a checkpoint, as the comment of its zip archive.

    Clocks differ between machines and copies lose times, so the file itself stores order and
    checksum.

    Args:
        file: The archive, complete, open for reading and writing.
        run: Number of the launch.
        step: Optimiser steps taken.
    """
    file.seek(-2, os.SEEK_END)  # the length of the comment, 0 so far
    file.write(_SEAL_BYTES.to_bytes(2, "little"))
    found = Seal(run, step, checksum(file, notes=f"{run} {step}"))
    file.seek(0, os.SEEK_END)
    file.write(json.dumps(asdict(found)).encode().ljust(_SEAL_BYTES))


def read_seal(path: Path) -> Seal | None:
    """The seal of a checkpoint, None if it has none; `is_whole` verifies it."""
    try:
        with path.open("rb") as file:
            file.seek(-_SEAL_BYTES, os.SEEK_END)
            told = json.loads(file.read())
        return Seal(int(told["run"]), int(told["step"]), str(told["checksum"]))
    except (OSError, KeyError, TypeError, ValueError):
        return None


def is_whole(path: Path) -> bool:
    """Test whether a checkpoint is undamaged, by its checksum, and has its original name."""
    found = read_seal(path)
    if found is None or step_of(path.name) not in (None, found.step):
        return False
    sealed, notes = path.stat().st_size - _SEAL_BYTES, f"{found.run} {found.step}"
    with path.open("rb") as file:
        return checksum(file, sealed, notes) == found.checksum


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest undamaged checkpoint below an output folder, None if there are no checkpoints.

    A damaged file is skipped with a warning that names it.

    Raises:
        ValueError: There are checkpoints and all are damaged.
    """
    found, unsealed = newest_first(folder / FOLDER), _unsealed(folder / FOLDER)
    for path in unsealed:
        warnings.warn(f"{path} is damaged (truncated?) and skipped.", stacklevel=2)
    for path in found:
        if is_whole(path):
            return path
        warnings.warn(f"{path} is damaged; trying the one before it.", stacklevel=2)
    if found or unsealed:
        raise ValueError(
            f"All {len(found + unsealed)} checkpoints in {folder / FOLDER} are damaged. Start "
            "without `--ckpt_path`, or restore one from a copy."
        )
    return None


def best_checkpoint(folder: Path) -> Path | None:
    """The best checkpoint below an output folder, None if the run recorded none.

    Raises:
        ValueError: It is missing or damaged; names the newest good one.
    """
    figures = read_figures(folder / FOLDER)
    if not figures:
        return None
    path = folder / FOLDER / min(figures, key=figures.__getitem__)
    check_whole(path)
    return path


def check_whole(path: Path) -> None:
    """Check a checkpoint before anything is loaded.

    Raises:
        ValueError: It is missing or damaged; names the newest good one beside it.
    """
    if is_whole(path):
        return
    what = "does not exist"
    if path.is_dir():
        what = "is a folder, not a checkpoint"
    elif path.exists():
        what = "is damaged (truncated?), or was not written by SaveCheckpoint of this version"
    good = next((other for other in newest_first(path.parent) if is_whole(other)), None)
    cure = f"resume from {good}" if good else "there is no good one beside it; start again"
    raise ValueError(f"`ckpt_path` {path} {what}; {cure}.")


def step_of(name: str) -> int | None:
    """The optimiser step in a file name, None if it is not the name of a checkpoint."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def newest_first(folder: Path) -> list[Path]:
    """Checkpoints sorted by launch, then step: an earlier run may have reached a later step."""
    seals = {path: found for path in _named(folder) if (found := read_seal(path))}
    return sorted(seals, key=seals.__getitem__, reverse=True)


def next_run(folder: Path) -> int:
    """Number of the next launch."""
    found = newest_first(folder)
    newest = read_seal(found[0]) if found else None
    return newest.run + 1 if newest else 1


def _unsealed(folder: Path) -> list[Path]:
    return [path for path in _named(folder) if read_seal(path) is None]


def _named(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step=*.ckpt") if step_of(path.name) is not None)


def read_figures(folder: Path, monitor: str | None = None) -> dict[str, float]:
    """The figures of the best checkpoints in a folder: file name to figure, lowest first.

    Args:
        folder: Folder of checkpoints.
        monitor: Name of the figure; any if None.

    Raises:
        ValueError: The checkpoints were selected by another figure.
    """
    noted = _noted(folder)
    if noted and monitor not in (None, noted["monitor"]):
        raise ValueError(
            f"`monitor` is {monitor!r}, and the best checkpoints in {folder} were selected by "
            f"{noted['monitor']!r}; give the same, or remove {_BEST} there to drop them."
        )
    figures: dict[str, float] = noted.get("figures", {})
    return figures


def write_figures(folder: Path, monitor: str | None, figures: Mapping[str, float]) -> None:
    """Record the best checkpoints in a folder, and their figures.

    Args:
        folder: Folder of checkpoints.
        monitor: Name of the figure; None keeps the recorded name.
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
    """Write a file completely or not at all; it is safely on disk when this returns.

    Args:
        path: The file, replaced if it exists; its folder is created if needed.
        write: Called with a file open for reading and writing, to write the content.

    Raises:
        OSError: Writing failed, for example because the disk is full; names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(_PARTIAL.format(path.name))
    try:
        with partial.open("w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException as error:
        partial.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__
        if isinstance(cause, OSError):  # more precise than the error of torch
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # make the new name durable
    finally:
        os.close(folder)


def remove_partial(folder: Path) -> None:
    """Remove files that a killed run left incomplete."""
    for stale in folder.glob(_PARTIAL.format("*")):
        stale.unlink(missing_ok=True)
