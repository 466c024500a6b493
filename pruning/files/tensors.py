"""Write safetensors files tensor by tensor: memory holds one tensor, whatever the size of a file.

A file is a JSON header of names, types, shapes and offsets, followed by the bytes. Wider types come
first, so that all are aligned. Tensors in the order of their names give the bytes that
`safetensors.torch.save_file`, which needs all tensors at once, would write.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.pruning.files.headers import INDEX, WEIGHTS
from secateur.pruning.files.model_folder import write_json
from secateur.pruning.progress import phase

_BYTES = {"I64": 8, "F64": 8, "F32": 4, "BF16": 2, "F16": 2}  # in the order of a file


@dataclass(frozen=True)
class Made:
    """A tensor to write, which is not in memory yet.

    Args:
        name: Its name.
        dtype: Type of the entries, as safetensors names it, such as `BF16`.
        shape: Its shape.
        make: Function that reads or computes it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Its size in a file."""
        return prod(self.shape) * _BYTES[self.dtype]


def packed(tensors: Iterable[Made], max_shard_bytes: int) -> list[list[Made]]:
    """Distribute tensors over files, in order.

    Args:
        tensors: The tensors.
        max_shard_bytes: Largest file in bytes, 1 or more; a larger tensor gets a file of its own.

    Raises:
        ValueError: The size is out of range.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"`max_shard_bytes` must be 1 or more, got {max_shard_bytes}.")
    files: list[list[Made]] = [[]]
    filled = 0
    for made in tensors:
        if files[-1] and filled + made.num_bytes > max_shard_bytes:
            files.append([])
            filled = 0
        files[-1].append(made)
        filled += made.num_bytes
    return [sorted(file, key=lambda made: made.name) for file in files]


def by_file(tensors: Iterable[tuple[Path, Made]]) -> list[list[Made]]:
    """Group tensors by the files that they come from; files and tensors keep their order."""
    files: dict[Path, list[Made]] = {}
    for path, made in tensors:
        files.setdefault(path, []).append(made)
    return list(files.values())


def write_tensors(
    files: Sequence[Sequence[Made]],
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the weights of a model: one file, or several and their index.

    Args:
        files: The tensors of every file.
        folder: Folder of the model.
        progress: Called with the numbers of files written and of all files.

    Raises:
        OSError: Writing failed, for example because the disk is full.
    """
    weight_map = {}
    total = sum(made.num_bytes for tensors in files for made in tensors)
    with phase("Writing weights", total) as advance:
        for number, tensors in enumerate(files, start=1):
            name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
            ordered = sorted(tensors, key=lambda made: list(_BYTES).index(made.dtype))
            with (folder / (name if len(files) > 1 else WEIGHTS)).open("wb") as file:
                file.write(_header(ordered))
                for made in ordered:
                    file.write(made.make().contiguous().flatten().view(torch.uint8).numpy().data)
                    weight_map[made.name] = name
                    advance(made.num_bytes)
            if progress is not None:
                progress(number, len(files))
    if len(files) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _header(tensors: Sequence[Made]) -> bytes:
    """The first bytes of a file, up to those of its tensors."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for made in tensors:
        start, end = end, end + made.num_bytes
        entry = {"dtype": made.dtype, "shape": made.shape, "data_offsets": [start, end]}
        header[made.name] = entry
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the bytes of the tensors start at a multiple of 8
    return len(text).to_bytes(8, "little") + text
