"""Remove blocks from a checkpoint without loading it: copy bytes, rewrite names and offsets.

A safetensors file is a JSON header of names, types, shapes and offsets, followed by the bytes.
Tensors of removed blocks are left out, those of later blocks are renumbered, everything else is
copied unchanged, whatever its type. Files become shorter, and empty ones are left out. The result
is stock or narrow, as is the base model. Equal inputs give equal folders, byte for byte.

Memory: one header and `_CHUNK` bytes, whatever the size of the model. Time: copying the kept
tensors, and reading all files once for the fingerprint of the base model.

As a command: `python -m secateur depth --help`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from secateur.pruning.chains import Step
from secateur.pruning.depth.removal import (
    PROVENANCE,
    checked_blocks,
    shortened_fields,
)
from secateur.pruning.families import Family
from secateur.pruning.files.base_model import BaseModel
from secateur.pruning.files.finish import finish
from secateur.pruning.files.headers import INDEX, WEIGHTS
from secateur.pruning.files.model_folder import (
    CONFIG,
    in_block,
    refuse_base,
    replaced_folder,
    write_json,
)
from secateur.pruning.progress import tracked

RECORD = "blocks.json"
"""File that records the removed blocks and the base model; marks the folder as ours."""
_CHUNK = 1 << 24


def prune_blocks(
    base_folder: str | Path,
    folder: str | Path,
    *,
    remove: Iterable[int] | None = None,
    keep: Iterable[int] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint without some of its blocks.

    The folder appears when everything is written; on any failure it is removed. An earlier model of
    this function in its place is replaced only at that moment.

    Args:
        base_folder: Model folder with config.json and safetensors, in one file or several.
        folder: Folder of the smaller model.
        remove: Indices of the blocks to remove, in any order; or give `keep`.
        keep: Indices of the blocks to keep, in any order; or give `remove`.
        provenance: Facts to record with the blocks, such as score and data; JSON values.

    Raises:
        ValueError: Blocks are out of range or repeated, none would remain, both or neither of the
            lists are given, the base model is damaged, quantised or of an unknown family, its
            configuration has a rule that depends on the index of a block, or something else exists
            at `folder`.
        OSError: Reading or writing failed, for example because the disk is full.
    """
    base, folder = BaseModel(Path(base_folder)), Path(folder)
    refuse_base(folder, base.name)
    base.refuse(Step.BLOCKS)
    staying = _staying(base.config.num_hidden_layers, remove, keep)
    why = {"base": base.fingerprint} | dict(provenance or {})
    fields = shortened_fields(base.config, staying, why)
    with replaced_folder(folder, is_shortened_model) as partial:
        _copy_weights(base, partial, staying)
        write_json(partial / CONFIG, base.settings | fields)
        finish(partial, base.folder)
        write_json(partial / RECORD, fields[PROVENANCE])


def is_shortened_model(folder: Path) -> bool:
    """Test whether a folder is a model that `prune_blocks` wrote."""
    return (folder / RECORD).is_file() and (folder / CONFIG).is_file()


def _staying(
    num_blocks: int, remove: Iterable[int] | None, keep: Iterable[int] | None
) -> list[int]:
    """Indices of the kept blocks, in order.

    Raises:
        ValueError: Not exactly one list is given, or blocks do not exist or are repeated.
    """
    if (remove is None) == (keep is None):
        raise ValueError("Give either `remove` or `keep`, the blocks to remove or those to keep.")
    if keep is not None:
        staying = sorted(checked_blocks(keep, num_blocks))
    else:
        gone = checked_blocks(remove or [], num_blocks)
        staying = [block for block in range(num_blocks) if block not in gone]
    if len(staying) == num_blocks:
        raise ValueError(f"All {num_blocks} blocks would be kept; name one to remove.")
    return staying


def _copy_weights(base: BaseModel, folder: Path, staying: list[int]) -> None:
    _ = base.tensors  # a file of another model would be left out, or copied, silently
    files: list[tuple[Path, int, dict[str, Any]]] = []
    for path in base.weight_files:
        header, start = _read_header(path)
        kept = {_renamed(name, base.family, staying): entry for name, entry in header.items()}
        if own := {name: entry for name, entry in kept.items() if name is not None}:
            files.append((path, start, own))
    total = sum(_size(entry) for _, _, own in files for entry in own.values())
    weight_map: dict[str, str] = {}
    for number, (path, start, own) in enumerate(files, start=1):
        name = WEIGHTS
        if len(files) > 1:
            name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        with path.open("rb") as source, (folder / name).open("wb") as copy:
            copy.write(_new_header(own))
            for tensor, entry in tracked(own.items(), f"Writing {name}"):
                source.seek(start + entry["data_offsets"][0])
                left = _size(entry)
                while left:
                    if not (chunk := source.read(min(left, _CHUNK))):
                        raise OSError(f"{path} became shorter while it was read.")
                    left -= copy.write(chunk)
                weight_map[tensor] = name
    if len(files) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _renamed(name: str, family: Family, staying: list[int]) -> str | None:
    """New name of a tensor; None if its block is removed."""
    block, relative = in_block(family, name)
    if block < 0:
        return name
    return f"{family.blocks}.{staying.index(block)}.{relative}" if block in staying else None


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Entries of the tensors of a safetensors file, by offset, and where their bytes start.

    Raises:
        ValueError: The file is damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if 8 + length > size:
            raise ValueError(f"{path} is damaged: its header exceeds the file. Fetch it again.")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}. Fetch it again.") from error
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if 8 + length + end != size:
        raise ValueError(
            f"{path} is damaged: it has {size} bytes and its header describes {8 + length + end}. "
            "Fetch it again."
        )
    # In the order of their bytes: larger types come first, so that all are aligned.
    return dict(sorted(header.items(), key=lambda item: item[1]["data_offsets"])), 8 + length


def _new_header(entries: Mapping[str, Any]) -> bytes:
    """Header of a file with the bytes of the entries in order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, entry in entries.items():
        header[name] = entry | {"data_offsets": [offset, offset + _size(entry)]}
        offset += _size(entry)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the bytes of the tensors start at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _size(entry: Mapping[str, Any]) -> int:
    start, end = entry["data_offsets"]
    return int(end - start)
