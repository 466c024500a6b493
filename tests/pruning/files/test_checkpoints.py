from __future__ import annotations

import os
import resource
import signal
import stat
from pathlib import Path
from typing import BinaryIO

import pytest
import torch

from secateur.pruning.files.checkpoints import (
    FOLDER,
    check_whole,
    is_whole,
    latest_checkpoint,
    newest_first,
    next_run,
    remove_partial,
    seal,
    write_whole,
)


def write(root: Path, *steps: int, run: int = 1) -> Path:
    """Checkpoints of these steps, by one launch; the last one's path."""
    folder = root / FOLDER
    for step in steps:
        path = folder / f"step={step}.ckpt"

        def content(file: BinaryIO, step: int = step) -> None:
            torch.save({"step": step, "x": torch.arange(1000)}, file)
            seal(file, run, step)

        write_whole(path, content)
    return path


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def test_last_is_that_of_the_last_launch_even_if_an_earlier_one_got_further(tmp_path: Path) -> None:
    assert next_run(tmp_path / FOLDER) == 1
    write(tmp_path, 30, 40)
    assert next_run(tmp_path / FOLDER) == 2
    write(tmp_path, 5, 10, run=2)
    assert latest_checkpoint(tmp_path) == tmp_path / FOLDER / "step=10.ckpt"
    assert [path.name for path in newest_first(tmp_path / FOLDER)] == [
        "step=10.ckpt",
        "step=5.ckpt",
        "step=40.ckpt",
        "step=30.ckpt",
    ]


@pytest.mark.parametrize("seconds", [[9, 5, 1], [5, 5, 5], [10**10, 5, 1]])
def test_clocks_and_copies_without_times_change_nothing(seconds: list[int], tmp_path: Path) -> None:
    write(tmp_path, 4, 8, 12)
    for step, time in zip((4, 8, 12), seconds, strict=True):
        os.utime(tmp_path / FOLDER / f"step={step}.ckpt", (time, time))
    assert latest_checkpoint(tmp_path) == tmp_path / FOLDER / "step=12.ckpt"


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    damage(write(tmp_path, 5, 10))
    with pytest.warns(UserWarning, match="step=10.ckpt is damaged"):
        found = latest_checkpoint(tmp_path)
    assert found == tmp_path / FOLDER / "step=5.ckpt"


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """In numbers, names and padding, in the directory of the archive, in the seal itself."""
    path = write(tmp_path, 5)
    assert is_whole(path)
    assert torch.load(path, weights_only=True)["step"] == 5
    content = path.read_bytes()
    for place in [*range(0, len(content), 97), *range(len(content) - 400, len(content) - 50)]:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert not is_whole(path), place
    path.write_bytes(content)
    assert is_whole(path)


def test_a_renamed_or_unsealed_checkpoint_is_damaged(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    assert is_whole(path.rename(path.with_name("copy.ckpt")))
    path.with_name("copy.ckpt").rename(path.with_name("step=9.ckpt"))
    assert not is_whole(path.with_name("step=9.ckpt"))
    torch.save({"step": 5}, path)
    assert not is_whole(path)
    with pytest.raises(
        ValueError, match="damaged .*, or was not written by SaveCheckpoint .* start again"
    ):
        check_whole(path)


@pytest.mark.filterwarnings("ignore:.*is damaged")
def test_nothing_readable_is_an_error_and_nothing_at_all_is_none(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for step in (5, 10):
        damage(write(tmp_path, step))
    with pytest.raises(ValueError, match="All 2 checkpoints .* are damaged"):
        latest_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="there is no good one beside it"):
        check_whole(tmp_path / FOLDER / "step=5.ckpt")


def test_a_missing_checkpoint_is_named_with_the_one_that_is_there(tmp_path: Path) -> None:
    write(tmp_path, 5)
    with pytest.raises(ValueError, match="step=7.ckpt does not exist; resume from .*step=5.ckpt"):
        check_whole(tmp_path / FOLDER / "step=7.ckpt")


def test_a_full_disk_leaves_the_old_file_and_no_half_of_a_new_one(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk; torch, which writes, says nothing of
    it.
    """
    path = write(tmp_path, 5)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large: .*step=5.ckpt"):
            write(tmp_path, 5)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_what_a_killed_run_was_writing_is_removed(tmp_path: Path) -> None:
    path = write(tmp_path, 5)
    (path.parent / ".step=6.ckpt.partial").write_bytes(b"half of")
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
