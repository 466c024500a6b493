"""What files of weights say of their tensors, before a single weight is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from secateur.pruning.files.model_folder import read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Header:
    """What a file says of one tensor.

    Args:
        path: The file.
        dtype: Type of the entries, as safetensors names it, such as `BF16`.
        shape: Shape.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: those of the index if there is one, which loading uses.

    Raises:
        ValueError: There are none, the index is damaged or names what lies elsewhere, or a file is
            missing.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ValueError(
            f"{folder} is not a model folder: it holds neither {WEIGHTS} nor {INDEX}. Weights in "
            "another format (`pytorch_model.bin`) become these by `save_pretrained`."
        )
    names = sorted(set(_weight_map(folder).values()))
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ValueError(f"{folder} lacks {', '.join(missing)}, which {INDEX} names.")
    return [folder / name for name in names]


def read_headers(folder: Path) -> dict[str, Header]:
    """Every tensor of a model folder, by name.

    Raises:
        ValueError: A file cannot be read, two files have one tensor, or the index says otherwise.
    """
    found: dict[str, Header] = {}
    files = weight_files(folder)
    for path in files:
        for name, header in _of_file(path):
            if name in found:
                raise ValueError(
                    f"{folder} has {name!r} twice, in {found[name].path.name} and {path.name}; "
                    "fetch or save it again."
                )
            found[name] = header
    promised = _weight_map(folder) if files != [folder / WEIGHTS] else {}
    for name, file in promised.items():
        if name not in found or found[name].path.name != file:
            raise ValueError(
                f"{folder / INDEX} names {name!r} in {file}, which does not hold it; fetch or save "
                "the model again."
            )
    return found


def read_tensor(path: Path, name: str) -> Tensor:
    """Read one tensor of a file; its bytes are memory-mapped."""
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def _of_file(path: Path) -> Iterable[tuple[str, Header]]:
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ValueError(
                f"{path} is a pointer of git-lfs, not the weights; `git lfs pull` in its folder "
                "fetches them."
            )
    try:
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_slice(name)
                yield name, Header(path, tensor.get_dtype(), tuple(tensor.get_shape()))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}; fetch or save it again.") from error


def _weight_map(folder: Path) -> Mapping[str, str]:
    """Name of every tensor to the name of its file, as the index has them."""
    path = folder / INDEX
    index = read_json(path)
    names = index.get("weight_map")
    if not (isinstance(names, dict) and names and all(isinstance(f, str) for f in names.values())):
        raise ValueError(f"{path} is damaged: its `weight_map` names no files; fetch it again.")
    if "metadata" not in index:  # transformers reads it
        raise ValueError(f"{path} is damaged: it has no `metadata`; fetch it again.")
    for file in names.values():
        if Path(file).name != file or "\\" in file:
            raise ValueError(
                f"{path} names {file!r}, which is no file of its folder; fetch the model again."
            )
    return names
