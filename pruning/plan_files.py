"""The two files of a plan: written with a checksum that is verified when they are read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.pruning.checksums import tensor_checksum
from secateur.pruning.sites import Site

TENSORS, DESCRIPTION = "plan.safetensors", "plan.json"
_FORMAT, _CHECKSUM = "secateur-plan-2", "checksum"
_REQUIRED = {"model_type", "base", "sites", "provenance"}


def write_plan(folder: Path, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write the description of a plan, and its tensors.

    Args:
        folder: Folder of the plan, created if needed.
        content: Description; JSON values.
        tensors: Kept indices (int32) and gains (float32) by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), folder / TENSORS)
    content = {"format": _FORMAT, **content}
    content[_CHECKSUM] = _checksum(content, tensors)
    text = json.dumps(content, indent=1, sort_keys=True)
    (folder / DESCRIPTION).write_text(text + "\n", encoding="utf-8")


def read_plan(folder: Path) -> tuple[dict[str, Any], tuple[Site, ...], dict[str, Tensor]]:
    """Read the files of a plan.

    Returns:
        Its description, its sites, and its tensors by name.

    Raises:
        ValueError: They are damaged, incomplete or missing.
    """
    path = folder / DESCRIPTION
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{folder} holds no readable plan: {error}") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != _FORMAT:
        raise ValueError(f"{path} has format {found!r}, expected {_FORMAT!r}.")
    if lost := _REQUIRED - content.keys():
        raise ValueError(f"{path} lacks {', '.join(sorted(lost))}.")
    try:
        sites = tuple(
            Site(int(block), str(name), int(size)) for block, name, size in content["sites"]
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} has invalid `sites`: {error}; it is damaged.") from error
    _check_tensors(folder / TENSORS, {site.key for site in sites}, tensors)
    told = content.pop(_CHECKSUM, None)  # missing in plans of earlier versions
    if told not in (None, _checksum(content, tensors)):
        raise ValueError(
            f"{path} and {TENSORS} are damaged: their checksum differs. Restore a copy, or export "
            "again."
        )
    return content, sites, tensors


def _check_tensors(path: Path, indices: set[str], tensors: Mapping[str, Tensor]) -> None:
    if missing := sorted(indices - tensors.keys()):
        raise ValueError(f"{path} lacks the sites {', '.join(missing)}.")
    for name, tensor in tensors.items():
        expected = torch.int32 if name in indices else torch.float32
        if tensor.dtype != expected or tensor.dim() != 1:
            raise ValueError(
                f"{path} has {name} as {tensor.dtype} of shape {tuple(tensor.shape)}, expected a "
                f"vector of {expected}; it is damaged."
            )


def _checksum(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    return tensor_checksum(tensors, json.dumps(content, sort_keys=True))
