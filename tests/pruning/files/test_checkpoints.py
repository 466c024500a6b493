from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from secateur.pruning.files.checkpoints import (
    FOLDER,
    check_readable,
    is_readable,
    latest_checkpoint,
    remove_partial,
    write_whole,
)


def write(root: Path, *steps: int) -> Path:
    """Checkpoints of these steps, one second apart, in this order; the last one's path."""
    folder = root / FOLDER
    folder.mkdir(exist_ok=True)
    newest = max((path.stat().st_mtime_ns for path in folder.iterdir()), default=10**18)
    for place, step in enumerate(steps, 1):
        path = folder / f"step={step}.ckpt"
        torch.save({"step": step, "x": torch.arange(1000)}, path)
        os.utime(path, ns=(newest + place * 10**9,) * 2)
    return path


def damage(path: Path) -> None:
    times = path.stat()
    path.write_bytes(path.read_bytes()[:-200])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_last_is_the_newest_written_even_if_an_earlier_run_got_further(tmp_path: Path) -> None:
    write(tmp_path, 40, 30, 10)
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.name == "step=10.ckpt"


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    damage(write(tmp_path, 5, 10))
    with pytest.warns(UserWarning, match="step=10.ckpt is damaged"):
        found = latest_checkpoint(tmp_path)
    assert found == tmp_path / FOLDER / "step=5.ckpt"


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    assert is_readable(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # in the numbers of the tensor
    path.write_bytes(content)
    assert not is_readable(path)


@pytest.mark.filterwarnings("ignore:.*is damaged")
def test_nothing_readable_is_an_error_and_nothing_at_all_is_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for step in (5, 10):
        damage(write(tmp_path, step))
    with pytest.raises(ValueError, match="None of the 2 checkpoints .* can be read"):
        latest_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="there is no good one beside it"):
        check_readable(tmp_path / FOLDER / "step=5.ckpt")


def test_a_missing_checkpoint_is_named_with_the_one_that_is_there(tmp_path: Path) -> None:
    write(tmp_path, 5)
    with pytest.raises(ValueError, match="step=7.ckpt does not exist; resume from .*step=5.ckpt"):
        check_readable(tmp_path / FOLDER / "step=7.ckpt")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "step=5.ckpt"
    write_whole(path, lambda file: file.write(b"old"))

    def fill_the_disk(file: BinaryIO) -> None:
        file.write(b"half of")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_whole(path, fill_the_disk)
    assert path.read_bytes() == b"old"
    assert len(list(path.parent.iterdir())) == 2
    remove_partial(path.parent)
    assert list(path.parent.iterdir()) == [path]


def test_content_and_name_are_on_disk_before_anything_else_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The content before the file gets its name, the folder with that name after."""
    synced: list[tuple[bool, list[str]]] = []

    def note(number: int) -> None:
        names = sorted(path.name for path in tmp_path.iterdir())
        synced.append((stat.S_ISDIR(os.fstat(number).st_mode), names))

    monkeypatch.setattr(os, "fsync", note)
    write_whole(tmp_path / "a", lambda file: file.write(b"content"))
    assert synced == [(False, [".a.partial"]), (True, ["a"])]
