"""Content hashes of models and data, independent of names and paths.

Legend: N = windows, T = tokens of a window.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from secateur.pruning.checksums import tensor_checksum
from secateur.pruning.files.headers import weight_files
from secateur.pruning.files.model_folder import CONFIG, MARK, read_json
from secateur.pruning.progress import tracked


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def fingerprint(folder: str | Path) -> str:
    """Hash of a model folder: its config.json and the files of its weights, hex, 64 digits.

    It distinguishes models that differ by accident, and is faster than reading from disk; it does
    not protect against collisions made on purpose.

    Raises:
        ValueError: The folder holds no config.json or no safetensors weights.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is not a model folder: it holds no {CONFIG}.")
    files = [folder / CONFIG, *weight_files(folder)]
    with ThreadPoolExecutor() as pool:
        digests = list(tracked(pool.map(_hash_file, files), "Hashing files", len(files)))
    lines = (f"{path.name} {digest}" for path, digest in zip(files, digests, strict=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def refuse_changed(folder: Path, found: str) -> None:
    """Refuse a model of ours that differs from its export, if `secateur.json` records its hash.

    Args:
        folder: A model folder.
        found: Its fingerprint.

    Raises:
        ValueError: Its configuration or its weights have changed.
    """
    if not (folder / MARK).is_file():
        return
    mark: object = read_json(folder / MARK)
    told = mark.get("fingerprint") if isinstance(mark, dict) else None
    if told not in (None, found):
        raise ValueError(
            f"{folder} is not as it was exported: {CONFIG} or the weights are others than {MARK} "
            f"says. Export it again; if they were changed on purpose, remove {MARK}."
        )


def live_fingerprint(model: PreTrainedModel) -> str:
    """Hash of a model in memory: names, types, shapes and bytes of tensors, and configuration.

    Tensors on other devices are copied to the CPU one at a time.
    """
    config = {
        name: value
        for name, value in model.config.to_dict().items()
        if name not in ("_name_or_path", "dtype", "transformers_version")
    }
    notes = json.dumps(config, sort_keys=True, default=str)
    return tensor_checksum(model.state_dict(), notes)


def data_fingerprint(windows_NT: Int[Tensor, "N T"]) -> str:
    """Hash of windows of token ids, in order."""
    found = hashlib.sha256(f"{tuple(windows_NT.shape)}".encode())
    found.update(windows_NT.cpu().long().contiguous().numpy().tobytes())
    return found.hexdigest()
