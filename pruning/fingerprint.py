"""Content hashes that tell models and data apart, whatever they are called or wherever they lie."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from pruning.model_folder import CONFIG, weight_files


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def fingerprint(folder: str | Path) -> str:
    """Hash of a model folder: its config.json and the files of its weights, hex, 64 digits.

    It tells models apart that differ by accident, faster than a disk reads; against somebody who
    makes two models of one fingerprint on purpose it is no protection.

    Raises:
        ValueError: The folder holds no config.json or no safetensors weights.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is not a model folder: it holds no {CONFIG}.")
    files = [folder / CONFIG, *weight_files(folder)]
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(_hash_file, files))
    lines = (f"{path.name} {digest}" for path, digest in zip(files, digests, strict=True))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
