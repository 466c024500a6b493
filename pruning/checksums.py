"""Checksums of files and tensors by xxHash, which is faster than reading from disk."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
import xxhash
from torch import Tensor

SUMS = "checksums.json"
"""File with the names and checksums of the files beside it."""

_CHUNK = 1 << 18


def checksum(file: BinaryIO, num_bytes: int | None = None, notes: str = "") -> str:
    """Checksum of a file, hex, 32 digits.

    Args:
        file: An open file.
        num_bytes: Number of its first bytes to use; None for all.
        notes: Text to include in the checksum.
    """
    found, left = xxhash.xxh3_128(notes.encode()), num_bytes
    file.seek(0)
    while chunk := file.read(_CHUNK if left is None else min(_CHUNK, left)):
        found.update(chunk)
        left = None if left is None else left - len(chunk)
    return found.hexdigest()


def tensor_checksum(tensors: Mapping[str, Tensor], notes: str = "") -> str:
    """Checksum of the names, types, shapes and bytes of tensors, hex, 32 digits.

    Tensors on other devices are copied to the CPU one at a time.

    Args:
        tensors: The tensors, in any order.
        notes: Text to include in the checksum.
    """
    found = xxhash.xxh3_128(notes.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        found.update(flat.numpy().data)
    return found.hexdigest()


def write_sums(folder: Path, names: Iterable[str]) -> None:
    """Write the checksums of files into their folder."""
    sums = {}
    for name in names:
        with (folder / name).open("rb") as file:
            sums[name] = checksum(file)
    (folder / SUMS).write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


def damaged_files(folder: Path, names: Iterable[str]) -> list[str]:
    """Names of the files that have changed since `write_sums`."""
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
