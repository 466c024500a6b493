"""Checksums of what is written now and read later: xxHash, which is faster than a disk reads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
import xxhash
from torch import Tensor

SUMS = "checksums.json"
"""Beside files that are read whole: their names and checksums."""

_CHUNK = 1 << 18


def checksum(file: BinaryIO, num_bytes: int | None = None, notes: str = "") -> str:
    """Checksum of a file, hex, 32 digits.

    Args:
        file: An open file.
        num_bytes: Its first bytes count, so many; None for all.
        notes: Text that counts, too.
    """
    found, left = xxhash.xxh3_128(notes.encode()), num_bytes
    file.seek(0)
    while chunk := file.read(_CHUNK if left is None else min(_CHUNK, left)):
        found.update(chunk)
        left = None if left is None else left - len(chunk)
    return found.hexdigest()


def tensor_checksum(tensors: Mapping[str, Tensor], notes: str = "") -> str:
    """Checksum of the names, types, shapes and bytes of tensors, hex, 32 digits.

    On another device than the CPU one tensor at a time is copied.

    Args:
        tensors: The tensors, in any order.
        notes: Text that belongs to them.
    """
    found = xxhash.xxh3_128(notes.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        found.update(flat.numpy().data)
    return found.hexdigest()


def write_sums(folder: Path, names: Iterable[str]) -> None:
    """Note the checksums of files in their folder."""
    sums = {}
    for name in names:
        with (folder / name).open("rb") as file:
            sums[name] = checksum(file)
    (folder / SUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


def damaged_files(folder: Path, names: Iterable[str]) -> list[str]:
    """Those of some files that are not as they were when `write_sums` noted them."""
    try:
        sums = dict(json.loads((folder / SUMS).read_text(encoding="utf-8")))
    except (OSError, TypeError, ValueError):
        return [SUMS]
    found = []
    for name in names:
        try:
            with (folder / name).open("rb") as file:
                same = checksum(file) == sums.get(name)
        except OSError:
            same = False
        found += [] if same else [name]
    return found
