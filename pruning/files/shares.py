"""Read this rank's share of a model from its files: no rank ever holds the model whole.

A share is a range of the entries of every tensor, counted as if the tensor were flat. The files are
mapped, not read: memory and disk are touched where the share lies and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

Share = Callable[[nn.Parameter], tuple[Tensor, int]]
"""Of a parameter: where this rank keeps its share (flat), and the entry that it begins with."""


def read_shares(model: nn.Module, folder: Path, share: Share) -> None:
    """Fill the shares of all parameters of a model from the safetensors of its folder.

    Args:
        model: The model; tied parameters are read once.
        folder: Its folder.
        share: Finds the share of a parameter.

    Raises:
        ValueError: The files lack a tensor of the model, or it has another size there.
    """
    with ExitStack() as stack, torch.no_grad():
        files = [
            stack.enter_context(safe_open(path, framework="pt"))
            for path in sorted(folder.glob("*.safetensors"))
        ]
        place = {name: file for file in files for name in file.keys()}  # noqa: SIM118
        for names, parameter in _by_parameter(model):
            name = next((name for name in names if name in place), None)
            if name is None:
                raise ValueError(f"{folder} has no tensor {' or '.join(names)}; is it complete?")
            target, start = share(parameter)
            tensor = place[name].get_slice(name)
            numel = prod(tensor.get_shape())
            if numel != numel_of(parameter):
                raise ValueError(
                    f"{folder} has {numel} entries in {name}, its config.json promises "
                    f"{numel_of(parameter)}."
                )
            stop = min(start + target.numel(), numel)
            if start < stop:
                target[: stop - start].copy_(flat_range(tensor, start, stop))


def flat_range(tensor: Any, start: int, stop: int) -> Tensor:
    """Entries start to stop of a tensor in a file, as if it were flat; whole rows are touched.

    Args:
        tensor: What `get_slice` of an open safetensors file gives.
        start: First entry, 0 or more.
        stop: Entry after the last one, above `start`.
    """
    shape = tensor.get_shape()
    row = prod(shape[1:])
    first = start // row
    rows: Tensor = tensor[first : -(-stop // row)] if shape else tensor[:]
    return rows.flatten()[start - first * row : stop - first * row]


def dtype_of(folder: Path, dtype: str) -> torch.dtype:
    """The torch type that a name stands for; "auto" is the type that the files have.

    Raises:
        ValueError: There is no such type, or there is no file.
    """
    if dtype != "auto":
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype):
            raise ValueError(f"`dtype` must be auto or a torch type, got {dtype!r}.")
        return found
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if name := said.get("dtype") or said.get("torch_dtype"):
        return dtype_of(folder, str(name))
    path = next(folder.glob("*.safetensors"), None)
    if path is None:
        raise ValueError(f"{folder} holds no *.safetensors file.")
    with safe_open(path, framework="pt") as file:
        first: Tensor = file.get_tensor(next(iter(file.keys())))
        return first.dtype


def numel_of(parameter: Any) -> int:
    """Entries of a parameter, wherever they are: DeepSpeed leaves an empty tensor in its place."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _by_parameter(model: nn.Module) -> Iterator[tuple[list[str], nn.Parameter]]:
    """Every parameter once, with all its names."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    for parameter, of_parameter in names.items():
        yield of_parameter, parameter
